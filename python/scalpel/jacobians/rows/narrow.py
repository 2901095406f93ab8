"""Copies of a model's weights in bfloat16, for products with tangents; the model itself keeps its wider dtype."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ...models.decoders.decoder import Weights

__all__ = ["NarrowWeights"]


class NarrowWeights:
    """The matrices of other weights in bfloat16, copied when first needed and again after they have changed."""

    def __init__(self, wide: Weights) -> None:
        self._wide = wide
        self._kept: dict[str, tuple[tuple[int, int], Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: nn.Module, wide: Weights) -> NarrowWeights:
        """The copies that belong to ``model``, which last as long as it does."""
        narrow = _narrow.get(model)
        if narrow is None:
            narrow = _narrow[model] = cls(wide)
        narrow._wide = wide
        return narrow

    def __call__(self, name: str) -> Tensor:
        """The weight ``name``: a matrix in bfloat16, or a vector as it is."""
        tensor = self._wide(name)
        if tensor.dim() < 2:
            return tensor
        version = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        # A change through .data shows in the numbers alone, so some of them are compared.
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)]
        kept = self._kept.get(name)
        if kept is None or kept[0] != version or not torch.equal(kept[1], sample):
            kept = self._kept[name] = version, sample.clone(), tensor.to(torch.bfloat16)
        return kept[2]

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a table such as the embedding, in their own dtype."""
        return self._wide.rows(name, index)

    def __contains__(self, name: object) -> bool:
        return name in self._wide


_narrow: weakref.WeakKeyDictionary[nn.Module, NarrowWeights] = weakref.WeakKeyDictionary()
