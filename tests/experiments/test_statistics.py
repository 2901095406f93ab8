"""The statistics of all experiments, compared with scipy and with figures computed by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from scalpel.covariance.intervals import jackknife
from scalpel.experiments.statistics import (
    auroc,
    aurocs,
    bootstrap,
    clopper_pearson,
    discoveries,
    draw_weights,
    mean_interval,
    percentile_interval,
    redraw,
    rows_by_unit,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_bootstrap_is_scipys_from_the_same_seed():
    values = rng().exponential(size=80)
    expected = stats.bootstrap((values,), np.mean, n_resamples=300, method="percentile", rng=rng()).confidence_interval
    low, high = bootstrap(lambda drawn: float(values[drawn].mean()), 80, rng(), 300)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_bootstrap_of_a_mean_covers_it_as_often_as_it_says():
    generator = rng()
    hits = 0
    for _ in range(200):
        values = generator.normal(size=60)
        low, high = bootstrap(lambda drawn, values=values: float(values[drawn].mean()), 60, generator, 200)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_resamples_without_a_value_are_left_out():
    failed = np.array([True] + 5 * [False])
    score = np.arange(6.0)
    low, high = bootstrap(lambda drawn: auroc(score[drawn], failed[drawn]), 6, rng())
    assert (low, high) == (0.0, 0.0)  # in every resample with the failure, it has the lowest score
    assert np.isnan(bootstrap(lambda drawn: float("nan"), 6, rng())).all()
    assert np.isnan(percentile_interval(np.array([]))).all()


def test_redrawn_prompts_and_weights_are_resamples():
    drawn = redraw(lambda rows: rows, 5, rng(), 40)
    assert len(drawn) == 40 and all(len(rows) == 5 and rows.min() >= 0 and rows.max() <= 4 for rows in drawn)
    weights = draw_weights(5, rng(), 4000)
    assert weights.shape == (4000, 5) and (weights.sum(1) == 5).all()
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    # The variance of a binomial count of 5 draws at 1/5.
    assert weights.var(0) == pytest.approx(np.full(5, 4 / 5), abs=0.1)


def test_rows_of_units_are_kept_together():
    assert [rows.tolist() for rows in rows_by_unit(np.array([3, 1, 3, 1, 7]))] == [[1, 3], [0, 2], [4]]
    assert rows_by_unit(np.array([], dtype=int)) == []


def test_a_mean_has_students_interval():
    values = rng().normal(size=(9, 2))
    mean, low, high = mean_interval(values)
    for i in range(2):
        expected = stats.ttest_1samp(values[:, i], 0).confidence_interval()
        assert (mean[i], low[i], high[i]) == pytest.approx((values[:, i].mean(), expected.low, expected.high))
    mean, low, high = mean_interval(values[:1])
    assert (mean == values[0]).all() and np.isnan(low).all() and np.isnan(high).all()


def test_the_jackknife_of_a_mean_is_students_interval():
    values = torch.from_numpy(rng().normal(size=12))
    left_out = (values.sum() - values) / 11
    interval = jackknife(values.mean(), left_out)
    _, low, high = mean_interval(values.numpy())
    assert (float(interval.low), float(interval.high)) == pytest.approx((float(low), float(high)))


def test_auroc_is_mann_and_whitneys_statistic_ties_included():
    generator = rng()
    scores = generator.integers(6, size=(3, 50))
    failed = generator.random(50) < 0.3
    for score, area in zip(scores, aurocs(scores, failed), strict=True):
        u = stats.mannwhitneyu(score[failed], score[~failed]).statistic
        assert auroc(score, failed) == area == pytest.approx(u / (failed.sum() * (~failed).sum()))
    for none in (np.zeros(50, dtype=bool), np.ones(50, dtype=bool)):
        assert np.isnan(aurocs(scores, none)).all()


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 30), (7, 30), (30, 30), (2999, 3000)])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 300])
def test_bounds_of_a_share_are_quantiles_of_beta(hits, trials, alpha):
    low = stats.beta.ppf(alpha / 2, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - alpha / 2, hits + 1, trials - hits) if hits < trials else 1.0
    assert clopper_pearson(hits, trials, alpha) == pytest.approx((low, high), abs=1e-9)


def test_bounds_of_a_share_without_trials_and_of_what_is_no_share():
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    for wrong in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="hits run from 0"):
            clopper_pearson(*wrong)
    with pytest.raises(ValueError, match="alpha is 1"):
        clopper_pearson(1, 2, 1)


def test_discoveries_follow_benjamini_and_hochberg():
    assert discoveries(np.array([[0.01, 0.02], [0.04, 0.9]])).tolist() == [[True, True], [False, False]]
    assert discoveries(np.zeros((0,))).shape == (0,)
