"""The statistics that all experiments share: intervals, corrections for many tests, and how well a score sorts.

Intervals are of 95 %. Intervals by leaving blocks of rows out are in :mod:`scalpel.covariance.intervals`, and the exact
bounds of a share in :mod:`scalpel.semigroup.extraction.bounds`, since rooms below the experiments need them, too.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

from ..covariance.intervals import jackknife
from ..semigroup.extraction.bounds import clopper_pearson

__all__ = [
    "auroc",
    "aurocs",
    "bootstrap",
    "clopper_pearson",
    "discoveries",
    "draw_weights",
    "jackknife",
    "mean_interval",
    "percentile_interval",
    "redraw",
    "rows_by_unit",
]

T = TypeVar("T")


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, rng: np.random.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """The bootstrap interval of a statistic of prompts (or of other units that are independent of each other).

    ``scipy.stats.bootstrap`` gives the same interval from the same seed where every resample has a value. It gives NaN
    where one has none, such as the accuracy among failures of a resample without a failure; here such a resample is
    left out. It also holds all resamples in memory at once.

    Args:
        statistic: A function of the indices of the prompts that were drawn, int64 (count,).
        count: How many prompts there are, and how many are drawn with replacement each time.
        rng: The source of the draws.
        resamples: How many times prompts are drawn.

    Returns:
        The 2.5 % and the 97.5 % percentile; NaN if the statistic has no finite value in any resample.

    Example:
        >>> import numpy as np
        >>> from scalpel.experiments.statistics import bootstrap
        >>> right = np.array([True, True, True, False])
        >>> bootstrap(lambda drawn: right[drawn].mean(), 4, np.random.default_rng(0))
        (0.25, 1.0)
    """
    return percentile_interval(np.array(redraw(statistic, count, rng, resamples)))


def redraw(statistic: Callable[[np.ndarray], T], count: int, rng: np.random.Generator, resamples: int) -> list[T]:
    """A statistic of each resample, for what a single interval can't say; the arguments are those of `bootstrap`."""
    return [statistic(rng.integers(count, size=count)) for _ in range(resamples)]


def draw_weights(count: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """How often each of ``count`` prompts occurs in each resample, int64 (resamples, count).

    For statistics that are functions of sums over prompts: a product with these weights computes all resamples at once.
    """
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % percentile of draws (draws,), without those that are not finite; NaN if none is."""
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over the first axis with its interval by Student's t: (mean, low, high).

    The interval is right if the values are independent and normally distributed. It is NaN for a single value.
    """
    count = len(values)
    mean = values.mean(axis=0)
    half = np.full_like(mean, np.nan)
    if count > 1:
        half = stdtrit(count - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(count)
    return mean, mean - half, mean + half


def rows_by_unit(units: np.ndarray) -> list[np.ndarray]:
    """The rows of each unit that is drawn as a whole, in the order of the units' numbers.

    Args:
        units: The number of each row's unit, (rows,).

    Returns:
        For each unit the indices of its rows, ascending.
    """
    order = np.argsort(units, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(units[order])) + 1) if len(units) else []


def discoveries(p: np.ndarray, q: float = 0.05) -> np.ndarray:
    """Which of many tests are significant by Benjamini and Hochberg 1995.

    Args:
        p: The tests' p values, of any shape.
        q: The false discovery rate: the expected share of false ones among the discoveries.

    Returns:
        A bool for each test, of the shape of ``p``.
    """
    p = np.asarray(p, dtype=float)
    if p.size == 0:
        return np.zeros(p.shape, dtype=bool)
    from scipy import stats  # slow to import

    adjusted: np.ndarray = stats.false_discovery_control(p.ravel()).reshape(p.shape) <= q
    return adjusted


def auroc(score: np.ndarray, failed: np.ndarray) -> float:
    """The chance that a failure scores higher than a success, (prompts,) each; ties count half.

    This is the area under the receiver operating characteristic. It is NaN where there is no failure or no success.

    Example:
        >>> from scalpel.experiments.statistics import auroc
        >>> auroc([0.9, 0.2, 0.4, 0.1], [True, True, False, False])
        0.75
    """
    return float(aurocs(np.asarray(score, dtype=float)[None], failed)[0])


def aurocs(scores: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """`auroc` of several scores of the same prompts at once: (scores, prompts) and (prompts,) to (scores,)."""
    from scipy import stats  # slow to import

    scores, failed = np.asarray(scores, dtype=float), np.asarray(failed, dtype=bool)
    failures, successes = int(failed.sum()), int((~failed).sum())
    if not failures or not successes:
        return np.full(len(scores), np.nan)
    # The U statistic by Mann and Whitney. scipy.stats.mannwhitneyu computes it in the same way, but also a p value for
    # each score, which would cost most of the time of a bootstrap.
    ranks = stats.rankdata(scores, axis=1)
    return np.asarray((ranks[:, failed].sum(1) - failures * (failures + 1) / 2) / (failures * successes))
