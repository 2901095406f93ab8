"""Moore machines: minimal forms, equivalence, and inputs that are not machines."""

import pytest

from scalpel.semigroup import MooreMachine

PARITY = MooreMachine(("a", "b"), ((1, 0), (0, 1)), ("even", "odd"))


def test_words_are_read_from_left_to_right():
    assert PARITY.state(()) == 0 and PARITY.state((0, 1, 1)) == 1
    assert PARITY.output((0, 1, 0)) == "even"
    assert PARITY.state((0,), start=1) == 0


def test_minimized_merges_what_no_word_tells_apart_and_drops_what_none_reaches():
    doubled = MooreMachine(
        ("a", "b"), ((2, 1), (3, 0), (1, 3), (0, 2), (4, 4)), ("even", "even", "odd", "odd", "never"), start=1
    )
    small = doubled.minimized()
    assert small == PARITY
    assert small.minimized() == small
    assert doubled.equivalent(PARITY)


def test_splitting_goes_on_until_words_of_any_length_agree():
    # The states differ only after as many letters as there are states.
    n = 6
    chain = MooreMachine(("a",), tuple((min(i + 1, n - 1),) for i in range(n)), tuple(i == n - 1 for i in range(n)))
    assert chain.minimized().states == n


def test_equivalence_goes_by_names():
    swapped = MooreMachine(("b", "a"), ((0, 1), (1, 0)), ("even", "odd"))
    assert PARITY.equivalent(swapped)
    assert not PARITY.equivalent(MooreMachine(("a", "b"), ((1, 0), (0, 1)), ("odd", "even")))
    assert not PARITY.equivalent(MooreMachine(("a", "c"), ((1, 0), (0, 1)), ("even", "odd")))
    assert not PARITY.equivalent(MooreMachine(("a", "b"), ((0, 0), (0, 1)), ("even", "odd")))


def test_its_semigroup_and_that_of_some_letters():
    assert PARITY.semigroup().size == 2
    assert [g.name for g in PARITY.semigroup().groups()] == ["Z_2"]
    assert PARITY.semigroup(["b"]).size == 1
    with pytest.raises(ValueError, match="no letter 'c'"):
        PARITY.semigroup(["c"])


@pytest.mark.parametrize(
    ("transitions", "outputs", "start", "words"),
    [
        (((0,), (1,)), ("x", "y"), 0, "shape"),
        (((0, 0),), ("x", "y"), 0, "shape"),
        ((), (), 0, "shape"),
        (((0, 2), (0, 0)), ("x", "y"), 0, "is not one of the states"),
        (((0, 0), (0, -1)), ("x", "y"), 0, "is not one of the states"),
        (((0, 0), (0, 0)), ("x", "y"), 2, "is not one of the states"),
    ],
)
def test_what_is_no_machine_is_refused(transitions, outputs, start, words):
    with pytest.raises(ValueError, match=words):
        MooreMachine(("a", "b"), transitions, outputs, start)
