"""All experiments on one model."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..hooks.standing import stood_for
from ..models.circuitgpt.model import CircuitGPT
from ..tasks.held_out import NoHeldOutText
from . import Refused, names, run
from .controls import Controls
from .result import Result, plain

# Rough shares of the time, for the progress bar only.
_SHARES = {
    "minimal_simulator": 0.01,
    "dilution": 0.15,
    "distractors": 0.09,
    "agreement": 0.11,
    "causes": 0.09,
    "guard": 0.09,
    "machine": 0.11,
    "circuit": 0.04,
    "mapping": 0.07,
    "alignment": 0.04,
    "collapse": 0.06,
    "depth": 0.06,
    "composition": 0.02,
    "orbits": 0.06,
}
# A model that was trained on a machine can be asked only by these.
_OF_A_MACHINE = ("minimal_simulator", "machine")


@dataclass(frozen=True)
class Suite:
    """The results of all experiments on one model.

    Attributes:
        results: One for each experiment, in the order of the report.
        model: The model's card.
        seconds: How long all took.
        refused: The experiments that can't be run on this model, by name, with the reason.
    """

    results: list[Result]
    model: dict[str, Any]
    seconds: float
    refused: dict[str, str] = field(default_factory=dict)

    def to_json(self, indent: int | None = None) -> str:
        """The suite as JSON.

        Args:
            indent: As for ``json.dumps``.

        Returns:
            A JSON object with the fields of the suite. Infinities and NaN are written as null, since JSON has neither.

        Example:
            >>> from scalpel.report import Suite
            >>> Suite([], {"name": "bracket-mini"}, 0.5).to_json()
            '{"model": {"name": "bracket-mini"}, "seconds": 0.5, "refused": {}, "results": []}'
        """
        content = {
            "model": self.model,
            "seconds": self.seconds,
            "refused": self.refused,
            "results": [asdict(r) for r in self.results],
        }
        return json.dumps(plain(content), indent=indent, allow_nan=False)


def run_suite(
    model: CircuitGPT | str | Path = "bracket-mini",
    *,
    fresh: bool = False,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Suite:
    """Run every experiment on a model.

    A model that was trained on a machine is put to those experiments that it can answer. An experiment that a model
    can't be put to, because it has no tokenizer, splits the answers into several tokens or has too short a context, is
    refused with the reason, and the others are run.

    Args:
        model: A model, or what ``CircuitGPT.from_pretrained`` takes.
        fresh: Measure the accuracy on real library sources, search for the circuit and train the small models of the
            study of collapse again, instead of reading what is stored.
        seed: The seed of all random choices.
        progress: Called with (what, done) before each part and at the end; ``done`` rises from 0 to 1.

    Returns:
        The results, and the reasons of what was refused.

    Raises:
        Exception: Any error of an experiment but :class:`scalpel.experiments.Refused`, with a note of its name.
    """
    begun = time.monotonic()
    report = progress or (lambda what, done: None)
    report("loading the model", 0.0)
    model = stood_for(model)
    loaded = model if isinstance(model, CircuitGPT) else CircuitGPT.from_pretrained(str(model))
    card = dict(loaded.card)
    if fresh or "accuracy" not in card:
        report("asking prompts from real library sources", 0.0)
        card["accuracy"] = _accuracy(loaded)
    controls = Controls.of(loaded)
    chosen = _OF_A_MACHINE if "machine" in card else tuple(names())
    results: list[Result] = []
    refused: dict[str, str] = {}
    done = 0.0
    for name in chosen:
        report(name, done)
        options: dict[str, Any] = {"seed": seed}
        if name in ("dilution", "agreement"):
            options["controls"] = controls
        if name == "collapse":
            options["fresh"] = fresh
        try:
            if name == "circuit" and fresh:
                results.append(_fresh_circuit(loaded, seed, report, done))
            else:
                results.append(run(name, loaded, **options))
        except Refused as error:
            refused[name] = str(error)
        except Exception as error:
            error.add_note(f"in the experiment {name!r}")
            raise
        done += _SHARES.get(name, 0.0)
    report("done", 1.0)
    return Suite(results, card, time.monotonic() - begun, refused)


def _accuracy(model: CircuitGPT) -> dict[str, Any]:
    """The accuracy on held-out prompts, or why none can be asked."""
    from ..training.bracket_mini import accuracy_card

    try:
        return accuracy_card(model)
    except (Refused, NoHeldOutText) as error:
        return {"not_asked": str(error)}


def left_out(suite: Suite) -> list[str]:
    """The experiments that the model was refused, and what the others had to leave out, each with its reason, once."""
    refused = [f"{name.replace('_', ' ')}: {reason}" for name, reason in suite.refused.items()]
    notes = [note for result in suite.results for note in result.measured.get("left_out", [])]
    return list(dict.fromkeys(refused + notes))


def _fresh_circuit(model: CircuitGPT, seed: int, report: Callable[[str, float], None], done: float) -> Result:
    from ..circuits import prune
    from .machine.circuit import examine

    return examine(model, prune(model, seed=seed, progress=lambda what, _: report(f"circuit: {what}", done)), seed=seed)
