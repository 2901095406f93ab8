"""A forward pass can be stopped early, and only the context that stopped it catches the exception."""

import pytest

from scalpel.hooks.stopping import Reached, Stop


def test_the_value_that_was_reached_is_kept_and_nothing_after_it_runs():
    ran = []
    with Stop() as stop:
        ran.append(1)
        stop("value")
        ran.append(2)
    assert (ran, stop.reached, stop.value) == ([1], True, "value")


def test_a_pass_that_runs_to_its_end_reached_nothing():
    with Stop() as stop:
        pass
    assert (stop.reached, stop.value) == (False, None)


def test_a_stop_leaves_the_passes_inside_it_too_but_is_caught_by_its_own_context_alone():
    with Stop() as outer:
        with Stop() as inner:
            outer("outer")
        raise AssertionError("the inner context caught what was raised through the outer one")
    assert (outer.value, inner.reached) == ("outer", False)


def test_other_errors_pass_through():
    with pytest.raises(KeyError, match="other"), Stop():
        raise KeyError("other")


def test_a_stop_that_no_context_catches_says_what_happened():
    with pytest.raises(Reached, match="stopped on purpose"):
        Stop()(1)
