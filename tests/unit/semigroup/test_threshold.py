"""ThresholdCounter: its exact arithmetic, and the region in which it fails."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalpel.semigroup import ThresholdCounter


def test_the_seeds_figures():
    counter = ThresholdCounter(0.15)
    assert counter.theta == Fraction(3, 20)
    assert counter.critical_length(2) == 14
    assert counter.min_distractors(2, 2) == 12


def test_a_float_is_its_shortest_decimal():
    # In exact arithmetic 2/20 > 0.1 is False. The binary 0.1 is above 1/10 and would agree by luck; the binary 0.7 is
    # below 7/10 and would not.
    assert not ThresholdCounter(0.7).decide(7, 10)
    assert ThresholdCounter(Fraction(0.7)).decide(7, 10)
    assert ThresholdCounter("3/20") == ThresholdCounter(0.15) == ThresholdCounter("0.15")


fractions = st.fractions(min_value=Fraction(1, 50), max_value=3, max_denominator=60)


@given(theta=fractions, sink=st.integers(0, 9), k=st.integers(0, 15), n=st.integers(1, 400))
def test_critical_length_is_where_the_decision_turns(theta, sink, k, n):
    counter = ThresholdCounter(theta, sink)
    assert counter.decide(k, n) == (Fraction(k, n + sink) > theta)
    assert counter.decide(k, n) == (n < counter.critical_length(k))


@settings(max_examples=25)  # each example checks 287 cells
@given(theta=fractions, sink=st.integers(0, 5))
def test_the_region_cell_by_cell(theta, sink):
    counter = ThresholdCounter(theta, sink)
    hole = counter.hole(6, 40)
    assert hole.shape == (7, 41) and hole.dtype == np.bool_
    for k in range(7):
        for n in range(41):
            assert hole[k, n] == (not counter.decide(k, n))


def test_distractors_are_never_negative():
    assert ThresholdCounter("1/2").min_distractors(1, 100) == 0


@pytest.mark.parametrize("theta", [0, -1, "0"])
def test_theta_must_be_positive(theta):
    with pytest.raises(ValueError, match="above 0"):
        ThresholdCounter(theta)


@pytest.mark.parametrize("theta", [None, [1], True])
def test_theta_of_a_wrong_type(theta):
    with pytest.raises(TypeError, match="must be a Fraction, str, int or float"):
        ThresholdCounter(theta)


@pytest.mark.parametrize("theta", ["nonsense", float("nan"), "1/0"])
def test_theta_that_is_no_number(theta):
    with pytest.raises(ValueError, match="not a number"):
        ThresholdCounter(theta)


def test_counts_are_checked():
    with pytest.raises(ValueError, match="0 or more"):
        ThresholdCounter("1/2").critical_length(-1)
    with pytest.raises(TypeError, match="must be an int"):
        ThresholdCounter("1/2").decide(1.5, 2)
