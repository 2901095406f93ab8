"""States and rows for the tests of StreamingCovariance, and how far its sums may be from the exact ones."""

import copy
import math

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


# ---- what the arithmetic promises ----------------------------------------------------------------
#
# Adding m numbers one by one in a format of unit roundoff u is off by at most (m - 1) u times the sum of their sizes,
# since each addition is off by u times a partial sum, and the first one, to zero, is exact (Higham 2002, "Accuracy and
# stability of numerical algorithms", section 4.2). Sums of sums add their counts. So a bound is a count of roundings
# along an entry's way, times u, times Σ |d_i| |d_j| over the rows: it holds for every processor, compiler and order of
# the same length, which a comparison with another library's error doesn't.

UNIT = 2.0**-24  # of float32
_FLOAT64 = 2.0**-52  # twice float64's: ours, and the twin's


def sizes(apart: Tensor) -> Tensor:
    """Σ |d_i| |d_j| over rows d (rows, dim), in float64."""
    return apart.double().abs().mT @ apart.double().abs()


def gram_bound(apart: Tensor, splits: int, real: bool) -> Tensor:
    """The most that an entry of gram_lower (csrc/covariance/gram_cuda.cu) may be off, for rows that are ``apart`` when
    the shift is taken off in float32, and rounded to bfloat16 if ``splits`` is 1. ``real``: on a GPU."""
    rows = len(apart)
    at_once, settle, flush = (32, 1024, 8192) if splits == 1 else (16, 256, 4096)
    # The products of `at_once` rows. The stand-in rounds each sum once. A tensor core cuts each of the terms that it
    # adds, and the sum, below 24 bits: 2u for a rounding, and a few more terms, for the sums so far are among them.
    step = min(rows, at_once) if not real else 2 * (min(rows, at_once) + 4)
    if splits == 3:  # five small products a row come first; all their sums are below 2^-6 of the large ones'
        step *= 1 + 5 * 2**-6
    # Such sums, up to the settling; what was settled, up to the flush into float64.
    sums = min(math.ceil(rows / at_once), settle // at_once) - 1
    settled = min(math.ceil(rows / settle), flush // settle) - 1
    # v = hi + mid + lo with |mid| <= 2^-8 |v| and |lo| <= 2^-16 |v|: of the three products that are left out, two are
    # 2^-24 of |v w| and one 2^-32.
    left_out = 2.1 if splits == 3 else 0.0
    return ((step + sums + settled + left_out) * UNIT + rows * _FLOAT64) * sizes(apart)


def covariance_bound(x: Tensor, center: bool, gpu: bool | None, splits: list[int] | None = None) -> Tensor:
    """The most that an entry of the covariance of rows x may be off.

    gpu: of OnDevice, on a GPU or (False) by the stand-in, for updates that ``splits`` cut; None: of the CPU."""
    x = x.cpu()
    blocks = x.split(1024) if gpu is None else [part for part in x.tensor_split(splits or []) if len(part)]
    mean = x.double().mean(dim=0) if center else torch.zeros(x.shape[1], dtype=torch.float64)
    bound = len(blocks) * _FLOAT64 * sizes(x.double() - mean)
    for block in blocks:  # centred by its own mean, and joined in float64
        mean = block.double().mean(dim=0) if center else torch.zeros(x.shape[1], dtype=torch.float64)
        apart = block.double() - mean
        bound += (len(x) + 2) * _FLOAT64 * sizes(apart)
        if x.dtype == torch.float64:
            continue
        if center:  # a deviation is rounded to float32, once, on either side of the product
            bound += 2 * UNIT * sizes(apart)
        if gpu is None:  # float32 products of 128 rows are added, and are rounded themselves where they aren't fused
            bound += (min(len(block), 128) + 1) * UNIT * sizes(apart)
        else:
            once = x.dtype == torch.bfloat16 and not center
            bound += gram_bound(block.double() - mean.float().double(), 1 if once else 3, gpu)
    return bound / len(x)


def within(found: Tensor, expected: Tensor, bound: Tensor) -> bool:
    """Whether every entry is as near as the bound says; NaN is not."""
    return bool(((found.double().cpu() - expected.double().cpu()).abs() <= bound.cpu()).all())
