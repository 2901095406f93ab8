"""transformers' caches of keys and values, as the forward pass of a CircuitGPT uses them."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

__all__ = ["TransformersKeyValues", "new_cache"]


class TransformersKeyValues:
    """A cache of transformers as :class:`scalpel.models.circuitgpt.key_values.KeyValues`.

    transformers keeps keys and values with an axis for the heads, (B, heads, tokens, d_head). A cache of fixed size
    gives all its room, of which the tokens so far are the first part.
    """

    def __init__(self, cache: Any, heads: int) -> None:
        self._cache, self._heads = cache, heads
        self.length = int(cache.get_seq_length())

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, L, d_attn) of new tokens; give those of all tokens, (B, length + L, d_attn)."""
        end = self.length + k.shape[1]
        keys, values = self._cache.update(self._split(k), self._split(v), layer)
        return self._joined(keys, end), self._joined(values, end)

    def advance(self, count: int) -> None:
        """Nothing: the cache counts for itself."""

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def _joined(self, x: Tensor, end: int) -> Tensor:
        return x[:, :, :end].transpose(1, 2).flatten(-2)


def new_cache(config: Any) -> Any:
    """Make an empty cache that grows with the text."""
    try:
        return DynamicCache(config=config)
    except TypeError:  # older versions take no config
        return DynamicCache()
