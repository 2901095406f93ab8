"""One sweep of cotangents back through a model that has rules, seen at several hooks of the residual stream.

A product J.vjp goes from one hook to one other. A sweep passes many hooks, and what it carries is seen at each of them,
so the Jacobians of one target with respect to all layers cost as much as that with respect to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .ends import check_numbers
from .errors import explained
from .lanes.products import CircuitProducts
from .lanes.trace import CircuitTrace
from .passes import CircuitPass, Pass
from .precision import without_gradients
from .rows.decoder_pass import DecoderPass
from .rows.sweep import DenseSweep
from .rows.trace import DenseTrace
from .trace import trace_of

__all__ = ["Seen", "Sweep", "sweep_of"]

Seen = Callable[[str, Tensor, int], None]  # (hook, cotangents there, which of the T the first of them is)


class Sweep(Protocol):
    """Cotangents at some tokens of one text, from a target back through several hooks of the residual stream.

    Attributes:
        width: The width of the residual stream.
        dtype: The dtype of cotangents.
        device: Their device.
        block: How many cotangents should be given at a time, which bounds the memory.
    """

    width: int
    dtype: torch.dtype
    device: torch.device
    block: int

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        """Carry cotangents (T, 1, tokens, width) back, which may be overwritten.

        ``see`` is called at every hook on the way, the target and the source included, once or with some of the
        cotangents at a time, (t, 1, tokens, width). What it is given holds until it returns.
        """


class _Guarded:
    """A sweep that raises an error if the model has changed since the primal."""

    def __init__(self, run: Pass, inside: DenseSweep | _CircuitSweep) -> None:
        self._run, self._inside = run, inside
        self.width, self.dtype, self.device, self.block = inside.width, inside.dtype, inside.device, inside.block

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        self._run.check_unchanged()
        with without_gradients(), explained(self._run):
            self._inside.pull(cotangents, see)


class _CircuitSweep:
    """The sweep of a CircuitGPT, sixteen cotangents at a time."""

    def __init__(self, run: CircuitPass, trace: CircuitTrace, hooks: Sequence[str], tokens: slice) -> None:
        chosen = tuple(range(tokens.start, tokens.stop))
        self._products = CircuitProducts(run, (chosen, chosen), None, trace)
        self._hooks = hooks
        self.width = trace.config.d_model
        self.dtype, self.device = self._products.source.dtype, self._products.source.device
        self.block = max(16, (1 << 27) // (len(chosen) * self.width * self._products.source.element_size()))

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        self._products.pull_past(cotangents, self._hooks, see)


def sweep_of(run: Pass, hooks: Sequence[str], tokens: slice, relevance: bool = False) -> Sweep:
    """Run the model of a pass that has rules, one text, and give its sweep over ``hooks`` at ``tokens``.

    ``hooks`` are values of the residual stream in the model's order, from the source of the pass to its target.

    ``tokens`` are all that is carried, and nothing is missed if the cotangents at the target are zero outside them: the
    value at a token moves itself and later tokens alone, so what arrives at token t, at any hook, is a sum over the
    cotangents at tokens t' ≥ t of the hook behind it. By induction from the target, what is at a token after the last
    of ``tokens`` is zero at every hook; and what arrives at one of ``tokens`` never comes from a token before the first
    of them, so it doesn't matter what is there.

    With ``relevance`` cotangents go back by the rules of the relevance lens; see
    :mod:`scalpel.jacobian_lens.sweeps.sweep`.

    Raises:
        ValueError: Where the primal holds NaN.
    """
    with without_gradients():
        trace = trace_of(run, list(dict.fromkeys(hooks)), relevance=relevance)
        for hook in (run.source, run.target):
            check_numbers(trace.values[hook], hook)
        if isinstance(run, DecoderPass):
            assert isinstance(trace, DenseTrace)
            return _Guarded(run, DenseSweep(run.products, trace, run.source, run.target, tokens))
        assert isinstance(run, CircuitPass) and isinstance(trace, CircuitTrace)
        return _Guarded(run, _CircuitSweep(run, trace, hooks, tokens))
