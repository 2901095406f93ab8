"""Intervals by leaving one block of rows out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from .streaming import StreamingCovariance


class Interval(NamedTuple):
    """A measure of all rows, its 95 % interval, and what it is without each block (blocks, …).

    Scalars are tensors of shape (); a measure that gives several numbers has an interval for each.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    left_out: Tensor


def leave_one_out(
    blocks: Sequence[StreamingCovariance], measure: Callable[[StreamingCovariance], float | Tensor]
) -> Interval:
    """The jackknife over stored block states: measure(all), and measure(all but one) for each block.

    ``blocks``: at least two states of equal kind, disjoint blocks of rows; they are left as they are. ``measure``: a
    state to a number, or to a tensor of one shape.

    With g blocks of equal size and θ₍₋ᵢ₎ the measure without block i, the variance is (g − 1)/g Σ (θ₍₋ᵢ₎ − mean)²
    (Efron & Tibshirani 1993, "An introduction to the bootstrap", eq. 11.5; for blocks of dependent rows Künsch 1989),
    and the interval value ± t₀.₉₇₅(g − 1) standard errors. Blocks should be long against the distance over which rows
    depend on each other. The value is not corrected for its bias: a rank from few rows stays too small, and the
    interval knows no bounds that the measure may have.

    ValueError for fewer than two blocks with rows, or states that can't be merged.
    """
    full = [block for block in blocks if block.count]
    if len(full) < 2:
        raise ValueError(f"{len(full)} of the blocks have rows; leaving one out takes two or more")
    whole = copy.deepcopy(full[0])
    for block in full[1:]:
        whole.merge(block)
    value = _plain(measure(whole))
    without = [_plain(measure(_all_but(full, i))) for i in range(len(full))]
    return jackknife(value, torch.stack(without))


def jackknife(value: Tensor, left_out: Tensor) -> Interval:
    """The interval of a measure from what it is without each block; see :func:`leave_one_out` for the formula.

    Args:
        value: The measure of all blocks, (…).
        left_out: The measure without each block, (blocks, …), for two blocks or more.

    Example:
        >>> import torch
        >>> from scalpel.covariance.intervals import jackknife
        >>> interval = jackknife(torch.tensor(2.0), torch.tensor([1.5, 2.0, 2.5]))
        >>> round(float(interval.low), 2), round(float(interval.high), 2)
        (-0.48, 4.48)
    """
    blocks = len(left_out)
    spread = left_out - left_out.mean(dim=0)
    half = float(stdtrit(blocks - 1, 0.975)) * (spread.square().sum(dim=0) * (blocks - 1) / blocks).sqrt()
    return Interval(value, value - half, value + half, left_out)


def _all_but(blocks: Sequence[StreamingCovariance], i: int) -> StreamingCovariance:
    """By merging the others: what subtraction leaves of rounding would count as directions."""
    rest = [block for j, block in enumerate(blocks) if j != i]
    found = copy.deepcopy(rest[0])
    for block in rest[1:]:
        found.merge(block)
    return found


def _plain(value: float | Tensor) -> Tensor:
    device = value.device if isinstance(value, Tensor) else "cpu"
    found = torch.as_tensor(value, dtype=torch.float64, device=device)
    if not math.prod(found.shape):
        raise ValueError(f"measure gave a tensor of shape {tuple(found.shape)}; it must give numbers")
    return found
