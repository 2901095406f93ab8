"""All experiments on one model, in the order of the report."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..models.circuitgpt import CircuitGPT
from . import names, run
from .controls import Controls
from .result import Result, plain

# Rough shares of the time, for the progress bar only.
_SHARES = {
    "minimal_simulator": 0.02,
    "dilution": 0.23,
    "distractors": 0.19,
    "agreement": 0.22,
    "machine": 0.26,
    "circuit": 0.08,
}
# Of a model that was trained on a machine, only these ask something that it could answer.
_OF_A_MACHINE = ("minimal_simulator", "machine")


@dataclass(frozen=True)
class Suite:
    """Every result, what is known of the model (its card), and the seconds it took."""

    results: list[Result]
    model: dict[str, Any]
    seconds: float

    def to_json(self, indent: int | None = None) -> str:
        """The suite as JSON."""
        content = {"model": self.model, "seconds": self.seconds, "results": [asdict(r) for r in self.results]}
        return json.dumps(plain(content), indent=indent, allow_nan=False)


def run_suite(
    model: CircuitGPT | str | Path = "bracket-mini",
    *,
    fresh: bool = False,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Suite:
    """Run every experiment on ``model``; of a model that was trained on a machine, those that it could answer.

    ``fresh``: measure the accuracy on real library sources, and search for the circuit, anew instead of reading them
    from the model's folder.
    ``progress(what, done)`` is called before each part, ``done`` from 0 to 1, and once at the end.
    """
    begun = time.monotonic()
    report = progress or (lambda what, done: None)
    report("loading the model", 0.0)
    loaded = model if isinstance(model, CircuitGPT) else CircuitGPT.from_pretrained(str(model))
    card = dict(loaded.card)
    if fresh or "accuracy" not in card:
        from ..training.bracket_mini import accuracy_card

        report("asking prompts from real library sources", 0.0)
        card["accuracy"] = accuracy_card(loaded)
    controls = Controls.of(loaded)
    chosen = _OF_A_MACHINE if "machine" in card else tuple(names())
    results, done = [], 0.0
    for name in chosen:
        report(name, done)
        if name == "circuit" and fresh:
            results.append(_fresh_circuit(loaded, seed, report, done))
            continue
        options: dict[str, Any] = {"seed": seed}
        if name in ("dilution", "agreement"):
            options["controls"] = controls
        results.append(run(name, loaded, **options))
        done += _SHARES.get(name, 0.0)
    report("done", 1.0)
    return Suite(results, card, time.monotonic() - begun)


def left_out(results: Sequence[Result]) -> list[str]:
    """What experiments had to leave out, and why, each said once."""
    return list(dict.fromkeys(note for result in results for note in result.measured.get("left_out", [])))


def _fresh_circuit(model: CircuitGPT, seed: int, report: Callable[[str, float], None], done: float) -> Result:
    from ..circuits import prune
    from .circuit import examine

    return examine(model, prune(model, seed=seed, progress=lambda what, _: report(f"circuit: {what}", done)), seed=seed)
