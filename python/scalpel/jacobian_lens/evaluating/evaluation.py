"""How often a lens shows what a model should think of: pass@k with intervals, beside the logit lens and controls.

An item is a prompt, one token of it that is read, and intermediates: what the model should think of there. At each
layer l an intermediate has a rank r_l, from 1, the best of its spellings of one token. Two rules make one rank of those
of all layers:

- ``"minimum"``, the published one, is min_l r_l over all layers that are read. It is a weak statistic: with many layers
  one of them is likely to show the token by chance, so that lenses with exchanged layers often do as well.
- ``"band"`` is the geometric mean of r_l, exp(mean_l log r_l), over a band of layers, by default the middle half of
  those that are read (of n layers, numbers ⌊n/4⌋ … ⌈3n/4⌉ - 1 in their order).

An item's score at k is the share of its intermediates whose rank by the rule is at most k, and pass@k the mean over
items. Intervals are those of a bootstrap over items: 2.5 and 97.5 percent of the means of resampled items. A single
item has none. Where all items score alike, the interval has no width: no item that differs was seen, which is no proof
that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attached.scores import score
from ..matrices import Lens, Made, check_width, chosen_layers
from ..reading.readout import SKIPPED, transported
from . import controls
from .items import Item, read_items

__all__ = ["RULES", "Evaluation", "PassRate", "evaluate"]

RULES = ("minimum", "band")
_SAMPLES = 2000


@dataclass(frozen=True)
class PassRate:
    """A mean over items with its interval.

    Attributes:
        value: The mean.
        low: The lower end of the bootstrap's 95 percent; NaN, as the upper one, for a single item.
        high: The upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How often a lens and its controls show the intermediates of a set of items.

    Attributes:
        items: How many items were scored: those with at least one intermediate of one token.
        excluded: How many intermediates have no spelling of one token, and weren't scored.
        left_out: The names of the items that had no other intermediates.
        below_skip_first: How many items were read at a token below the lens's ``skip_first``.
        layers: The layers that were read.
        band: Those of the band.
        passed: {lens: {rule: {k: pass@k}}} for ``"jacobian"``, ``"logit"``, ``"permuted"`` and ``"random"``.
        over_logit: {rule: {k: the mean difference between the Jacobian lens and the logit lens}}.
        derangements: How many derangements of the layers were scored.
        beaten: {rule: {k: share of these whose pass@k is below the lens's}}; ties aren't beaten.
        tied: {rule: {k: share of these whose pass@k equals the lens's}}.
        names: The names of the items that were scored.
        scores: {lens: {rule: {k: the score of each item}}}.
    """

    items: int
    excluded: int
    left_out: tuple[str, ...]
    below_skip_first: int
    layers: tuple[Any, ...]
    band: tuple[Any, ...]
    passed: dict[str, dict[str, dict[int, PassRate]]]
    over_logit: dict[str, dict[int, PassRate]]
    derangements: int
    beaten: dict[str, dict[int, float]]
    tied: dict[str, dict[int, float]]
    names: tuple[str, ...] = field(repr=False)
    scores: dict[str, dict[str, dict[int, list[float]]]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data.

        Returns:
            A mapping with the attributes by their names.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> items = [{"name": "one", "prompt": "x = [[1", "intermediates": ["]"]}]
            >>> lens.evaluate(items, derangements=0).to_json()["items"]
            1
        """
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def __repr__(self) -> str:
        lines = [
            f"{self.items} items, {self.excluded} intermediates of several tokens left out, "
            f"{self.below_skip_first} items read below skip_first; {len(self.layers)} layers, band of {len(self.band)}"
        ]
        for rule in RULES:
            ks = list(self.over_logit[rule])
            lines.append(f"{rule}:".ljust(12) + "".join(f"pass@{k}".ljust(24) for k in ks))
            for name, passed in self.passed.items():
                lines.append(f"  {name}".ljust(12) + "".join(_shown(passed[rule][k]).ljust(24) for k in ks))
            lines.append("  - logit".ljust(12) + "".join(_shown(self.over_logit[rule][k]).ljust(24) for k in ks))
            if self.derangements:
                shares = "".join(f"{self.beaten[rule][k]:.0%}, {self.tied[rule][k]:.0%} tied".ljust(24) for k in ks)
                lines.append("  beats".ljust(12) + shares + f"of {self.derangements} derangements")
        return "\n".join(line.rstrip() for line in lines)


def evaluate(
    lens: Lens,
    items: Any,
    k: int | Sequence[int],
    layers: Any,
    band: Any,
    derangements: int,
    seed: int,
    read_at: str,
) -> Evaluation:
    """Score a lens: :meth:`scalpel.JacobianLens.evaluate`."""
    ks = sorted(dict.fromkeys([k] if isinstance(k, int) else k))
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"k is {ks!r}; give ranks of at least 1")
    if derangements < 0:
        raise ValueError(f"derangements is {derangements}; it counts them, and is at least 0")
    chosen = chosen_layers(lens, layers)
    count = len(chosen)
    banded = chosen[count // 4 : math.ceil(3 * count / 4)] if band is None else chosen_layers(lens, band)
    missing = next((layer for layer in banded if layer not in chosen), None)
    if missing is not None:
        raise ValueError(f"the band has layer {missing!r}, which isn't among layers")
    model = lens.attached
    every = read_items(items, model, read_at)
    scored = [item for item in every if item.tokens]
    if not scored:
        raise ValueError(
            "no item has an intermediate that is one token of this tokenizer, so there is nothing to score"
        )
    states = _states(lens, scored, chosen)
    check_width(lens, states)
    reader = _Reader(lens, scored, states, [chosen.index(layer) for layer in banded])
    J = Made(chosen, lambda layer: lens.J[layer])
    lenses: dict[str, Mapping[Any, Tensor] | None] = {
        "jacobian": J,
        "logit": None,
        "permuted": controls.permuted(J, seed),
        "random": controls.random(J, seed),
    }
    ranked: dict[str, np.ndarray] = {}
    for name, matrices in lenses.items():
        own = [(place, None if matrices is None else matrices[chosen[place]]) for place in range(count)]
        ranked[name] = reader.ranks(own)
    scores = {
        name: {rule: {k: reader.scores(ranks, rule, k) for k in ks} for rule in RULES} for name, ranks in ranked.items()
    }
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(scored), size=(_SAMPLES, len(scored)))
    passed = {
        name: {rule: {k: _interval(values, drawn) for k, values in by_k.items()} for rule, by_k in rules.items()}
        for name, rules in scores.items()
    }
    ours, theirs = scores["jacobian"], scores["logit"]
    over = {rule: {k: _interval(ours[rule][k] - theirs[rule][k], drawn) for k in ks} for rule in RULES}
    beaten, tied, exchanged = _against_derangements(reader, J, ranked["jacobian"], ks, derangements, seed)
    skip_first = lens.about.get("skip_first", SKIPPED)
    return Evaluation(
        len(scored),
        sum(len(item.excluded) for item in every),
        tuple(item.name for item in every if not item.tokens),
        sum(item.position < skip_first for item in scored),
        tuple(chosen),
        tuple(banded),
        passed,
        over,
        exchanged,
        beaten,
        tied,
        tuple(item.name for item in scored),
        {
            name: {rule: {k: values.tolist() for k, values in by_k.items()} for rule, by_k in rules.items()}
            for name, rules in scores.items()
        },
    )


def _states(lens: Lens, items: Sequence[Item], layers: Sequence[Any]) -> dict[Any, Tensor]:
    """What each layer has at the token that is read, {layer: (items, width)}; the model runs once for each item."""
    kept: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    for number, item in enumerate(items):
        values = lens.attached.values(item.text, layers, last=not number)  # the first run also checks the head
        for layer in layers:
            kept[layer].append(values.states[layer][item.position])
    return {layer: torch.stack(rows) for layer, rows in kept.items()}


class _Reader:
    """Ranks of all items' intermediates, by the layer whose states are read and the matrix that carries them."""

    def __init__(self, lens: Lens, items: Sequence[Item], states: Mapping[Any, Tensor], band: list[int]) -> None:
        self._head, self._band = lens.attached.head, band
        self._states = list(states.values())
        self._of_item = np.repeat(np.arange(len(items)), [len(item.tokens) for item in items])
        self._items = len(items)
        # An item's tokens stand in one row, -1 where it has fewer than others.
        rows = [[token for tokens in item.tokens for token in tokens] for item in items]
        widest = max(map(len, rows))
        self._watch = torch.tensor([row + [-1] * (widest - len(row)) for row in rows], dtype=torch.int64, device="cpu")
        self._spans = []
        for item in items:
            start = 0
            for tokens in item.tokens:
                self._spans.append((start, start + len(tokens)))
                start += len(tokens)
        read = [item.text.ids[item.position] for item in items if item.text.ids]
        self._ids = torch.tensor(read, dtype=torch.int64, device="cpu")

    def ranks(self, pairs: Sequence[tuple[int, Tensor | None]]) -> np.ndarray:
        """The ranks (pairs, intermediates), with the best spelling of each.

        A pair is the number of a layer whose states are read, and the matrix that carries them.
        """
        if not pairs:
            return np.zeros((0, len(self._spans)), dtype=np.int64)
        rows = torch.cat([transported(matrix, self._states[place]) for place, matrix in pairs])
        count = len(pairs)
        found = score(self._head, rows, self._ids.repeat(count), 0, self._watch.repeat(count, 1)).ranks.numpy()
        found = found.reshape(count, self._items, -1)
        spans = zip(self._of_item, self._spans, strict=True)
        return np.stack([found[:, item, start:stop].min(1) for item, (start, stop) in spans], 1)

    def scores(self, ranks: np.ndarray, rule: str, k: int) -> np.ndarray:
        """The score of each item, from the ranks (layers, intermediates)."""
        one = ranks.min(0) if rule == "minimum" else np.exp(np.log(ranks[self._band]).mean(0))
        passes = (one <= k * (1 + 1e-12)).astype(np.float64)
        return np.bincount(self._of_item, passes, self._items) / np.bincount(self._of_item, minlength=self._items)


def _against_derangements(
    reader: _Reader, J: Mapping[Any, Tensor], real: np.ndarray, ks: Sequence[int], wanted: int, seed: int
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]], int]:
    """The shares of derangements of the layers that the lens beats, and that it equals, and how many there were.

    A derangement reads layer l with the matrix of another layer m. Each pair (l, m) is read once, for all that have it.
    """
    layers = list(J)
    orders = [controls.derangement(len(layers), seed + number) for number in range(wanted if len(layers) > 1 else 0)]
    pairs: dict[tuple[int, int], np.ndarray] = {}
    for taken, layer in enumerate(layers):  # a lazy matrix is computed once
        matrix = J[layer]
        places = sorted({place for order in orders for place, m in enumerate(order) if m == taken})
        found = reader.ranks([(place, matrix) for place in places])
        pairs |= {(place, taken): ranks for place, ranks in zip(places, found, strict=True)}
    beaten: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
    tied: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
    deranged = [np.stack([pairs[place, taken] for place, taken in enumerate(order)]) for order in orders]
    for rule in RULES:
        for k in ks:
            own = float(reader.scores(real, rule, k).mean())
            others = [float(reader.scores(ranks, rule, k).mean()) for ranks in deranged]
            beaten[rule][k] = sum(other < own for other in others) / len(others) if others else math.nan
            tied[rule][k] = sum(other == own for other in others) / len(others) if others else math.nan
    return beaten, tied, len(orders)


def _interval(values: np.ndarray, drawn: np.ndarray) -> PassRate:
    if len(values) < 2:
        return PassRate(float(values.mean()), math.nan, math.nan)
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return PassRate(float(values.mean()), float(low), float(high))


def _shown(share: PassRate) -> str:
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


def _plain(value: Any) -> Any:
    if isinstance(value, PassRate):
        return {"value": value.value, "low": _plain(value.low), "high": _plain(value.high)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
