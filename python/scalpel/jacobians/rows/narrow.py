"""Weights in bfloat16 for products with tangents, beside a model of a wider dtype."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ...models.decoders.decoder import Weights

__all__ = ["NarrowWeights"]


class NarrowWeights:
    """The matrices of others in bfloat16: a copy, made once, and again when one has changed."""

    def __init__(self, wide: Weights) -> None:
        self._wide = wide
        self._kept: dict[str, tuple[tuple[int, int], Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: nn.Module, wide: Weights) -> NarrowWeights:
        kept = _narrow.get(model)
        if kept is None:
            kept = _narrow[model] = cls(wide)
        kept._wide = wide
        return kept

    def __call__(self, name: str) -> Tensor:
        tensor = self._wide(name)
        if tensor.dim() < 2:
            return tensor
        mark = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        # A change through .data leaves no trace but the numbers themselves; some of them are looked at.
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)]
        kept = self._kept.get(name)
        if kept is None or kept[0] != mark or not torch.equal(kept[1], sample):
            kept = self._kept[name] = mark, sample.clone(), tensor.to(torch.bfloat16)
        return kept[2]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self._wide.rows(name, index)

    def __contains__(self, name: object) -> bool:
        return name in self._wide


_narrow: weakref.WeakKeyDictionary[nn.Module, NarrowWeights] = weakref.WeakKeyDictionary()
