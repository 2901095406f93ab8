"""Collapse over training: what is kept of each snapshot of the study, and the differences in differences over it.

The claim is about what AbsTopK adds to training, so the figure is (topk end - topk start) - (other end - other start),
a hook at a time, averaged over hooks, with a t interval over seeds: the seed is the unit, its hooks and tokens are not
independent of one another.
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
    """A difference in differences: mean over seeds with its 95 % t interval, and each seed's."""

    mean: float
    low: float
    high: float
    by_seed: list[float]

    @classmethod
    def over(cls, by_seed: np.ndarray) -> "Difference":
        """From one figure a seed. With fewer than two seeds there is no interval: NaN."""
        known = by_seed[np.isfinite(by_seed)]
        if len(known) < 2:
            return cls(
                float(known.mean()) if len(known) else float("nan"), float("nan"), float("nan"), by_seed.tolist()
            )
        mean, low, high = (float(figure) for figure in mean_interval(known))
        return cls(mean, low, high, by_seed.tolist())

    def p(self) -> float:
        """Of a t test against no difference, two-sided; 1 where there is nothing to test."""
        known = np.array([one for one in self.by_seed if np.isfinite(one)])
        if len(known) < 2 or float(np.ptp(known)) == 0:
            return 1.0
        return float(stats.ttest_1samp(known, 0).pvalue)

    def words(self) -> str:
        """For a sentence."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def measure_snapshot(
    models: Mapping[str, CircuitGPT], step: int, *, batches: Sequence[Batch], last: int
) -> dict[str, Any]:
    """What is kept of both arms at one step: figures by condition, variant and hook, losses, and the generators.

    Conditions: "topk", "dense", "afterwards" (the dense arm with AbsTopK switched on), "shuffled" (the topk arm with
    the supports of other tokens); at the step ``last`` also untrained models of the arms' final density.
    """
    texts = [Texts(one.ids, one.mask, one.positions) for one in batches]
    topk, dense = models["topk"], models["dense"]
    hooks = topk_hooks(topk)
    measured = {"topk": topk, "dense": dense, "afterwards": masked_afterwards(dense, topk)}
    if step == last:
        measured |= {f"untrained {name}": untrained(model) for name, model in models.items()}
    gathered = {name: gather(model, texts, hooks) for name, model in measured.items()}
    conditions = {name: one.rows for name, one in gathered.items()}
    seed = int(topk.card["recipe"]["seed"])
    conditions["shuffled"] = shuffled(conditions["topk"], np.random.default_rng([seed, step]))
    found = compare(conditions, seed)
    return {
        "hooks": hooks,
        "tokens": sum(int(one.mask[:, 1:].sum()) for one in texts),
        "loss": {name: _short(one.loss) for name, one in gathered.items()},
        "conditions": {name: _kept(name, by_hook) for name, by_hook in found.items()},
        "generators": {
            name: {letter: asdict(one) for letter, one in acting(model).items()} for name, model in models.items()
        },
    }


def _kept(condition: str, by_hook: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, list[float | None]]]:
    """Lists by hook. What another list says already is left out; :func:`_place` knows where that is."""
    kept: dict[str, dict[str, list[float | None]]] = {}
    for variant in VARIANTS:
        rows = [of[variant] for of in by_hook.values()]
        names = [name for name in _FIELDS if "area" not in name or ".trimmed." not in variant]
        names = [name for name in names if _place(condition, variant, name) == (condition, variant)]
        if names:
            kept[variant] = {name: [_short(getattr(row, name)) for row in rows] for name in names}
        if variant == "pre.raw.centered":
            kept[variant]["live"] = [row.live for row in rows]
    return kept


def _place(condition: str, variant: str, field: str) -> tuple[str, str]:
    """Where a figure stands: without a mask both gradients are one, and shuffled supports leave that behind them."""
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
        """(seeds, steps, hooks), or (seeds, hooks) at one step; NaN where nothing was measured."""
        condition, variant = _place(condition, variant, field)
        if step is not None:
            rows = [self._of[s][str(step)]["conditions"][condition][variant][field] for s in self.seeds]
            return np.array(rows, dtype=float)
        return np.stack([self.values(condition, field, variant, one) for one in self.steps], axis=1)

    def loss(self, condition: str) -> np.ndarray:
        """(seeds, steps) in nats."""
        return np.array([[self._of[s][str(t)]["loss"][condition] for t in self.steps] for s in self.seeds], dtype=float)

    def difference(self, control: str, field: str = "equal_rank", variant: str = PRIMARY) -> Difference:
        """The change of the topk arm less that of ``control`` from the first to the last step; ranks as logarithms.

        "untrained" as a control stands for another start: untrained models of the final density in either arm.
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
        """The topk arm's figure less that of ``control`` at the last step, whatever they began with."""
        last = self.steps[-1]
        both = self.values("topk", field, variant, last) - self.values(control, field, variant, last)
        return Difference.over(np.nanmean(both, axis=1))

    def course(self, condition: str, field: str, variant: str = PRIMARY) -> np.ndarray:
        """(seeds, steps): the mean over hooks, of ranks the geometric one."""
        values = self.values(condition, field, variant)
        mean = np.nanmean(np.log(values) if field.endswith("_rank") else values, axis=2)
        return np.exp(mean) if field.endswith("_rank") else mean

    def generators(self, arm: str, letter: str, what: str = "acts") -> np.ndarray:
        """(seeds, steps): the accuracy of one letter, "acts" or "after"."""
        rows = [[self._of[s][str(t)]["generators"][arm][letter][what] for t in self.steps] for s in self.seeds]
        return np.array(rows, dtype=float)

    def appeared(self, what: str = "acts") -> dict[str, dict[str, list[int | None]]]:
        """{arm: {letter: the step at which each seed has it for good, or None}}."""
        return {
            arm: {
                letter: [appeared(self.steps, row) for row in self.generators(arm, letter, what)] for letter in LETTERS
            }
            for arm in ("topk", "dense")
        }


def band(by_seed: np.ndarray) -> dict[str, list[float]]:
    """y, low and high over seeds, (seeds, steps) → lists: the mean and its 95 % t interval."""
    found = [Difference.over(column) for column in by_seed.T]
    return {"y": [one.mean for one in found], "low": [one.low for one in found], "high": [one.high for one in found]}
