"""The defects of one kind of targets with their intervals and nulls, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..statistics import draw_weights, percentile_interval
from .defect import Products, exchanged, relative, split_halves

__all__ = ["Summary", "signed_root", "summarise"]


@dataclass(frozen=True)
class Summary:
    """One kind of targets.

    Attributes:
        pairs: The table: one dict for each (l, m), layers counted as in a lens.
        defect: The root of the mean over pairs of the squared defect.
        interval: Its 95 % interval.
        split: The 97.5 % point of the same figure with both sides exchanged in half of the units; None if not asked
            for.
        halves: The 97.5 % point of the same figure between J̄ of two halves; None if not asked for.
        frozen: The same figure with frozen attention; None if not asked for.
        frozen_interval: Its 95 % interval.
        edges: The same figure of a linear model with fixed attention; None where there is none.
        growth: Spearman's correlation of the defect with D − l; NaN for fewer than three l.
        growth_interval: Its 95 % interval.
    """

    pairs: list[dict[str, Any]]
    defect: float
    interval: tuple[float, float]
    split: float | None
    halves: float | None
    frozen: float | None
    frozen_interval: tuple[float, float] | None
    edges: float | None
    growth: float
    growth_interval: tuple[float, float]

    @property
    def zero(self) -> bool:
        """Whether the prediction of zero stands."""
        return (
            self.split is not None
            and self.frozen_interval is not None
            and self.defect <= min(self.split, self.frozen_interval[1])
        )

    @property
    def beyond(self) -> bool | None:
        """Whether the interval lies above what noise and the window's edges show; None where a null is missing.

        The edges are those of the linear model; where there is none, the model with frozen attention stands for it.
        """
        if self.split is None or self.frozen_interval is None or np.isnan(self.defect):
            return None
        return self.interval[0] > max(self.split, self.frozen_interval[1] if self.edges is None else self.edges)

    @property
    def beyond_frozen(self) -> bool | None:
        """Whether the interval lies above that with frozen attention; None where it is missing."""
        return None if self.frozen_interval is None else self.interval[0] > self.frozen_interval[1]

    def words(self) -> str:
        """The measurement in words."""
        text = f"defect {self.defect:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}] of ‖J̄ − I‖"
        held = sum(bool(row["holds"]) for row in self.pairs)
        text += f", {held} of {len(self.pairs)} (l, m) within both nulls" if self.beyond is not None else ""
        if np.isfinite(self.growth):
            low, high = self.growth_interval
            text += f", Spearman with D − l {self.growth:+.2f} [{low:+.2f}, {high:+.2f}]"
        return text

    def null_words(self) -> str:
        """The nulls in words."""
        parts = [] if self.split is None else [f"sides exchanged in half of the prompts up to {self.split:.3f}"]
        if self.frozen is not None and self.frozen_interval is not None:
            low, high = self.frozen_interval
            parts.append(f"attention frozen {self.frozen:.3f} [{low:.3f}, {high:.3f}]")
        if self.edges is not None:
            parts.append(f"linear with fixed attention {self.edges:.3f}")
        return ", ".join(parts) or "no null was asked for"

    def measured(self) -> dict[str, Any]:
        """The figures for a Result."""
        return {
            "defect": self.defect,
            "pairs": self.pairs,
            "spearman_with_distance": self.growth,
            "zero_stands": self.zero,
            "beyond_noise_and_edges": self.beyond,
            "beyond_frozen_attention": self.beyond_frozen,
            "grows": bool(self.growth_interval[0] > 0),
        }

    def nulls(self) -> dict[str, Any]:
        """The nulls for a Result."""
        return {
            "split_upper": self.split,
            "between_halves_upper": self.halves,
            "frozen": self.frozen,
            "frozen_interval": self.frozen_interval,
            "edges": self.edges,
        }


def signed_root(squares: np.ndarray) -> np.ndarray:
    """The root of an estimate that noise may make negative, with its sign, so that it stays as it is ordered."""
    root: np.ndarray = np.sign(squares) * np.sqrt(np.abs(squares))
    return root


def summarise(
    pairs: Sequence[tuple[int, int]],
    end: int,
    own: Products,
    frozen: Products | None,
    edges: Products | None,
    split: bool,
    resamples: int,
    rng: np.random.Generator,
) -> Summary:
    """Sum up the products of units: points ``pairs`` with ``end`` for D; the others as :class:`Summary` names them."""
    point, drawn = _with_draws(own, resamples, rng)
    intervals = [percentile_interval(column) for column in signed_root(drawn).T]
    swapped = exchanged(own, rng, resamples) if split else None
    halves = split_halves(own, rng, resamples) if split else None
    upper, halves_upper = (
        None if null is None else np.percentile(signed_root(null), 97.5, axis=0) for null in (swapped, halves)
    )
    of_frozen = None if frozen is None else _with_draws(frozen, resamples, rng)
    frozen_intervals = None if of_frozen is None else [percentile_interval(c) for c in signed_root(of_frozen[1]).T]
    rows = []
    for place, (l, m) in enumerate(pairs):  # noqa: E741
        row: dict[str, Any] = {
            "l": l - 1,
            "m": m - 1,
            "to_the_end": end - l,
            "defect": float(signed_root(point)[place]),
        }
        row["interval"] = intervals[place]
        row["split_upper"] = None if upper is None else float(upper[place])
        row["between_halves_upper"] = None if halves_upper is None else float(halves_upper[place])
        row["frozen"] = None if of_frozen is None else float(signed_root(of_frozen[0])[place])
        row["frozen_interval"] = None if frozen_intervals is None else frozen_intervals[place]
        row["edges"] = None if edges is None else float(signed_root(_all(edges))[place])
        row["holds"] = (
            None
            if upper is None or frozen_intervals is None
            else bool(row["defect"] <= min(upper[place], frozen_intervals[place][1]))
        )
        rows.append(row)
    distance = np.array([end - l for l, _ in pairs])  # noqa: E741
    several = len(set(distance.tolist())) > 2
    return Summary(
        rows,
        _mean(point),
        percentile_interval(_means(drawn)),
        None if swapped is None else float(np.percentile(_means(swapped), 97.5)),
        None if halves is None else float(np.percentile(_means(halves), 97.5)),
        None if of_frozen is None else _mean(of_frozen[0]),
        None if of_frozen is None else percentile_interval(_means(of_frozen[1])),
        None if edges is None else _mean(_all(edges)),
        float(_spearman(point[None], distance)[0]) if several else float("nan"),
        percentile_interval(_spearman(drawn, distance)) if several else (float("nan"), float("nan")),
    )


def _all(products: Products) -> np.ndarray:
    """The squared defects (pairs,) with every unit and probe once."""
    _, probes, units, _ = products.defect.shape
    found: np.ndarray = relative(products, np.ones((1, units)), np.ones((1, probes)))[0]
    return found


def _with_draws(products: Products, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The squared defects (pairs,), and those of resamples (resamples, pairs), of units and probes at once.

    Both are drawn with replacement, independently of each other (Owen 2007, "The pigeonhole bootstrap").
    """
    _, probes, units, _ = products.defect.shape
    drawn = draw_weights(units, rng, resamples), draw_weights(probes, rng, resamples)
    with_several = (drawn[0] > 0).sum(1) > 1  # a resample of one unit alone has no product of different units
    return _all(products), relative(products, drawn[0][with_several], drawn[1][with_several])


def _means(squared: np.ndarray) -> np.ndarray:
    """The figure of all pairs, (draws,), from squared defects (draws, pairs)."""
    return signed_root(squared.mean(1))


def _mean(squared: np.ndarray) -> float:
    return float(_means(squared[None])[0])


def _spearman(squared: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row with the distance; NaN where a row is constant or holds NaN."""
    ranks = stats.rankdata(squared, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    other = stats.rankdata(distance)
    other = other - other.mean()
    scale = np.sqrt((ranks**2).sum(1) * (other**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(np.isnan(squared).any(1), np.nan, ranks @ other / scale)
    return found
