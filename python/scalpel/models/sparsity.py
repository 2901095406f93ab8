"""Matrices with a fixed share of non-zero entries."""

import torch
from torch import Tensor

__all__ = ["prune_"]


@torch.no_grad()
def prune_(weight: Tensor, fraction: float, min_per_channel: int) -> None:
    """Zero all but the ``fraction`` of entries that are largest in magnitude, in place.

    The largest ``min_per_channel`` entries of each row and each column are kept whatever the fraction, so that
    no neuron loses all of its weights.
    """
    if fraction >= 1:
        return
    size = weight.abs()
    keep = round(fraction * size.numel())
    threshold = size.flatten().kthvalue(size.numel() - keep + 1).values if keep else size.new_tensor(torch.inf)
    mask = size >= threshold
    for dim in (0, 1):
        index = size.topk(min(min_per_channel, size.shape[dim]), dim=dim).indices
        mask.scatter_(dim, index, True)
    weight.mul_(mask)
