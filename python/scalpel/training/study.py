"""A study of training: small models of bracket text in two arms, kept at several steps, five seeds an arm.

The arms are "topk" (the recipe's AbsTopK) and "dense" (none). Both arms of a seed begin with the same weights and see
the same text, and their matrices have the same density at every step, so a difference between them is AbsTopK's.
What is measured at a snapshot is the caller's. What was measured is kept in one file with all that it depends on: a
file of another plan, or of another version of the measure, is refused by name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .._files import replace_text, replacing
from .._json import plain
from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.corpus import Sources, interpreter_sources
from .bracket_mini import bracket_tokenizer
from .commit import commit
from .loop import train
from .recipe import Recipe
from .text import Batch, TextCourse, batches

__all__ = ["ARMS", "Plan", "StaleStudy", "Text", "compute", "held_out", "load", "models_at", "save", "train_all"]

ARMS: dict[str, dict[str, Any]] = {"topk": {}, "dense": {"afrac": None}}
HELD_OUT_SEED = 40_000  # texts are drawn from (seed, pool): no training seed is this one

# (models of both arms at one snapshot, steps done) → what is to be kept of them, plain data
Measure = Callable[[dict[str, CircuitGPT], int], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is trained: the recipe of the "topk" arm, the seeds, the steps at which models are kept, and how many
    batches of held-out text they are measured on."""

    recipe: Recipe = field(
        default_factory=lambda: Recipe(d_model=64, block_size=128, steps=1000, tokenizer_name="collapse-study")
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: tuple[int, ...] = (0, 16, 40, 80, 160, 320, 560, 1000)
    batches: int = 4

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds are {self.seeds}; give at least one, each once")
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] != 0 or self.steps[-1] != self.recipe.steps:
            raise ValueError(f"steps are {self.steps}; they must rise from 0 to the recipe's {self.recipe.steps}")
        if self.recipe.afrac is None:
            raise ValueError('the recipe has afrac=None; the arm "topk" needs a fraction')

    def of(self, arm: str, seed: int) -> Recipe:
        """The recipe of one model."""
        return replace(self.recipe, seed=seed, **ARMS[arm])

    def key(self, measure_version: int) -> dict[str, Any]:
        """Everything that decides what a file of this study holds; files with another key are stale."""
        content = {
            "recipe": self.recipe.to_dict(),
            "arms": ARMS,
            "seeds": self.seeds,
            "steps": self.steps,
            "batches": self.batches,
            "held_out_seed": HELD_OUT_SEED,
            "measure_version": measure_version,
        }
        key: dict[str, Any] = plain(content)
        return key


class StaleStudy(ValueError):
    """A stored study of another plan or another version of the measure, or a file that holds none."""


@dataclass(frozen=True)
class Text:
    """Where the text comes from, and its tokenizer."""

    sources: Sources
    tokenizer: Tokenizer

    @classmethod
    def of(cls, plan: Plan) -> "Text":
        """The running interpreter's library, about 15 seconds of parsing."""
        sources = interpreter_sources()
        return cls(sources, bracket_tokenizer(sources, plan.recipe.vocab_size))


def held_out(plan: Plan, text: Text) -> list[Batch]:
    """Text that no model of the study trained on, the same for all; drawn as the training text is."""
    recipe = replace(plan.recipe, seed=HELD_OUT_SEED)
    return list(islice(batches(recipe, text.sources, text.tokenizer), plan.batches))


def train_all(plan: Plan, text: Text, folder: Path, progress: Callable[[str, float], None] | None = None) -> None:
    """Train every model whose snapshots aren't in ``folder`` yet. A stop loses at most some seconds of one model."""
    runs = [(arm, seed) for seed in plan.seeds for arm in ARMS]
    for i, (arm, seed) in enumerate(runs):
        if all(_file(plan, folder, arm, seed, step).exists() for step in plan.steps):
            continue
        recipe = plan.of(arm, seed)
        state_file = folder / f"{arm}-{seed}-state.pt"

        def keep(step: int, model: CircuitGPT, arm: str = arm, seed: int = seed) -> None:
            path = _file(plan, folder, arm, seed, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                torch.save(model.state_dict(), temporary)

        def report(step: int, steps: int, loss: float, i: int = i, arm: str = arm, seed: int = seed) -> None:
            if progress is not None:
                progress(f"training {arm}, seed {seed}", (i + step / steps) / len(runs))

        train(recipe, TextCourse(recipe, text.sources, text.tokenizer), state_file, report, keep, plan.steps)
        state_file.unlink(missing_ok=True)


def models_at(plan: Plan, text: Text, folder: Path, seed: int, step: int) -> dict[str, CircuitGPT]:
    """Both arms of a seed as they were after ``step`` steps."""
    found = {}
    for arm in ARMS:
        recipe = plan.of(arm, seed)
        model = CircuitGPT(recipe.config(), seed=seed)
        weights = torch.load(_file(plan, folder, arm, seed, step), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        model.tokenizer = text.tokenizer
        model.card = {"name": f"{arm}, seed {seed}, {step} steps", "recipe": recipe.to_dict()}
        found[arm] = model.eval()
    return found


def compute(
    plan: Plan,
    text: Text,
    folder: Path,
    measure: Measure,
    measure_version: int,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Train what is missing in ``folder``, measure every snapshot, and return it all: ``key``, ``commit``,
    ``seeds`` {seed: {step: what was measured}}, plain data."""
    at = commit()  # now, since the source tree may move on while the models train
    report = progress or (lambda what, done: None)
    train_all(plan, text, folder, lambda what, done: report(what, 0.9 * done))
    found: dict[str, dict[str, Any]] = {}
    for i, (seed, step) in enumerate(_snapshots(plan)):
        report(f"measuring seed {seed} at step {step}", 0.9 + 0.1 * i / (len(plan.seeds) * len(plan.steps)))
        measured = plain(dict(measure(models_at(plan, text, folder, seed, step), step)))
        found.setdefault(str(seed), {})[str(step)] = measured
    return {"key": plan.key(measure_version), "commit": at, "torch": torch.__version__, "seeds": found}


def save(study: Mapping[str, Any], path: Path) -> None:
    """Write a study, whole or not at all."""
    replace_text(path, json.dumps(study, allow_nan=False, separators=(",", ":")) + "\n")


def load(path: Path, plan: Plan, measure_version: int) -> dict[str, Any]:
    """A stored study. StaleStudy, which names what differs, for another plan or measure, and for a bad file;
    FileNotFoundError."""
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored, wanted = dict(study["key"]), plan.key(measure_version)
        complete = all(set(map(str, plan.steps)) <= set(study["seeds"][str(seed)]) for seed in stored["seeds"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StaleStudy(f"{path} is no stored study ({error!r}); compute it anew with fresh=True") from error
    differ = [name for name in wanted if stored.get(name) != wanted[name]]
    if differ or not complete:
        what = f"another {', '.join(differ)}" if differ else "fewer snapshots"
        raise StaleStudy(f"{path.name} was stored for {what}; compute it anew with fresh=True")
    return study


def _snapshots(plan: Plan) -> Iterator[tuple[int, int]]:
    return ((seed, step) for seed in plan.seeds for step in plan.steps)


def _file(plan: Plan, folder: Path, arm: str, seed: int, step: int) -> Path:
    return folder / f"{arm}-{seed}" / f"{step}.pt"
