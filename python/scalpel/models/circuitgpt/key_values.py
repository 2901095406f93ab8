"""Keys and values of the tokens that a CircuitGPT has read, so that the next pass computes only new tokens.

A forward pass takes any object with the three members of :class:`KeyValues`. :class:`KeyValueCache` is the one that
:meth:`scalpel.CircuitGPT.generate` uses.
"""

from typing import Protocol

import torch
from torch import Tensor

from .config import CircuitGPTConfig

__all__ = ["KeyValueCache", "KeyValues"]


class KeyValues(Protocol):
    """What a forward pass asks of a store of keys and values.

    ``length``: how many tokens of each row it holds, padding included; it counts a pass's tokens from the end of that
    pass on, so that all layers of one pass see the same number.
    """

    @property
    def length(self) -> int:
        """How many tokens of each row the store holds, padding included."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, L, d_attn) of new tokens; give those of all tokens, (B, length + L, d_attn)."""

    def advance(self, count: int) -> None:
        """Count ``count`` new tokens, after all layers have kept them."""


class KeyValueCache:
    """Keys and values of all layers, in memory that is taken once.

    The values are those at the hooks ``attn.k`` and ``attn.v``: after AbsTopK, and after interventions. A pass that
    fails halfway leaves the cache as it was. Nothing can be differentiated through it.

    Args:
        config: The model's configuration.
        rows: How many texts there are.
        room: The most tokens that a text will have, padding included.
        device: The model's device.
        dtype: The dtype of the keys and values, which is that of the model.

    Example:
        >>> import torch
        >>> from scalpel import CircuitGPTConfig
        >>> config = CircuitGPTConfig(n_layer=2, n_head=2, d_model=8)
        >>> KeyValueCache(config, 3, 10, torch.device("cpu"), torch.float32).nbytes == 2 * 2 * 3 * 10 * 8 * 4
        True
    """

    def __init__(
        self, config: CircuitGPTConfig, rows: int, room: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2, config.n_layer, rows, room, config.d_attn)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """The memory that it takes: 2 · layers · rows · room · d_attn numbers."""
        return self._store.nbytes

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, L, d_attn) of new tokens; give those of all tokens, (B, length + L, d_attn)."""
        end = self.length + k.shape[1]
        keys, values = self._store[:, layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]

    def advance(self, count: int) -> None:
        """Count ``count`` new tokens, after all layers have kept them."""
        self.length += count
