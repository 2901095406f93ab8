"""Matrices with a fixed share of non-zero entries."""

import torch
from torch import Tensor

__all__ = ["prune_"]


@torch.no_grad()
def prune_(weight: Tensor, fraction: float, min_per_channel: int) -> None:
    """Set all but the largest entries of a matrix to zero, in place.

    Args:
        weight: (out, in).
        fraction: The share of entries to keep, those of the largest magnitude. At 1 or more nothing changes.
        min_per_channel: How many entries of each row and of each column to keep in any case, so that no neuron loses
            all of its weights.
    """
    if fraction >= 1:
        return
    magnitudes = weight.abs()
    count = magnitudes.numel()
    keep = round(fraction * count)
    threshold = magnitudes.flatten().kthvalue(count - keep + 1).values if keep else magnitudes.new_tensor(torch.inf)
    mask = magnitudes >= threshold
    for dim in (0, 1):
        index = magnitudes.topk(min(min_per_channel, magnitudes.shape[dim]), dim=dim).indices
        mask.scatter_(dim, index, True)
    weight.mul_(mask)
