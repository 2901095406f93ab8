"""Products with the Jacobian of a CircuitGPT, through the native core: sixteen tangents at a time.

A tangent visits only what the TopKs of the primal keep on either side of a weight. ``push`` goes through the hooks in
the order of the model's forward pass, ``pull`` in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F

from ...hooks.names import PATTERN, is_pattern
from ...hooks.positions import Selected, read_at
from ...hooks.running import ALONE
from ...hooks.stopping import Stop
from ...lanes import LANES, Lanes, Linear
from ..ends import finished
from ..pattern import Pattern
from .trace import CircuitTrace, Function, Layer, Sublayer

if TYPE_CHECKING:
    from ..passes import CircuitPass


class CircuitProducts:
    """Products with the Jacobian between two hooks of a CircuitGPT, and the primal at both of them.

    Args:
        run: A pass of the model from the source hook to the target hook.
        at: The token positions that are selected at the source and at the target.
        function: A function of the value at the target, or None.
        trace: The primal, if it exists already and was cut at both hooks.
    """

    def __init__(
        self,
        run: CircuitPass,
        at: tuple[Selected, Selected],
        function: Function | None,
        trace: CircuitTrace,
    ) -> None:
        self.run = run
        self.at = at
        self.function = function
        self.model = trace.model
        self.config = trace.config
        self.layers = trace.layers(run.source, run.target)
        self.changed = trace.changed
        self.final = trace.final
        self.source = read_at(trace.values[run.source], at[0]).clone()
        self.recorded = read_at(trace.values[run.target], at[1])
        self.pattern: Pattern | None = None  # the weights of attention, where they are the target
        if is_pattern(run.target):
            assert trace.pattern is not None
            self.pattern = trace.pattern(at[1])
        self.batch, self.length = run.inputs[0].shape
        self.primal = self._of_recorded(self.recorded.clone()).clone()  # the function may work in place

    def _of_recorded(self, value: Tensor) -> Tensor:
        return finished(value, self.function, self.run.target, self.source.dtype)

    # ---- forward -------------------------------------------------------------------------------

    def push(self, tangents: Tensor) -> Tensor:
        """Multiply T tangents by the Jacobian: (T, *source) → (T, *target)."""
        rows = [self._push(chunk) for chunk in tangents.split(LANES)]
        pushed = _together(rows) if rows else tangents.new_zeros(0, *self.recorded.shape)
        if self.function is None:
            return pushed
        with ALONE:
            return vmap(lambda tangent: jvp(self._of_recorded, (self.recorded,), (tangent,))[1])(pushed)

    def _push(self, tangents: Tensor) -> Tensor:
        count = tangents.shape[0]
        start = self._placed(tangents, self.at[0], self.run.source)
        with Stop() as stop:
            resid = self._push_layers(start, count, stop)
        if stop.reached and isinstance(stop.value, Tensor):
            return stop.value  # tangents of attention weights, which never become lanes
        if stop.reached:
            lanes: Lanes | None = stop.value
            if lanes is None:
                return tangents.new_zeros(count, *self.recorded.shape)
            return self._taken(lanes, self.at[1], self.run.target, count)
        assert self.final is not None
        rows = self._taken(self.final.jvp(resid.resized(self.config.d_model), None), self.at[1], "logits", count)
        return F.linear(rows, self.model.lm_head.weight)

    def _push_layers(self, start: Lanes, count: int, stop: Stop) -> Lanes:
        def hook(name: str, lanes: Lanes | None) -> Lanes | None:
            if name in self.changed and lanes is not None:
                lanes = self._through(name, lanes, count, forward=True)
            if name == self.run.source:
                lanes = start
            if name == self.run.target:
                stop(lanes)
            return lanes

        resid: Lanes | None = None
        for layer in self.layers:
            at, attn, mlp = f"{layer.number}.", layer.attn, layer.mlp
            resid = hook(f"{at}resid_in", resid)
            read = self._read_of(resid, attn, "attn.act_in")
            read = hook(f"{at}attn.act_in", read)
            parts = {}
            for name in ("attn.k", "attn.q", "attn.v"):
                part = None if read is None else self._weight(layer, name).apply(read, attn.kept.get(name))
                parts[name] = hook(at + name, part)
            k, q, v = parts.values()
            if self.run.target == f"{at}{PATTERN}":
                stop(self._pushed_to_pattern(q, k, count))
            assert attn.attention is not None
            y = None if k is q is v is None else attn.attention.jvp(q, k, v)
            y = hook(f"{at}attn.y", y)
            delta = None if y is None else self._weight(layer, "attn.y").apply(y, attn.kept.get("attn.resid_delta"))
            delta = hook(f"{at}attn.resid_delta", delta)
            resid = hook(f"{at}resid_mid", self._joined(resid, delta, attn))
            read = self._read_of(resid, mlp, "mlp.act_in")
            read = hook(f"{at}mlp.act_in", read)
            neurons = None
            if read is not None:
                neurons = self._weight(layer, "mlp.act_in").apply(read, mlp.kept.get("mlp.post_act"), mlp.slope)
            neurons = hook(f"{at}mlp.post_act", neurons)
            weight = self._weight(layer, "mlp.post_act")
            delta = None if neurons is None else weight.apply(neurons, mlp.kept.get("mlp.resid_delta"))
            delta = hook(f"{at}mlp.resid_delta", delta)
            resid = self._joined(resid, delta, mlp)
        resid = hook("final_resid", resid)
        assert resid is not None  # it was checked before that a path leads here
        return resid

    def _pushed_to_pattern(self, q: Lanes | None, k: Lanes | None, count: int) -> Tensor | None:
        """Carry the tangents of q and k to the weights of attention at the chosen queries."""
        assert self.pattern is not None
        if q is None and k is None:
            return None
        dq = None if q is None else self._heads(q, count)
        dk = None if k is None else self._heads(k, count)
        return self.pattern.jvp(dq, dk)

    def _heads(self, lanes: Lanes, count: int) -> Tensor:
        """Convert lanes of q or k to (count, B, L, heads, d)."""
        return self._taken(lanes, None, "attn.q", count).unflatten(-1, (self.config.n_head, -1))

    def _read_of(self, resid: Lanes | None, of: Sublayer, name: str) -> Lanes | None:
        if resid is None:
            return None
        assert of.norm is not None
        return of.norm.jvp(resid, of.kept.get(name))

    def _joined(self, resid: Lanes | None, delta: Lanes | None, of: Sublayer) -> Lanes | None:
        if delta is not None:
            if resid is None:
                resid = Lanes.zeros(delta.values, self.config.d_in)
            resid.add(delta)
        return self._settle(resid, of)

    def _settle(self, resid: Lanes | None, of: Sublayer) -> Lanes | None:
        if resid is not None and of.residual is not None:
            resid.values[:, : of.residual.shape[1]] *= of.residual[..., None]
        return resid

    # ---- backward ------------------------------------------------------------------------------

    def pull(self, cotangents: Tensor) -> Tensor:
        """Multiply T cotangents by the transposed Jacobian: (T, *target) → (T, *source)."""
        if self.function is not None:
            back = vjp(self._of_recorded, self.recorded)[1]
            cotangents = vmap(lambda cotangent: back(cotangent)[0])(cotangents)
        rows = [self._pull(chunk) for chunk in cotangents.split(LANES)] if len(cotangents) else []
        return _together(rows) if rows else cotangents.new_zeros(0, *self.source.shape)

    def pull_past(self, cotangents: Tensor, hooks: Sequence[str], see: Callable[[str, Tensor, int], None]) -> None:
        """Carry T cotangents (T, *target) back to the source, which are seen at ``hooks`` of the residual stream.

        ``see(hook, rows, first)`` gets sixteen cotangents at a time, from number ``first`` on, at the positions of the
        source. After an intervention at a hook they are those of the value that it makes.
        """
        for number, chunk in enumerate(cotangents.split(LANES)):
            first, count = number * LANES, len(chunk)

            def passed(name: str, lanes: Lanes, first: int = first, count: int = count) -> None:
                if name in hooks:
                    see(name, self._taken(lanes, self.at[0], name, count), first)

            self._pull(chunk, passed)

    def _pull(self, cotangents: Tensor, passed: Callable[[str, Lanes], None] | None = None) -> Tensor:
        count = cotangents.shape[0]
        resid: Lanes | None = None
        start: Lanes | None = None
        heads: tuple[Lanes, Lanes] | None = None
        if self.pattern is not None:
            dq, dk = self.pattern.vjp(cotangents, self.length)
            heads = self._placed(dq.flatten(-2), None, "attn.q"), self._placed(dk.flatten(-2), None, "attn.k")
        elif self.run.target == "logits":
            assert self.final is not None
            rows = self._placed(cotangents @ self.model.lm_head.weight, self.at[1], "logits")
            resid = Lanes.zeros(rows.values, self.config.d_model)
            self.final.add_vjp(rows, resid)
            resid = resid.resized(self.config.d_in)
        else:
            start = self._placed(cotangents, self.at[1], self.run.target)
        with Stop() as stop:
            self._pull_layers(start, resid, heads, count, stop, passed)
        lanes: Lanes | None = stop.value
        if lanes is not None:
            return self._taken(lanes, self.at[0], self.run.source, count)
        return cotangents.new_zeros(count, *self.source.shape)

    def _pull_layers(
        self,
        start: Lanes | None,
        resid: Lanes | None,
        heads: tuple[Lanes, Lanes] | None,
        count: int,
        stop: Stop,
        passed: Callable[[str, Lanes], None] | None,
    ) -> None:
        """Go back from the target, of which one of ``start``, ``resid`` and ``heads`` is the cotangent.

        ``resid`` is the residual stream after the last layer, and ``heads`` are q and k of the last layer's weights of
        attention. ``passed`` is called at every hook that a cotangent reaches.
        """

        def hook(name: str, lanes: Lanes | None) -> Lanes | None:
            if name == self.run.target:
                lanes = start
            if passed is not None and lanes is not None:
                passed(name, lanes)
            if name == self.run.source:
                stop(lanes)
            if name in self.changed and lanes is not None:
                lanes = self._through(name, lanes, count, forward=False)
            return lanes

        def wanted(layer: Layer, of: Sublayer, name: str) -> Tensor | None:
            # The cotangent of the source is wanted at all channels, and an intervention may read any of them.
            here = f"{layer.number}.{name}"
            return None if here == self.run.source or here in self.changed else of.kept.get(name)

        resid = hook("final_resid", resid)
        for layer in reversed(self.layers):
            at, attn, mlp = f"{layer.number}.", layer.attn, layer.mlp
            resid, delta = self._split(resid, mlp, wanted(layer, mlp, "mlp.resid_delta"))
            delta = hook(f"{at}mlp.resid_delta", delta)
            neurons = self._back(layer, mlp, "mlp.post_act", delta, "mlp.resid_delta", wanted)
            neurons = hook(f"{at}mlp.post_act", neurons)
            if neurons is not None:
                neurons = neurons.restricted(mlp.kept.get("mlp.post_act"))
                assert mlp.slope is not None
                neurons = Lanes(neurons.values * mlp.slope[..., None], neurons.index, neurons.channels)
            read = self._back(layer, mlp, "mlp.act_in", neurons, "mlp.post_act", wanted)
            resid = self._unread(hook(f"{at}mlp.act_in", read), mlp, "mlp.act_in", resid)
            resid = hook(f"{at}resid_mid", resid)
            resid, delta = self._split(resid, attn, wanted(layer, attn, "attn.resid_delta"))
            delta = hook(f"{at}attn.resid_delta", delta)
            y = self._back(layer, attn, "attn.y", delta, "attn.resid_delta", lambda *_: None)
            y = hook(f"{at}attn.y", y)
            names = ("attn.q", "attn.k", "attn.v")
            parts: list[Lanes | None] = [None, None, None]
            if self.run.target == f"{at}{PATTERN}":
                assert heads is not None
                parts = [*heads, None]
            if y is not None:
                assert attn.attention is not None
                parts = list(attn.attention.vjp(y, *(wanted(layer, attn, name) for name in names)))
            reads = []
            for name, part in ((names[2], parts[2]), (names[0], parts[0]), (names[1], parts[1])):
                part = hook(at + name, part)
                reads.append(self._back(layer, attn, "attn.act_in", part, name, wanted))
            read = None
            for part in reads:
                if read is not None and part is not None:
                    read.values += part.values
                else:
                    read = read if part is None else part
            resid = self._unread(hook(f"{at}attn.act_in", read), attn, "attn.act_in", resid)
            resid = hook(f"{at}resid_in", resid)

    def _split(self, resid: Lanes | None, of: Sublayer, index: Tensor | None) -> tuple[Lanes | None, Lanes | None]:
        """Get the cotangents of the residual before a sublayer and of its delta from the cotangent of their sum."""
        resid = self._settle(resid, of)
        if resid is None:
            return None, None
        if index is not None:
            return resid, Lanes(resid.at(index).values, index, self.config.d_model)
        narrow = resid.resized(self.config.d_model)
        return resid, Lanes(narrow.values.clone(), None, self.config.d_model)

    def _back(
        self, layer: Layer, of: Sublayer, to: str, lanes: Lanes | None, name: str, wanted: Callable[..., Any]
    ) -> Lanes | None:
        """Go back through the weight that leads from the hook ``to`` to the hook ``name``."""
        if lanes is None:
            return None
        lanes = lanes.restricted(of.kept.get(name))
        return self._weight(layer, name if to == "attn.act_in" else to, True).apply(lanes, wanted(layer, of, to))

    def _unread(self, read: Lanes | None, of: Sublayer, name: str, resid: Lanes | None) -> Lanes | None:
        if read is None:
            return resid
        if resid is None:
            resid = Lanes.zeros(read.values, self.config.d_in)
        assert of.norm is not None
        of.norm.add_vjp(read.restricted(of.kept.get(name)), resid)
        return resid

    # ---- both ways -----------------------------------------------------------------------------

    def _weight(self, layer: Layer, name: str, transposed: bool = False) -> Linear:
        """Get the weight that makes q, k or v, or, for any other hook, the weight that reads it."""
        block = layer.block
        if name in ("attn.q", "attn.k", "attn.v"):
            first = ("attn.q", "attn.k", "attn.v").index(name) * self.config.d_attn
            return Linear(block.attn.c_attn, slice(first, first + self.config.d_attn), transposed)
        module = {"attn.y": block.attn.c_proj, "mlp.act_in": block.mlp.c_fc, "mlp.post_act": block.mlp.c_proj}[name]
        return Linear(module, None, transposed)

    def _through(self, name: str, lanes: Lanes, count: int, forward: bool) -> Lanes:
        """Apply the derivative of an intervention, which torch.func takes of it as a function of the value."""
        function, value = self.changed[name]
        rows = self._taken(lanes, None, name, count)
        if forward:
            with ALONE:
                moved = vmap(lambda row: jvp(function, (value,), (row,))[1])(rows)
        else:
            back = vjp(function, value)[1]
            moved = vmap(lambda row: back(row)[0])(rows)
        return self._placed(moved, None, name)

    def _placed(self, rows: Tensor, selected: Selected, name: str) -> Lanes:
        """Convert (T, B, selected tokens, width) to lanes of all tokens."""
        if selected is not None:
            full = rows.new_zeros(rows.shape[0], self.batch, self.length, rows.shape[-1])
            full[:, :, list(selected)] = rows
            rows = full
        lanes = Lanes.from_rows(rows.reshape(rows.shape[0], -1, rows.shape[-1]))
        return lanes.resized(self.config.d_in) if _of_residual(name) else lanes

    def _taken(self, lanes: Lanes, selected: Selected, name: str, count: int) -> Tensor:
        """Convert lanes of all tokens to (count, B, selected tokens, width)."""
        tokens = None
        if selected is not None:
            numbers = torch.arange(self.batch * self.length, device=lanes.values.device).view(self.batch, self.length)
            tokens = numbers[:, list(selected)].flatten()
        if _of_residual(name):
            lanes = lanes.resized(self.config.d_model)
        rows = lanes.rows(count, tokens)
        return rows.view(count, self.batch, -1, rows.shape[-1])


def _together(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _of_residual(name: str) -> bool:
    """Whether a hook is on the residual stream itself, whose lanes have extra channels for concatenated positions."""
    return name.endswith(("resid_in", "resid_mid")) or name == "final_resid"
