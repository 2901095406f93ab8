"""All experiments on one model, in the order of the report."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..models.circuitgpt import CircuitGPT
from . import names, run
from .controls import Controls
from .result import Result, plain

# Rough shares of the time, for the progress bar only.
_SHARES = {"minimal_simulator": 0.02, "dilution": 0.35, "distractors": 0.3, "agreement": 0.33}


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
    """Run every experiment on ``model``.

    ``fresh``: measure the accuracy on real library sources anew instead of reading it from the model's card.
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
    results, done = [], 0.0
    for name in names():
        report(name, done)
        options: dict[str, Any] = {"seed": seed}
        if name in ("dilution", "agreement"):
            options["controls"] = controls
        results.append(run(name, loaded, **options))
        done += _SHARES.get(name, 0.0)
    report("done", 1.0)
    return Suite(results, card, time.monotonic() - begun)
