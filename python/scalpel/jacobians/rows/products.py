"""Products with the Jacobian of a dense decoder: T tangents stacked as rows of the same matrix products.

The primal runs once. Before the first source token nothing moves, and after the last target token nothing is
wanted: those rows are left out. Tangents go in chunks that bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.func import jvp, vjp, vmap

from ...hooks.positions import Selected, read_at
from ...hooks.running import ALONE
from ...hooks.stopping import Stop
from ...models.decoders.decoder import Dense
from ..ends import finished
from .layer import Buffers, DenseLayer
from .primal import DensePrimal
from .trace import DenseTrace

if TYPE_CHECKING:
    from .decoder_pass import DecoderPass

Function = Callable[[Tensor], Tensor]

_CHUNK_BYTES = 1 << 28  # what the largest buffer of a chunk of tangents may take


class DenseProducts:
    """Products with the Jacobian between two hooks of a decoder, and the primal there."""

    def __init__(
        self,
        run: DecoderPass,
        at: tuple[Selected, Selected],
        function: Function | None,
        trace: DenseTrace,
    ) -> None:
        self.run = run
        self.at = at
        self.function = function
        self.config = run.decoder.config
        self.batch, self.length = run.text.ids.shape
        chosen = [range(self.length) if selected is None else selected for selected in at]
        self.first, self.stop = min(chosen[0]), max(chosen[1]) + 1
        self.places = trace.places
        self.primals = trace.layers(run.source, run.target)
        self.final = trace.final
        self.neurons = trace.neurons
        self.source = read_at(trace.values[run.source], at[0]).clone()
        self.recorded = read_at(trace.values[run.target], at[1]).clone()
        self.primal = self._of_recorded(self.recorded.clone()).clone()  # the function may work in place

    def _of_recorded(self, value: Tensor) -> Tensor:
        return finished(value, self.function, self.run.target, self.run.dtype)

    def _chunks(self, tangents: Tensor) -> tuple[Tensor, ...]:
        widest = max(3 * self.config.heads * self.config.head_dim, self.neurons)
        bytes_of_one = self.batch * self.length * widest * self.source.element_size()
        return tangents.split(max(1, _CHUNK_BYTES // bytes_of_one))

    # ---- forward -------------------------------------------------------------------------------

    def push(self, tangents: Tensor) -> Tensor:
        """(T, *source) → (T, *target)."""
        products = tangents.new_empty(len(tangents), *self.recorded.shape)
        buffers, done = Buffers(), 0
        for chunk in self._chunks(tangents):
            products[done : done + len(chunk)] = self._push(chunk, buffers)
            done += len(chunk)
        if self.function is None:
            return products
        with ALONE:
            return vmap(lambda tangent: jvp(self._of_recorded, (self.recorded,), (tangent,))[1])(products)

    def _push(self, tangents: Tensor, buffers: Buffers) -> Tensor:
        part = slice(self.first, self.length)
        start = self._placed(tangents, self.at[0], part)

        def hook(name: str, t: Tensor | None) -> Tensor | None:
            if name == self.run.source:
                t = start
            if name == self.run.target:
                stop(t)
            return t

        x: Tensor | None = None
        watched = {self.run.source, self.run.target}
        with Stop() as stop:
            for i, primal in self.primals.items():
                x = self._layer(i, primal, part, buffers).push(x, hook, watched)
            x = hook("final_resid", x)
        if stop.reached:
            x = stop.value
            if x is None:
                return tangents.new_zeros(len(tangents), *self.recorded.shape)
            return self._taken(x, self.at[1], part)
        assert self.final is not None and x is not None
        norm, head = self.final
        wanted = self._taken(norm.rows(part).jvp(x, x), self.at[1], part)
        return Dense(head.weight)(wanted)

    # ---- backward ------------------------------------------------------------------------------

    def pull(self, cotangents: Tensor) -> Tensor:
        """(T, *target) → (T, *source)."""
        if self.function is not None:
            back = vjp(self._of_recorded, self.recorded)[1]
            cotangents = vmap(lambda cotangent: back(cotangent)[0])(cotangents)
        products = cotangents.new_empty(len(cotangents), *self.source.shape)
        buffers, done = Buffers(), 0
        for chunk in self._chunks(cotangents):
            products[done : done + len(chunk)] = self._pull(chunk, buffers)
            done += len(chunk)
        return products

    def _pull(self, cotangents: Tensor, buffers: Buffers) -> Tensor:
        part = slice(0, self.stop)
        x: Tensor | None = None
        start: Tensor | None = None
        if self.run.target == "logits":
            assert self.final is not None
            norm, head = self.final
            rows = (cotangents.to(head.weight.dtype) @ head.weight).to(cotangents.dtype)
            x = norm.rows(part).vjp(self._placed(rows, self.at[1], part))
        else:
            start = self._placed(cotangents, self.at[1], part)

        def hook(name: str, u: Tensor | None) -> Tensor | None:
            if name == self.run.target:
                u = start
            if name == self.run.source:
                stop(u)
            return u

        with Stop() as stop:
            x = hook("final_resid", x)
            for i, primal in reversed(self.primals.items()):
                x = self._layer(i, primal, part, buffers).pull(x, hook)
        if stop.value is not None:
            return self._taken(stop.value, self.at[0], part)
        return cotangents.new_zeros(len(cotangents), *self.source.shape)

    # ---- both ways -----------------------------------------------------------------------------

    def _layer(self, i: int, primal: DensePrimal, part: slice, buffers: Buffers) -> DenseLayer:
        decoder = self.run.products
        return DenseLayer(decoder, i, decoder.layer(i), primal, self.places, part, buffers)

    def _placed(self, rows: Tensor, selected: Selected, part: slice) -> Tensor:
        """(T, B, chosen tokens, width), copied, as the tokens of ``part``."""
        count, batch, _, width = rows.shape
        full = rows.new_zeros(count, batch, part.stop - part.start, width)
        if selected is None:
            full.copy_(rows[:, :, part])
        else:
            full[:, :, [token - part.start for token in selected]] = rows
        return full

    def _taken(self, full: Tensor, selected: Selected, part: slice) -> Tensor:
        """The chosen tokens of those of ``part``; zero where a chosen token is not among them."""
        chosen = range(self.length) if selected is None else selected
        inside = [n for n, token in enumerate(chosen) if part.start <= token < part.stop]
        if len(inside) == len(chosen) == full.shape[2] and selected is None:
            return full
        taken = full.new_zeros(*full.shape[:2], len(chosen), full.shape[-1])
        taken[:, :, inside] = full[:, :, [chosen[n] - part.start for n in inside]]
        return taken
