"""States and rows for the tests of StreamingCovariance."""

import copy

import torch
from torch import Tensor

from scalpel import StreamingCovariance


def correlated(rows: int, dim: int, shift: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(rows * 1000 + dim)
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    return x @ torch.randn(dim, dim, generator=g, dtype=torch.float64) / dim**0.5 + shift


def state_of(x: Tensor, splits: list[int] | None = None, center: bool = True) -> StreamingCovariance:
    state = StreamingCovariance(x.shape[-1], center=center)
    for part in x.tensor_split(splits or []):
        state.update(part)
    return state


def assert_close(a: StreamingCovariance, b: StreamingCovariance, tolerance: float = 1e-12) -> None:
    assert a.count == b.count
    scale = max(1e-300, float(b.covariance().abs().max()))
    assert (a.mean - b.mean).abs().max() <= tolerance * max(1.0, float(b.mean.abs().max()))
    assert (a.covariance() - b.covariance()).abs().max() <= tolerance * scale


def same_bits(a: StreamingCovariance, b: StreamingCovariance) -> bool:
    """Of copies, so that rows that wait in either go on waiting."""
    ours, theirs = (copy.deepcopy(each)._state.tensors() for each in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
