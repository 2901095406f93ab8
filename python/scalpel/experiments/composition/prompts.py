"""The prompts of a model as the experiment pulls rows through them: as the model is, and with frozen attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ...jacobians.choosing import pass_between
from ...jacobians.passes import Pass
from ...jacobians.precision import without_gradients
from ...jacobians.rows.decoder_pass import DecoderPass
from ...jacobians.rows.sweep import DenseSweep
from ...jacobians.rows.trace import DenseTrace
from ...jacobians.sweep import Sweep, sweep_of
from ...jacobians.trace import has_rules, trace_of
from ...models.circuitgpt.model import CircuitGPT
from ...tasks.refused import Refused
from .asked import Asked
from .frozen import FrozenCircuitSweep, FrozenTrace, LinearTrace, mean_circuit_patterns, mean_patterns
from .transports import Prompt, SweptPrompt, hook_at

__all__ = ["Prompts"]

_BESIDE: dict[str, Any] = {"attention_mask": None, "position_ids": None}
_COPIES = 16


class Prompts(Sequence[Prompt]):
    """Prompts that are made when they are asked for, so that one or two primals are in memory at a time.

    Args:
        source: The model.
        texts: Token ids, (1, L) each, of equal length.
        skip_first: How many tokens at the beginning don't count; the last one doesn't, either.
        points: Where rows may be wanted or start.
        mode: "own" for the model as it is, "frozen" with attention of its mean weights over the texts, and "linear"
            with mean factors everywhere, for a decoder alone.
    """

    def __init__(
        self,
        source: Asked,
        texts: Sequence[Tensor],
        skip_first: int,
        points: Sequence[int],
        mode: str = "own",
    ) -> None:
        self._asked, self._texts = source, texts
        self._hooks = [hook_at(point, source.layers) for point in sorted(points)]
        self._tokens = slice(skip_first, texts[0].shape[1] - 1)
        self._patterns: Any = None
        self._linear: LinearTrace | None = None
        if mode == "own":
            return
        with without_gradients():
            if isinstance(source.model, CircuitGPT):
                self._patterns = mean_circuit_patterns(source.model, texts)
                return
            self._patterns = mean_patterns(self._whole())
            if mode == "linear":
                self._linear = LinearTrace(map(self._frozen, texts), self._tokens)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        ids = self._texts[index]
        sweep = self._of_circuit(ids) if isinstance(self._asked.model, CircuitGPT) else self._of_decoder(ids)
        positions = self._tokens.stop - self._tokens.start
        return SweptPrompt(sweep, self._asked.layers, positions, self._asked.width)

    def _pass(self, ids: Tensor, source: str, target: str) -> Pass:
        run = pass_between(self._asked.model, ids, _BESIDE, source, target)
        if not has_rules(run):
            raise Refused("the model has no rules, which this experiment needs: it has hooks on its modules")
        return run

    def _of_circuit(self, ids: Tensor) -> Callable[[Sequence[str]], Sweep]:
        def sweep(hooks: Sequence[str]) -> Sweep:
            if self._patterns is not None:
                return FrozenCircuitSweep(self._asked.model, ids, hooks, self._tokens, self._patterns, _COPIES)
            return sweep_of(self._pass(ids, hooks[0], hooks[-1]), hooks, self._tokens)

        return sweep

    def _of_decoder(self, ids: Tensor) -> Callable[[Sequence[str]], Sweep]:
        run = self._pass(ids, self._hooks[0], self._hooks[-1])
        assert isinstance(run, DecoderPass)
        with without_gradients():
            if self._linear is not None:
                trace: Any = self._linear
            else:
                trace = trace_of(run, self._hooks) if self._patterns is None else self._frozen(ids)
        assert isinstance(trace, DenseTrace)

        return lambda hooks: DenseSweep(run.products, trace, hooks[0], hooks[-1], self._tokens)

    def _frozen(self, ids: Tensor) -> FrozenTrace:
        run = self._pass(ids, self._hooks[0], self._hooks[-1])
        assert isinstance(run, DecoderPass)
        trace = FrozenTrace(run.decoder, run.text, self._hooks, self._patterns)
        trace.run()
        return trace

    def _whole(self) -> Iterator[DenseTrace]:
        """The primals of all texts through all layers, one at a time."""
        hooks = [hook_at(0, self._asked.layers), hook_at(self._asked.layers, self._asked.layers)]
        for ids in self._texts:
            trace = trace_of(self._pass(ids, *hooks), hooks)
            assert isinstance(trace, DenseTrace)
            yield trace
