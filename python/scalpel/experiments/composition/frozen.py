"""A model whose attention is frozen: its weights are the means over prompts of equal length, and don't move.

What is left of a layer's attention is a fixed causal mixing of values, so that only MLPs and norms depend on the
prompt. In a decoder these can be made linear, too: then nothing depends on the prompt, and all that keeps averages over
positions from composing are the edges of the window, where a position has fewer neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...hooks.names import PATTERN
from ...hooks.stopping import Stop
from ...jacobians.rows.attention import DenseAttention
from ...jacobians.rows.primal import DensePrimal, Text
from ...jacobians.rows.rules import DenseNorm
from ...jacobians.rows.trace import DenseTrace
from ...jacobians.sweep import Seen
from ...models.circuitgpt.model import CircuitGPT
from ...models.decoders.decoder import Decoder, DecoderLayer

__all__ = ["FrozenCircuitSweep", "FrozenTrace", "LinearTrace", "mean_circuit_patterns", "mean_patterns"]


# ---- decoders of transformers ----------------------------------------------------------------------------------


class FixedAttention:
    """Attention with given weights, which takes the place of :class:`DenseAttention` in a layer's primal.

    Args:
        weights: (heads, L, L), zero where a query may not read a key.
        v: (1, L, kv_heads, d).
    """

    def __init__(self, weights: Tensor, v: Tensor) -> None:
        self.weights = weights.unflatten(0, (v.shape[2], -1))  # (kv_heads, heads of the group, L, L)
        self.y = torch.einsum("kgij,bjkd->bikgd", self.weights, v).flatten(2, 3)

    def vjp(self, u: Tensor, first: int = 0, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`DenseAttention.vjp`; nothing arrives at queries and keys."""
        part = slice(first, first + u.shape[2])
        of_groups = u.unflatten(3, self.weights.shape[:2])
        dv = torch.einsum("kgij,tbikgd->tbjkd", self.weights[:, :, part, part], of_groups)
        return torch.zeros_like(u), torch.zeros_like(dv), dv


class FrozenTrace(DenseTrace):
    """The primal of a decoder whose attention has the weights ``patterns``, {layer: (heads, L, L)}."""

    def __init__(self, decoder: Decoder, text: Text, hooks: Sequence[str], patterns: Mapping[int, Tensor]) -> None:
        super().__init__(decoder, text, hooks)
        self._patterns = patterns
        self._fixed: FixedAttention | None = None

    def advance(self, i: int, layer: DecoderLayer, keep: bool) -> DensePrimal:
        primal = super().advance(i, layer, keep)
        primal.attention = cast(DenseAttention, self._fixed)
        return primal

    def _tap(self, name: str, value: Tensor) -> Tensor:
        number, _, place = name.partition(".")
        if place == "attn.v":
            v = value.unflatten(-1, (-1, self.decoder.config.head_dim))
            self._fixed = FixedAttention(self._patterns[int(number)], v)
        if place == "attn.y":
            assert self._fixed is not None
            value = self._fixed.y.flatten(-2)
        return super()._tap(name, value)


def mean_patterns(traces: Iterable[DenseTrace]) -> dict[int, Tensor]:
    """The attention weights of each layer, (heads, L, L), their mean over the texts of traces that were run."""
    total: dict[int, Tensor] = {}
    count = 0
    for trace in traces:
        count += 1
        for i, primal in trace.layers(trace.hooks[0], trace.hooks[-1]).items():
            weights = primal.attention.pattern(None).weights[0].flatten(1, 2).transpose(0, 1)  # (heads, L, L)
            total[i] = total[i] + weights if i in total else weights
    return {i: weights / count for i, weights in total.items()}


class LinearTrace(DenseTrace):
    """The primal of a linear model: attention has fixed weights, and every other factor is its mean.

    Norms have their mean rate and direction, and neurons their mean slope, over the counted tokens of all texts.

    Args:
        traces: The primals of the texts, as they are in the model with frozen attention, cut at the same hooks.
        tokens: The tokens that count.
    """

    def __init__(self, traces: Iterable[FrozenTrace], tokens: slice) -> None:
        totals: dict[int, dict[str, Tensor]] = {}
        count = 0
        for trace in traces:
            count += 1
            last = trace
            for i, primal in trace.layers(trace.hooks[0], trace.hooks[-1]).items():
                if not hasattr(primal, "slope"):
                    continue  # the layer behind the last hook
                values = {"norm1": primal.norm1.rate, "norm2": primal.norm2.rate, "slope": primal.slope}
                values |= {"normed1": primal.norm1.normed, "normed2": primal.norm2.normed}
                if primal.opened is not None:
                    values["opened"] = primal.opened
                total = totals.setdefault(i, {})
                for name, value in values.items():
                    mean = value[:, tokens].mean(1, keepdim=True)
                    total[name] = total[name] + mean if name in total else mean
        self.decoder, self.hooks, self.values = last.decoder, last.hooks, last.values
        self.places, self.neurons = last.places, last.neurons
        length = last.resid.shape[1]
        self._primals = {}
        for i, sums in totals.items():
            own = last.layers(last.hooks[0], last.hooks[-1])[i]
            means = {name: (value / count).expand(-1, length, -1) for name, value in sums.items()}
            linear = self._primals[i] = DensePrimal()
            linear.norm1, linear.norm2 = (
                DenseNorm(means[f"normed{place}"], means[f"norm{place}"], norm.gain, None, norm.centered)
                for place, norm in ((1, own.norm1), (2, own.norm2))
            )
            linear.slope, linear.opened = means["slope"], means.get("opened")
            linear.q_norm = linear.k_norm = None
            linear.attention = own.attention


# ---- CircuitGPT ------------------------------------------------------------------------------------------------


def mean_circuit_patterns(model: CircuitGPT, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The attention weights of each layer as their hook shows them, (1, L, heads * L), their mean over texts (1, L)."""
    names = [f"{i}.{PATTERN}" for i in range(model.config.n_layer)]
    with torch.no_grad():
        _, values = model.run_with_cache(torch.cat(list(texts)), names)
    return {name: values[name].mean(0, keepdim=True) for name in names}


class FrozenCircuitSweep:
    """The sweep of a CircuitGPT with frozen attention, by autograd on copies of the text.

    Args:
        model: The model.
        ids: (1, L).
        hooks: Hooks of the residual stream, in the model's order; cotangents start at the last.
        tokens: The positions that count.
        patterns: The weights that each layer's attention has.
        copies: How many cotangents are carried at a time.
    """

    def __init__(
        self,
        model: CircuitGPT,
        ids: Tensor,
        hooks: Sequence[str],
        tokens: slice,
        patterns: Mapping[str, Tensor],
        copies: int,
    ) -> None:
        self._hooks, self._tokens, self.block = hooks, tokens, copies
        self._met: dict[str, Tensor] = {}
        with Stop() as stop, torch.enable_grad():
            model(ids.expand(copies, -1), tap=self._tap(patterns, stop), patterns=set(patterns))
        self.width, self.dtype, self.device = model.config.d_model, model.dtype, model.device

    def _tap(self, patterns: Mapping[str, Tensor], stop: Any) -> Callable[[str, Tensor], Tensor]:
        def tap(name: str, value: Tensor) -> Tensor:
            if name in patterns:
                return patterns[name].expand_as(value)
            if name in self._hooks:
                value = value if self._met else value.detach().requires_grad_()
                self._met[name] = value
                if name == self._hooks[-1]:
                    stop(value)
            return value

        return tap

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        """Carry cotangents (T, 1, tokens, width) back, as :class:`scalpel.jacobians.sweep.Sweep` says."""
        end = self._met[self._hooks[-1]]
        see(self._hooks[-1], cotangents, 0)
        values = [self._met[hook] for hook in self._hooks[:-1]]
        for number, chunk in enumerate(cotangents.split(self.block)):
            full = torch.zeros_like(end)
            full[: len(chunk), self._tokens] = chunk[:, 0]
            with torch.enable_grad():
                gradients = torch.autograd.grad(end, values, full, retain_graph=True)
            for hook, gradient in zip(self._hooks[:-1], gradients, strict=True):
                see(hook, gradient[: len(chunk), None, self._tokens], number * self.block)
