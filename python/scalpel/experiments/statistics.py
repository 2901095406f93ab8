"""Intervals by prompt and corrections for many tests, the same in every experiment."""

from collections.abc import Callable

import numpy as np
from scipy import stats

__all__ = ["auroc", "bootstrap", "discoveries"]


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, rng: np.random.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic(prompts)``, prompts drawn ``count`` at a time with replacement."""
    draws = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def discoveries(p: np.ndarray, q: float = 0.05) -> np.ndarray:
    """Which of the tests are significant by Benjamini and Hochberg 1995 at false discovery rate ``q``; bool, like p."""
    p = np.asarray(p, dtype=float)
    if p.size == 0:
        return np.zeros(p.shape, dtype=bool)
    adjusted: np.ndarray = stats.false_discovery_control(p.ravel()).reshape(p.shape) <= q
    return adjusted


def auroc(score: np.ndarray, failed: np.ndarray) -> float:
    """Chance that a failure scores higher than a success, ties counting half; NaN where either is missing."""
    score, failed = np.asarray(score, dtype=float), np.asarray(failed, dtype=bool)
    bad, good = int(failed.sum()), int((~failed).sum())
    if not bad or not good:
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[failed].sum() - bad * (bad + 1) / 2) / (bad * good))
