"""States and rows for the tests of StreamingCovariance, and bounds on the rounding errors of its sums."""

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
    """Compare copies of two states, so that rows that wait in either continue to wait."""
    ours, theirs = (copy.deepcopy(state)._state.tensors() for state in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- rounding bounds ------------------------------------------------------------------------------
#
# Adding m numbers one by one in a format of unit roundoff u has an error of at most (m - 1) u times the sum of their
# sizes: each addition is off by u times a partial sum, and the first one, to zero, is exact (Higham 2002, "Accuracy and
# stability of numerical algorithms", section 4.2). For sums of sums the counts add up. A bound is therefore the number
# of roundings on an entry's way, times u, times Σ |d_i| |d_j| over the rows. Unlike a comparison with another library's
# error, it holds for every processor, every compiler and every order of that length.

UNIT = 2.0**-24  # unit roundoff of float32
_FLOAT64 = 2.0**-52  # twice that of float64: once for us, once for the twin


def sizes(apart: Tensor) -> Tensor:
    """The sum Σ |d_i| |d_j| over rows d (rows, dim), in float64."""
    return apart.double().abs().mT @ apart.double().abs()


def gram_bound(apart: Tensor, splits: int, real: bool) -> Tensor:
    """The largest error of an entry of gram_lower (csrc/covariance/gram_cuda.cu).

    ``apart`` are the rows after the shift is subtracted in float32; if ``splits`` is 1 they are also rounded to
    bfloat16. ``real`` is true for a GPU and false for the stand-in.
    """
    rows = len(apart)
    at_once, settle, flush = (32, 1024, 8192) if splits == 1 else (16, 256, 4096)
    # The products of `at_once` rows. The stand-in rounds each sum once. A tensor core truncates each term that it adds,
    # and the sum, to 24 bits, which counts as 2u for each rounding; the running sums count as a few additional terms.
    step = min(rows, at_once) if not real else 2 * (min(rows, at_once) + 4)
    if splits == 3:  # five small products per row come first, and their sums are below 2^-6 of the large ones
        step *= 1 + 5 * 2**-6
    # These sums are added until they are settled, and the settled sums until they are flushed into float64.
    sums = min(math.ceil(rows / at_once), settle // at_once) - 1
    settled = min(math.ceil(rows / settle), flush // settle) - 1
    # v = hi + mid + lo with |mid| <= 2^-8 |v| and |lo| <= 2^-16 |v|. Of the three products that are left out, two are
    # at most 2^-24 of |v w| and one 2^-32.
    left_out = 2.1 if splits == 3 else 0.0
    return ((step + sums + settled + left_out) * UNIT + rows * _FLOAT64) * sizes(apart)


def covariance_bound(x: Tensor, center: bool, gpu: bool | None, splits: list[int] | None = None) -> Tensor:
    """The largest error of an entry of the covariance of rows x.

    ``gpu`` is None for the CPU; for OnDevice it is True on a GPU and False for the stand-in. ``splits`` are the row
    numbers at which the updates divide x.
    """
    x = x.cpu()
    blocks = x.split(1024) if gpu is None else [part for part in x.tensor_split(splits or []) if len(part)]
    mean = x.double().mean(dim=0) if center else torch.zeros(x.shape[1], dtype=torch.float64)
    bound = len(blocks) * _FLOAT64 * sizes(x.double() - mean)
    for block in blocks:  # centered by its own mean, and joined in float64
        mean = block.double().mean(dim=0) if center else torch.zeros(x.shape[1], dtype=torch.float64)
        apart = block.double() - mean
        bound += (len(x) + 2) * _FLOAT64 * sizes(apart)
        if x.dtype == torch.float64:
            continue
        if center:  # each of a product's two deviations is rounded once to float32
            bound += 2 * UNIT * sizes(apart)
        if gpu is None:  # the sums of 128 products in float32, and the products themselves if not fused
            bound += (min(len(block), 128) + 1) * UNIT * sizes(apart)
        else:
            once = x.dtype == torch.bfloat16 and not center
            bound += gram_bound(block.double() - mean.float().double(), 1 if once else 3, gpu)
    return bound / len(x)


def within(found: Tensor, expected: Tensor, bound: Tensor) -> bool:
    """Whether every entry is within the bound; NaN never is."""
    return bool(((found.double().cpu() - expected.double().cpu()).abs() <= bound.cpu()).all())
