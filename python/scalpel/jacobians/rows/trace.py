"""The primal of a dense decoder, which can be cut at any of its hooks: what the rules of its sublayers need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...hooks.names import is_pattern
from ...hooks.stopping import Stop
from ...models.decoders.decoder import Decoder, DecoderLayer, Dense
from .primal import DensePrimal, Text, places_of, through_layer
from .rules import DenseNorm

__all__ = ["DenseTrace"]


class DenseTrace:
    """One forward pass, kept as what products need.

    Args:
        decoder: The model, by the rules of its family.
        text: The tokens.
        hooks: Where the primal is to be cut, in the model's order. Layers before the first are not kept, and nothing
            is computed after the last. The last may be the attention weights of a layer, which the layer's attention
            gives at chosen queries: they have no entry in ``values``.
        see: Called at every hook up to the last, with its name and the value there.
        relevance: Whether products follow the rules of the relevance lens instead of the derivative.

    Made, it stands before the first layer: :meth:`run` takes it through the whole model, and :meth:`advance` through
    one layer, for a model whose layers are in memory one at a time. The residual stream is float64 in a float64 model
    and float32 otherwise.

    Attributes:
        values: The value at each of ``hooks``, all tokens.
        resid: The residual stream (B, L, width) where the trace stands.
        final: The last norm and the output matrix, where the pass came that far.
        neurons: The width of the MLPs.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        hooks: Sequence[str],
        see: Callable[[str, Tensor], None] | None = None,
        relevance: bool = False,
    ) -> None:
        self.decoder = decoder
        self.hooks = hooks
        self._last = hooks[-1] if hooks else None
        if self._last is not None and is_pattern(self._last):
            self._last = f"{self._number(self._last)}.attn.y"  # the first hook after the layer's attention is kept
        self.values: dict[str, Tensor] = {}
        embedded = decoder.embed(text.ids, text.positions)
        self.resid = embedded if embedded.dtype == torch.float64 else embedded.float()
        self.places = places_of(decoder, text, self.resid.dtype)
        self.final: tuple[DenseNorm, Dense] | None = None
        self.neurons = 0
        self._see = see
        self._relevance = relevance
        self._stop = Stop()
        self._first = self._number(hooks[0]) if hooks else 0
        self._primals: dict[int, DensePrimal] = {}

    def run(self) -> DenseTrace:
        """Take it from the embedding to the last of ``hooks``; gives itself."""
        config = self.decoder.config
        with self._stop:
            for i in range(config.layers):
                self.advance(i, self.decoder.layer(i), keep=i >= self._first)
            x = self._tap("final_resid", self.resid)
            weight, head = self.decoder.final()
            norm = DenseNorm.at(x, weight, config.eps, config.rms)
            self.final = norm, head
            self._tap("logits", head(norm.value()))
        return self

    def advance(self, i: int, layer: DecoderLayer, keep: bool) -> DensePrimal:
        """Take it through layer ``i``, whose primal is given back, and kept for :meth:`layers` if ``keep``."""
        primal = DensePrimal()
        self.neurons = layer.down.weight.shape[1]
        if keep:  # before the layer, in which the last hook may lie
            self._primals[i] = primal
        tap, places = self._tap, self.places
        self.resid = through_layer(self.decoder, i, layer, self.resid, places, tap, primal, self._relevance)
        return primal

    def has(self, source: str, target: str) -> bool:
        """Whether it can be cut at ``source`` and, no earlier in the model, at ``target``."""
        kept = list(self.hooks)
        return source in kept and target in kept[kept.index(source) :]

    def layers(self, source: str, target: str) -> dict[int, DensePrimal]:
        """The primals of the layers that a tangent meets on its way from one hook to another, by number."""
        stop = self._number(target) + 1
        return {i: primal for i, primal in self._primals.items() if self._number(source) <= i < stop}

    def _number(self, hook: str) -> int:
        """The layer of a hook; how many layers there are, for a hook after the last."""
        at = hook.partition(".")[0]
        return int(at) if at.isdecimal() else self.decoder.config.layers

    def _tap(self, name: str, value: Tensor) -> Tensor:
        if self._see is not None:
            self._see(name, value)
        if name in self.hooks:
            self.values[name] = value
        if name == self._last:
            self._stop(value)
        return value
