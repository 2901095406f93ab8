"""The primal of a dense decoder, which can be cut at any of its hooks: what the rules of its sublayers need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...hooks.stopping import Stop
from ...models.decoders.decoder import Dense
from .primal import DensePrimal, places_of, through_layer
from .rules import DenseNorm

if TYPE_CHECKING:
    from .decoder_pass import DecoderPass


class DenseTrace:
    """One forward pass, kept as what products need.

    Args:
        run: A pass of the decoder at the inputs.
        hooks: Where the primal is to be cut, in the model's order. Layers before the first are not kept, and nothing
            is computed after the last.

    ``values``: the value at each of ``hooks``, all tokens. ``final``: the last norm and the output matrix, where the
    pass came that far. ``neurons``: the width of the MLPs.
    """

    def __init__(self, run: DecoderPass, hooks: Sequence[str]) -> None:
        self.run = run
        self.hooks = hooks
        self.values: dict[str, Tensor] = {}
        self.places = places_of(run.decoder, run.positions, run.real, run.dtype)
        self.final: tuple[DenseNorm, Dense] | None = None
        self.neurons = 0
        self._first = self._number(hooks[0])
        self._stop = Stop()
        self._primals: dict[int, DensePrimal] = {}
        with self._stop:
            self._tap("logits", self._run())

    def primals(self, source: str, target: str) -> dict[int, DensePrimal]:
        """Those of the layers that a tangent meets on its way from one hook to another."""
        stop = self._number(target) + 1
        return {i: primal for i, primal in self._primals.items() if self._number(source) <= i < stop}

    def _number(self, hook: str) -> int:
        """The layer of a hook; how many layers there are, for a hook after the last."""
        at = hook.partition(".")[0]
        return int(at) if at.isdecimal() else self.run.decoder.config.layers

    def _run(self) -> Tensor:
        run, decoder = self.run, self.run.decoder
        config = decoder.config
        x = decoder.embed(run.ids, run.positions).to(run.dtype)
        for i in range(config.layers):
            layer, primal = decoder.layer(i), DensePrimal()
            self.neurons = layer.down.weight.shape[1]
            if i >= self._first:
                self._primals[i] = primal
            x = through_layer(decoder, i, layer, x, self.places, self._tap, primal)
        x = self._tap("final_resid", x)
        weight, head = decoder.final()
        norm = DenseNorm.at(x, weight, config.eps, config.rms)
        self.final = norm, head
        return head(norm.value())

    def _tap(self, name: str, value: Tensor) -> Tensor:
        if name in self.hooks:
            self.values[name] = value
            if name == self.hooks[-1]:
                self._stop(value)
        return value
