"""One pass of tangents forward through a model that has rules, from several hooks of the residual stream to one target.

It is the transpose of :mod:`.sweep`: there cotangents of one target are seen at many hooks, here tangents start at many
hooks and meet at one target.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
from .rows.forward_sweep import DenseForwardSweep
from .rows.trace import DenseTrace
from .trace import trace_of

__all__ = ["ForwardSweep", "forward_sweep_of"]


class ForwardSweep(Protocol):
    """Tangents at some tokens of one text, from several hooks of the residual stream to a target.

    Attributes:
        width: The width of the residual stream.
        dtype: The dtype of tangents.
        device: Their device.
        block: How many tangents should be given at a time, which bounds the memory.
    """

    width: int
    dtype: torch.dtype
    device: torch.device
    block: int

    def push(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Carry tangents {hook: (T, 1, tokens, width)} to the target: of the same shapes, at the same tokens."""


class _Guarded:
    """A pass of tangents that raises an error if the model has changed since the primal."""

    def __init__(self, run: Pass, inside: DenseForwardSweep | _CircuitForwardSweep) -> None:
        self._run, self._inside = run, inside
        self.width, self.dtype, self.device, self.block = inside.width, inside.dtype, inside.device, inside.block

    def push(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._run.check_unchanged()
        with without_gradients(), explained(self._run):
            return self._inside.push(tangents)


class _CircuitForwardSweep:
    """The pass of a CircuitGPT, sixteen tangents at a time, those of each hook by themselves."""

    def __init__(self, run: CircuitPass, trace: CircuitTrace, tokens: slice) -> None:
        self._run, self._trace = run, trace
        self._tokens = tuple(range(tokens.start, tokens.stop))
        value = trace.values[run.target]
        self.width, self.dtype, self.device = trace.config.d_model, value.dtype, value.device
        self.block = max(16, (1 << 27) // (len(self._tokens) * self.width * value.element_size()))

    def push(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pushed = {}
        for hook, rows in tangents.items():
            run = copy.copy(self._run)
            run.source = hook
            pushed[hook] = CircuitProducts(run, (self._tokens, self._tokens), None, self._trace).push(rows)
        return pushed


def forward_sweep_of(run: Pass, hooks: Sequence[str], tokens: slice) -> ForwardSweep:
    """Run the model of a pass that has rules, one text, and give its pass of tangents from ``hooks`` at ``tokens``.

    ``hooks`` are values of the residual stream in the model's order, from the source of the pass to its target.

    Raises:
        ValueError: Where the primal holds NaN.
    """
    with without_gradients():
        trace = trace_of(run, list(dict.fromkeys(hooks)))
        for hook in (run.source, run.target):
            check_numbers(trace.values[hook], hook)
        if isinstance(run, DecoderPass):
            assert isinstance(trace, DenseTrace)
            return _Guarded(run, DenseForwardSweep(run.products, trace, run.source, run.target, tokens))
        assert isinstance(run, CircuitPass) and isinstance(trace, CircuitTrace)
        return _Guarded(run, _CircuitForwardSweep(run, trace, tokens))
