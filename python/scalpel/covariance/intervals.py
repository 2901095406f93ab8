"""Confidence intervals by leaving out one block of rows at a time."""

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
    """A measure of all rows with its 95 % interval.

    Scalars are tensors of shape (); a measure that gives several numbers has an interval for each.

    Attributes:
        value: The measure of all rows.
        low: The lower end of the interval.
        high: The upper end of the interval.
        left_out: The measure without each block in turn, (blocks, ...).
    """

    value: Tensor
    low: Tensor
    high: Tensor
    left_out: Tensor


def leave_one_out(
    blocks: Sequence[StreamingCovariance], measure: Callable[[StreamingCovariance], float | Tensor]
) -> Interval:
    """Compute a measure of several states together, with a jackknife interval over the states.

    With g blocks of equal size and θ₍₋ᵢ₎ the measure without block i, the variance is (g − 1)/g Σ (θ₍₋ᵢ₎ − mean)²
    (Efron & Tibshirani 1993, "An introduction to the bootstrap", eq. 11.5; for blocks of dependent rows Künsch 1989),
    and the interval is value ± t₀.₉₇₅(g − 1) standard errors. Blocks should be long compared with the distance over
    which rows depend on each other. The value is not corrected for bias, so a rank from few rows stays too small, and
    the interval ignores any bounds that the measure has.

    Args:
        blocks: At least two states with rows, of the same kind, over disjoint blocks of rows. They are not changed.
        measure: A function of a state that returns a number, or a tensor of the same shape for every state.

    Returns:
        The measure of all rows, its 95 % interval, and the measure without each block.

    Raises:
        ValueError: If fewer than two blocks have rows, or the states cannot be merged.

    Example:
        >>> blocks = [scalpel.StreamingCovariance(dim=1).update(torch.tensor([[0.0], [d]])) for d in (2.0, 4.0)]
        >>> interval = scalpel.covariance.leave_one_out(blocks, lambda state: state.mean[0])
        >>> interval.value, interval.left_out
        (tensor(1.5000, dtype=torch.float64), tensor([2., 1.], dtype=torch.float64))
    """
    full = [block for block in blocks if block.count]
    if len(full) < 2:
        raise ValueError(f"{len(full)} of the blocks have rows; leaving one out needs at least two")
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
    """Merge all blocks but one; subtracting that one would leave rounding errors that count as directions."""
    rest = [block for j, block in enumerate(blocks) if j != i]
    merged = copy.deepcopy(rest[0])
    for block in rest[1:]:
        merged.merge(block)
    return merged


def _plain(value: float | Tensor) -> Tensor:
    device = value.device if isinstance(value, Tensor) else "cpu"
    numbers = torch.as_tensor(value, dtype=torch.float64, device=device)
    if not math.prod(numbers.shape):
        raise ValueError(f"measure returned a tensor of shape {tuple(numbers.shape)}; it must return numbers")
    return numbers
