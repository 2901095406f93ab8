"""Products with the Jacobian of a dense decoder, in which T tangents are rows of the same matrix products.

The primal runs once. Tangents are zero before the first source token, and not needed after the last target token.
Cotangents are zero after the last target token, and those before the first source token reach no source, since
attention is causal. Those tokens are left out. Tangents are processed in chunks, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.func import jvp, vjp, vmap

from ...hooks.names import is_pattern
from ...hooks.positions import Selected, read_at
from ...hooks.running import ALONE
from ...hooks.stopping import Stop
from ...models.decoders.decoder import Dense
from ..ends import finished
from ..pattern import Pattern
from .layer import Buffers, DenseLayer
from .primal import DensePrimal
from .trace import DenseTrace

if TYPE_CHECKING:
    from .decoder_pass import DecoderPass

Function = Callable[[Tensor], Tensor]

_CHUNK_BYTES = 1 << 28  # the largest size of a buffer that a chunk of tangents needs


class DenseProducts:
    """Products with the Jacobian between two hooks of a decoder, and the values of the primal at both hooks."""

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
        self.pattern: Pattern | None = None  # the weights of attention, where they are the target
        if is_pattern(run.target):
            self.pattern = self.primals[max(self.primals)].attention.pattern(at[1])
            self.recorded = self.pattern.value
        else:
            self.recorded = read_at(trace.values[run.target], at[1]).clone()
        self.primal = self._of_recorded(self.recorded.clone()).clone()  # cloned, since the function may work in place

    def _of_recorded(self, value: Tensor) -> Tensor:
        """The target at a value of its hook: the function applied to it, where there is one."""
        return finished(value, self.function, self.run.target, self.run.dtype)

    def _chunks(self, tangents: Tensor) -> tuple[Tensor, ...]:
        """Split the tangents into chunks whose buffers keep to ``_CHUNK_BYTES``; a chunk has at least one tangent."""
        widest = max(3 * self.config.heads * self.config.head_dim, self.neurons)
        numbers = self.batch * self.length * widest
        if self.pattern is not None:
            numbers = max(numbers, self.pattern.weights.numel())
        return tangents.split(max(1, _CHUNK_BYTES // (numbers * self.source.element_size())))

    # ---- forward -------------------------------------------------------------------------------

    def push(self, tangents: Tensor) -> Tensor:
        """Carry tangents (T, *source) forward to the target, (T, *target)."""
        products = tangents.new_empty(len(tangents), *self.recorded.shape)
        buffers, filled = Buffers(), 0
        for chunk in self._chunks(tangents):
            products[filled : filled + len(chunk)] = self._push(chunk, buffers)
            filled += len(chunk)
        if self.function is None:
            return products
        with ALONE:
            return vmap(lambda tangent: jvp(self._of_recorded, (self.recorded,), (tangent,))[1])(products)

    def _push(self, tangents: Tensor, buffers: Buffers) -> Tensor:
        part = slice(self.first, self.length)
        at_source = self._placed(tangents, self.at[0], part)

        def hook(name: str, t: Tensor | None) -> Tensor | None:
            if name == self.run.source:
                t = at_source
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
            return x if self.pattern is not None else self._taken(x, self.at[1], part)
        assert self.final is not None and x is not None
        norm, head = self.final
        at_target = self._taken(norm.rows(part).jvp(x, x), self.at[1], part)
        return Dense(head.weight)(at_target)

    # ---- backward ------------------------------------------------------------------------------

    def pull(self, cotangents: Tensor) -> Tensor:
        """Carry cotangents (T, *target) back to the source, (T, *source)."""
        if self.function is not None:
            back = vjp(self._of_recorded, self.recorded)[1]
            cotangents = vmap(lambda cotangent: back(cotangent)[0])(cotangents)
        products = cotangents.new_empty(len(cotangents), *self.source.shape)
        buffers, filled = Buffers(), 0
        for chunk in self._chunks(cotangents):
            products[filled : filled + len(chunk)] = self._pull(chunk, buffers)
            filled += len(chunk)
        return products

    def _pull(self, cotangents: Tensor, buffers: Buffers) -> Tensor:
        part = slice(self.first, self.stop)
        x: Tensor | None = None
        at_target: Tensor | None = None
        if self.run.target == "logits":
            assert self.final is not None
            norm, head = self.final
            rows = (cotangents.to(head.weight.dtype) @ head.weight).to(cotangents.dtype)
            x = norm.rows(part).vjp(self._placed(rows, self.at[1], part))
        else:
            at_target = cotangents if self.pattern is not None else self._placed(cotangents, self.at[1], part)

        def hook(name: str, u: Tensor | None) -> Tensor | None:
            if name == self.run.target:
                u = at_target
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
        pattern = self.pattern if i == max(self.primals) else None
        return DenseLayer(decoder, i, decoder.layer(i), primal, self.places, part, buffers, pattern)

    def _placed(self, rows: Tensor, selected: Selected, part: slice) -> Tensor:
        """Place ``rows``, (T, B, selected tokens, width), among the tokens of ``part``, which are zero elsewhere.

        Rows of selected tokens outside ``part`` are left out.
        """
        count, batch, _, width = rows.shape
        full = rows.new_zeros(count, batch, part.stop - part.start, width)
        if selected is None:
            full.copy_(rows[:, :, part])
        else:
            inside = [place for place, token in enumerate(selected) if part.start <= token < part.stop]
            full[:, :, [selected[place] - part.start for place in inside]] = rows[:, :, inside]
        return full

    def _taken(self, full: Tensor, selected: Selected, part: slice) -> Tensor:
        """Read the selected tokens from ``full``, which has the tokens of ``part``; others are read as zero."""
        tokens = range(self.length) if selected is None else selected
        available = [place for place, token in enumerate(tokens) if part.start <= token < part.stop]
        if len(available) == len(tokens) == full.shape[2] and selected is None:
            return full
        taken = full.new_zeros(*full.shape[:2], len(tokens), full.shape[-1])
        taken[:, :, available] = full[:, :, [tokens[place] - part.start for place in available]]
        return taken
