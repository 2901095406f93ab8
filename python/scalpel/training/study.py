"""A study of training: small models of bracket text in two arms, kept at several steps, with five seeds for each arm.

The arms are "topk" (with the recipe's AbsTopK) and "dense" (without). Both arms of a seed begin with the same weights
and see the same text, and their matrices have the same density at every step, so any difference between them comes from
AbsTopK. The caller decides what is measured at a snapshot. The measurements are kept in one file with all that they
depend on; a file of another plan, or of another version of the measure, is refused with a message that says what
differs.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .._files import replace_text
from .._json import plain
from .._resume import Pieces, differences
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
HELD_OUT_SEED = 40_000  # texts are drawn from the seed, and no model is trained with this one

# (models of both arms at a snapshot, steps done) → the measurements, as plain data
Measure = Callable[[dict[str, CircuitGPT], int], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is trained and measured.

    Args:
        recipe: The recipe of the "topk" arm.
        seeds: The seeds of each arm.
        steps: The numbers of steps at which models are kept.
        batches: How many batches of held-out text the models are measured on.
    """

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
        """Return the recipe of a model."""
        return replace(self.recipe, seed=seed, **ARMS[arm])

    def key(self, measure_version: int) -> dict[str, Any]:
        """Return everything that decides what a file of this study holds; files with another key are stale."""
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
    """A stored study has another plan or another version of the measure, or the file holds no study."""


@dataclass(frozen=True)
class Text:
    """The sources of the text, and its tokenizer."""

    sources: Sources
    tokenizer: Tokenizer

    @classmethod
    def of(cls, plan: Plan) -> "Text":
        """Read the running interpreter's library, in about 15 seconds."""
        sources = interpreter_sources()
        return cls(sources, bracket_tokenizer(sources, plan.recipe.vocab_size))


def held_out(plan: Plan, text: Text) -> list[Batch]:
    """Draw text, in the way of the training text, that no model of the study was trained on; it is the same for all."""
    recipe = replace(plan.recipe, seed=HELD_OUT_SEED)
    return list(islice(batches(recipe, text.sources, text.tokenizer), plan.batches))


def train_all(plan: Plan, text: Text, folder: Path, progress: Callable[[str, float], None] | None = None) -> None:
    """Train every model whose snapshots aren't in ``folder`` yet. A stop loses at most some seconds of work."""
    runs = [(arm, seed) for seed in plan.seeds for arm in ARMS]
    snapshots = Pieces(folder)
    for i, (arm, seed) in enumerate(runs):
        if all(snapshots.path(_name(arm, seed, step)).exists() for step in plan.steps):
            continue
        recipe = plan.of(arm, seed)
        state_file = folder / f"{arm}-{seed}-state.pt"

        def keep(step: int, model: CircuitGPT, arm: str = arm, seed: int = seed) -> None:
            with snapshots.writing(_name(arm, seed, step)) as temporary:
                torch.save(model.state_dict(), temporary)

        def report(step: int, steps: int, loss: float, i: int = i, arm: str = arm, seed: int = seed) -> None:
            if progress is not None:
                progress(f"training {arm}, seed {seed}", (i + step / steps) / len(runs))

        train(recipe, TextCourse(recipe, text.sources, text.tokenizer), state_file, report, keep, plan.steps)
        state_file.unlink(missing_ok=True)


def models_at(plan: Plan, text: Text, folder: Path, seed: int, step: int) -> dict[str, CircuitGPT]:
    """Load both arms of a seed as they were after ``step`` steps."""
    models = {}
    for arm in ARMS:
        recipe = plan.of(arm, seed)
        model = CircuitGPT(recipe.config(), seed=seed)
        weights = torch.load(folder / _name(arm, seed, step), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        model.tokenizer = text.tokenizer
        model.card = {"name": f"{arm}, seed {seed}, {step} steps", "recipe": recipe.to_dict()}
        models[arm] = model.eval()
    return models


def compute(
    plan: Plan,
    text: Text,
    folder: Path,
    measure: Measure,
    measure_version: int,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Train what is missing in ``folder``, and measure every snapshot.

    Returns:
        Plain data: ``key``, ``commit``, ``torch``, and ``seeds`` as {seed: {step: measurements}}.
    """
    at = commit()  # now, because the source tree may change while the models train
    report = progress or (lambda what, done: None)
    train_all(plan, text, folder, lambda what, done: report(what, 0.9 * done))
    by_seed: dict[str, dict[str, Any]] = {}
    for i, (seed, step) in enumerate(_snapshots(plan)):
        report(f"measuring seed {seed} at step {step}", 0.9 + 0.1 * i / (len(plan.seeds) * len(plan.steps)))
        measured = plain(dict(measure(models_at(plan, text, folder, seed, step), step)))
        by_seed.setdefault(str(seed), {})[str(step)] = measured
    return {"key": plan.key(measure_version), "commit": at, "torch": torch.__version__, "seeds": by_seed}


def save(study: Mapping[str, Any], path: Path) -> None:
    """Write a study to a file, completely or not at all."""
    replace_text(path, json.dumps(study, allow_nan=False, separators=(",", ":")) + "\n")


def load(path: Path, plan: Plan, measure_version: int) -> dict[str, Any]:
    """Load a stored study.

    Raises:
        StaleStudy: For another plan or measure, with what differs, and for a file that holds no study.
        FileNotFoundError: If there is no such file.
    """
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored, wanted = dict(study["key"]), plan.key(measure_version)
        complete = all(set(map(str, plan.steps)) <= set(study["seeds"][str(seed)]) for seed in stored["seeds"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StaleStudy(f"{path} is no stored study ({error!r}); compute it anew with fresh=True") from error
    stored = {name: stored.get(name) for name in wanted}
    if stored != wanted:
        raise StaleStudy(
            f"{path.name} holds another study ({differences(stored, wanted)}); compute it anew with fresh=True"
        )
    if not complete:
        raise StaleStudy(f"{path.name} lacks snapshots; compute it anew with fresh=True")
    return study


def _snapshots(plan: Plan) -> Iterator[tuple[int, int]]:
    return ((seed, step) for seed in plan.seeds for step in plan.steps)


def _name(arm: str, seed: int, step: int) -> str:
    """The file of a snapshot in the folder of a study."""
    return f"{arm}-{seed}/{step}.pt"
