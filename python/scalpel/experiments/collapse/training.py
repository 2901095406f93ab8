"""Collapse over training: what is kept of each snapshot of the study, and the differences in differences over training.

The claim is about what AbsTopK adds to training. So the figure is (topk end - topk start) - (other end - other start),
taken hook by hook, averaged over hooks, and given a t interval over seeds. The seed is the unit, since the hooks and
tokens of one seed are not independent of each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...training.study import Plan
from ...training.text import Batch
from ..statistics import mean_interval
from .gather import Texts, gather, masked_afterwards, shuffled, topk_hooks
from .generators import LETTERS, acting, appeared
from .measure import PRIMARY, VARIANTS, Measured, compare

__all__ = ["CONTROLS", "FILE", "PLAN", "Difference", "Study", "measure_snapshot"]

FILE = Path(__file__).parents[2] / "data" / "collapse-study.json"
PLAN = Plan()
CONTROLS = ("dense", "afterwards", "shuffled")
_FIELDS = ("top1", "top3", "effective_rank", "equal_rank", "area", "reverse_area")
_DIGITS = 4


@dataclass(frozen=True)
class Difference:
    """A difference in differences: its mean over seeds with the 95 % t interval, and the figure of each seed."""

    mean: float
    low: float
    high: float
    by_seed: list[float]

    @classmethod
    def over(cls, by_seed: np.ndarray) -> "Difference":
        """From one figure for each seed. With fewer than two seeds the interval is NaN."""
        known = by_seed[np.isfinite(by_seed)]
        if len(known) < 2:
            return cls(
                float(known.mean()) if len(known) else float("nan"), float("nan"), float("nan"), by_seed.tolist()
            )
        mean, low, high = (float(figure) for figure in mean_interval(known))
        return cls(mean, low, high, by_seed.tolist())

    def p(self) -> float:
        """p of a two-sided t test against no difference; 1 if there is nothing to test."""
        known = np.array([figure for figure in self.by_seed if np.isfinite(figure)])
        if len(known) < 2 or float(np.ptp(known)) == 0:
            return 1.0
        return float(stats.ttest_1samp(known, 0).pvalue)

    def words(self) -> str:
        """The mean with its interval, as part of a sentence."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def measure_snapshot(
    models: Mapping[str, CircuitGPT], step: int, *, batches: Sequence[Batch], last: int
) -> dict[str, Any]:
    """Measure both arms at one step: figures by condition, variant and hook, losses, and the generators.

    The conditions are "topk", "dense", "afterwards" (the dense arm with AbsTopK switched on) and "shuffled" (the topk
    arm with the supports of other tokens). At the step ``last``, untrained models of the arms' final density are
    measured as well.
    """
    texts = [Texts(batch.ids, batch.mask, batch.positions) for batch in batches]
    topk, dense = models["topk"], models["dense"]
    hooks = topk_hooks(topk)
    measured = {"topk": topk, "dense": dense, "afterwards": masked_afterwards(dense, topk)}
    if step == last:
        measured |= {f"untrained {name}": untrained(model) for name, model in models.items()}
    gathered = {name: gather(model, texts, hooks) for name, model in measured.items()}
    conditions = {name: at_hooks.rows for name, at_hooks in gathered.items()}
    seed = int(topk.card["recipe"]["seed"])
    conditions["shuffled"] = shuffled(conditions["topk"], np.random.default_rng([seed, step]))
    by_condition = compare(conditions, seed)
    return {
        "hooks": hooks,
        "tokens": sum(int(batch.mask[:, 1:].sum()) for batch in texts),
        "loss": {name: _short(at_hooks.loss) for name, at_hooks in gathered.items()},
        "conditions": {name: _kept(name, by_hook) for name, by_hook in by_condition.items()},
        "generators": {
            name: {letter: asdict(acts) for letter, acts in acting(model).items()} for name, model in models.items()
        },
    }


def _kept(condition: str, by_hook: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, list[float | None]]]:
    """Lists over hooks, by variant and field. A list that equals another is left out; :func:`_place` finds that one."""
    kept: dict[str, dict[str, list[float | None]]] = {}
    for variant in VARIANTS:
        rows = [by_variant[variant] for by_variant in by_hook.values()]
        names = [name for name in _FIELDS if "area" not in name or ".trimmed." not in variant]
        names = [name for name in names if _place(condition, variant, name) == (condition, variant)]
        if names:
            kept[variant] = {name: [_short(getattr(row, name)) for row in rows] for name in names}
        if variant == "pre.raw.centered":
            kept[variant]["live"] = [row.live for row in rows]
    return kept


def _place(condition: str, variant: str, field: str) -> tuple[str, str]:
    """The (condition, variant) under which a figure is stored.

    Without a mask both gradients are the same, and shuffled supports don't change the gradient behind the mask.
    """
    if condition == "shuffled" and variant.startswith("post."):
        return "topk", variant
    if condition.endswith("dense") and variant.startswith("pre.") and field not in ("equal_rank", "live"):
        return condition, variant.replace("pre.", "post.", 1)
    return condition, variant


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


class Study:
    """A stored study, read by condition, variant and field."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.key, self.commit = content["key"], content["commit"]
        self.seeds = [str(seed) for seed in self.key["seeds"]]
        self.steps = [int(step) for step in self.key["steps"]]
        self._of: Mapping[str, Any] = content["seeds"]
        first = self._of[self.seeds[0]][str(self.steps[0])]
        self.hooks: list[str] = first["hooks"]
        self.tokens = int(first["tokens"])

    def values(self, condition: str, field: str, variant: str = PRIMARY, step: int | None = None) -> np.ndarray:
        """A field as (seeds, steps, hooks), or as (seeds, hooks) at one step; NaN if nothing was measured."""
        condition, variant = _place(condition, variant, field)
        if step is not None:
            rows = [self._of[s][str(step)]["conditions"][condition][variant][field] for s in self.seeds]
            return np.array(rows, dtype=float)
        return np.stack([self.values(condition, field, variant, at_step) for at_step in self.steps], axis=1)

    def loss(self, condition: str) -> np.ndarray:
        """The loss of a condition in nats, (seeds, steps)."""
        return np.array([[self._of[s][str(t)]["loss"][condition] for t in self.steps] for s in self.seeds], dtype=float)

    def difference(self, control: str, field: str = "equal_rank", variant: str = PRIMARY) -> Difference:
        """The change of the topk arm minus that of ``control``, from the first to the last step. Ranks are logarithms.

        The control "untrained" compares with the dense arm from another start: untrained models of the final density.
        """

        def at(condition: str, step: int) -> np.ndarray:
            value = self.values(condition, field, variant, step)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(value) if field.endswith("_rank") else value

        first, last = self.steps[0], self.steps[-1]
        if control == "untrained":
            both = (at("topk", last) - at("untrained topk", last)) - (at("dense", last) - at("untrained dense", last))
        else:
            both = (at("topk", last) - at("topk", first)) - (at(control, last) - at(control, first))
        return Difference.over(np.nanmean(both, axis=1))

    def at_the_end(self, control: str, field: str, variant: str = PRIMARY) -> Difference:
        """The topk arm's figure minus that of ``control`` at the last step, whatever they started from."""
        last = self.steps[-1]
        both = self.values("topk", field, variant, last) - self.values(control, field, variant, last)
        return Difference.over(np.nanmean(both, axis=1))

    def course(self, condition: str, field: str, variant: str = PRIMARY) -> np.ndarray:
        """(seeds, steps): the mean over hooks; of ranks the geometric mean."""
        values = self.values(condition, field, variant)
        mean = np.nanmean(np.log(values) if field.endswith("_rank") else values, axis=2)
        return np.exp(mean) if field.endswith("_rank") else mean

    def generators(self, arm: str, letter: str, what: str = "acts") -> np.ndarray:
        """(seeds, steps): the accuracy of one letter, "acts" or "after"."""
        rows = [[self._of[s][str(t)]["generators"][arm][letter][what] for t in self.steps] for s in self.seeds]
        return np.array(rows, dtype=float)

    def appeared(self, what: str = "acts") -> dict[str, dict[str, list[int | None]]]:
        """By arm and letter, the step from which each seed keeps the generator, or None."""
        return {
            arm: {
                letter: [appeared(self.steps, row) for row in self.generators(arm, letter, what)] for letter in LETTERS
            }
            for arm in ("topk", "dense")
        }


def band(by_seed: np.ndarray) -> dict[str, list[float]]:
    """The mean over seeds ("y") of a figure (seeds, steps) and its 95 % t interval ("low", "high"), over steps."""
    at_steps = [Difference.over(column) for column in by_seed.T]
    return {
        "y": [figure.mean for figure in at_steps],
        "low": [figure.low for figure in at_steps],
        "high": [figure.high for figure in at_steps],
    }
