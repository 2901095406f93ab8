"""Extraction finds finite machines, rejects counters and noise, and its figures mean what their names say."""

import json
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from scalpel.semigroup import MooreMachine, ThresholdCounter, extract
from scalpel.semigroup.extraction.bounds import clopper_pearson
from scalpel.semigroup.extraction.learning import learn
from scalpel.semigroup.extraction.questions import INVALID, NOT_VALID, FunctionQuestions
from scalpel.semigroup.extraction.result import Growth, judge
from scalpel.semigroup.extraction.trials import Rate, by_state, conflicts, fidelity
from scalpel.semigroup.extraction.words import all_words_to, pumped, random_words, short_words, words_to


def counted(letter, modulus):
    return lambda words: [word.count(letter) % modulus for word in words]


def threshold(theta):
    counter = ThresholdCounter(theta)
    return lambda words: [counter.decide(word.count("["), len(word)) for word in words]


def random_machine(seed, states=4):
    rng = np.random.default_rng(seed)
    return MooreMachine(
        ("a", "b"),
        tuple(map(tuple, rng.integers(states, size=(states, 2)).tolist())),
        tuple(int(v) for v in rng.integers(2, size=states)),
    ).minimized()


def acting_like(machine):
    numbers = {name: i for i, name in enumerate(machine.letters)}
    return lambda words: [machine.output([numbers[letter] for letter in word]) for word in words]


@pytest.mark.parametrize("seed", range(12))
def test_random_machines_are_found_again(seed):
    """There are only two outputs, so most states can only be distinguished by continuations."""
    machine = random_machine(seed)
    found = extract(acting_like(machine), ["a", "b"], seed=seed)
    assert found.verdict == "finite" and found.reasons == ()
    assert found.machine.equivalent(machine)
    assert found.machine.states == machine.states
    assert found.conflict.value == 0 and found.fidelity.value == 1 and found.congruence.value == 0
    assert found.semigroup().size == machine.semigroup().size


def test_a_threshold_is_a_counter_and_no_machine():
    found = extract(threshold("0.15"), ["[", "x"], horizon=5)
    assert found.verdict == "counter" and found.machine is None
    sizes = [g.classes for g in found.growth]
    assert sizes == sorted(set(sizes))
    assert found.counterexamples
    with pytest.raises(ValueError, match="no machine was found"):
        found.semigroup()
    exact = [(Fraction(3, 20) * len(w) < w.count("[")) for w in (("[",) * 3, ("x",) * 3)]
    assert threshold("0.15")([("[",) * 3, ("x",) * 3]) == exact


def test_a_depth_counter_grows():
    def balanced(words):
        return [sum(1 if letter == "[" else -1 for letter in word) == 0 for word in words]

    assert extract(balanced, ["[", "]"], pairs=48).verdict == "counter"


def test_noise_is_refused_and_a_little_of_it_is_not_learned():
    def noisy(share):
        def function(words):
            wrong = [np.random.default_rng([len(w), *map(ord, w)]).random() < share for w in words]
            return [(w.count("a") + bad) % 2 for w, bad in zip(words, wrong, strict=True)]

        return function

    little = extract(noisy(0.002), ["a", "b"], pairs=400)
    assert little.verdict == "finite" and little.machine.states == 2
    for share in (0.2, 0.5):
        much = extract(noisy(share), ["a", "b"], prefixes=64, pairs=32, limit=8, nulls=False)
        assert much.verdict == "refused" and much.reasons


def test_a_failure_beyond_the_horizon_is_seen_only_when_asked_for():
    """The machine is correct up to a certain length, and that length is stated."""

    def breaks(words):
        return [(word.count("a") % 2) if len(word) < 40 else 0 for word in words]

    short, long = (extract(breaks, ["a", "b"], horizon=h) for h in (4, 8))
    assert short.verdict == "finite" and short.horizon == 16
    assert long.verdict != "finite"
    assert min(row["letters"] for row in long.counterexamples) >= 40 or long.incongruent


def test_words_that_are_not_valid_are_never_asked():
    asked = []

    def depth(words):
        asked.extend(words)
        return [sum(1 if letter == "(" else -1 for letter in word) for word in words]

    def valid(word):
        depths = np.cumsum([1 if letter == "(" else -1 for letter in word])
        return len(word) == 0 or (depths.min() >= 0 and depths.max() <= 2)

    found = extract(depth, ["(", ")"], valid=valid)
    assert found.verdict == "finite"
    assert list(found.machine.outputs).count(NOT_VALID) == 1 and found.machine.states == 4
    assert all(valid(word) for word in asked)


def test_the_same_seed_gives_the_same_result_and_json_has_all_of_it():
    one, other = (extract(counted("a", 3), ["a", "b"], seed=4) for _ in range(2))
    first, second = one.to_dict() | {"seconds": 0}, other.to_dict() | {"seconds": 0}
    assert first == second
    read = json.loads(one.to_json())
    assert read["verdict"] == "finite" and read["machine"]["transitions"] == [[1, 0], [2, 1], [0, 2]]
    assert "classes 3 at 4, 3 at 8, 3 at 16" in one.summary()


def test_shuffled_labels_conflict():
    found = extract(counted("a", 3), ["a", "b"])
    assert found.nulls["shuffled_labels"]["mean"] == pytest.approx(2 / 3, abs=0.1)
    assert extract(counted("a", 3), ["a", "b"], nulls=False).nulls == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"prefixes": 3}, "prefixes is 3"),
        ({"pairs": 1}, "pairs is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"most_conflict": -0.1}, "most_conflict is -0.1"),
        ({"answers": ["0", "1"]}, "for a CircuitGPT"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        extract(counted("a", 2), ["a", "b"], **options)


def test_bad_alphabets_and_models():
    with pytest.raises(ValueError, match="names must differ"):
        extract(counted("a", 2), ["a", "a"])
    with pytest.raises(ValueError, match="at least one letter"):
        extract(counted("a", 2), [])
    with pytest.raises(TypeError, match="a CircuitGPT or a function"):
        extract(3, ["a"])
    with pytest.raises(ValueError, match="1 outputs for"):
        extract(lambda words: [0], ["a", "b"])


# ---- the pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (1, 200)])
def test_clopper_pearson_is_the_inverse_of_the_binomial_tails(hits, trials):
    low, high = clopper_pearson(hits, trials, 0.05)
    if hits:
        assert binom.sf(hits - 1, trials, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if hits < trials:
        assert binom.cdf(hits, trials, high) == pytest.approx(0.025)
    else:
        assert high == 1


def test_clopper_pearson_covers():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3):
        drawn = rng.binomial(60, share, size=2000)
        bounds = {k: clopper_pearson(int(k), 60) for k in np.unique(drawn)}
        assert np.mean([bounds[k][0] <= share <= bounds[k][1] for k in drawn]) >= 0.95
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    for wrong in ((3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0)):
        with pytest.raises(ValueError):
            clopper_pearson(*wrong)


def test_rates_weigh_cells_alike_and_bound_them_at_once():
    rate = Rate({"rare": (1, 10), "common": (0, 1000)})
    assert rate.value == pytest.approx(0.05)
    assert rate.worst == pytest.approx(clopper_pearson(1, 10, 0.025)[1])
    assert Rate({"unknown": (0, 0)}).worst == 1 and Rate({}).high == 1


def test_samples_are_balanced_new_and_right():
    questions = FunctionQuestions(counted("a", 3), ["a", "b"])
    rng = np.random.default_rng(0)
    candidate = learn(questions, 8, prefixes=64, tolerance=0.02, limit=9, rng=rng)
    own = by_state(questions, candidate, 50, 12, rng)
    assert all(45 <= len(words) <= 50 for words in own.words.values()) and not own.census
    assert all(word not in candidate.prefixes for words in own.words.values() for word in words)
    for state, words in own.words.items():
        assert {candidate.machine.outputs[state]} == {word.count(0) % 3 for word in words}
    rate, found = conflicts(questions, candidate, own)
    assert found == [] and min(n for _, n in rate.cells.values()) >= 22 and len(rate.cells) == 6


def test_states_that_few_words_reach_are_tried_with_all_of_them():
    """Only "" and "b" reach the first two states, so nothing is left to sample and nothing is unknown."""
    machine = MooreMachine(("a", "b"), ((2, 1), (2, 2), (2, 3), (3, 2)), ("start", "b", "even", "odd"))
    questions = FunctionQuestions(acting_like(machine), ["a", "b"])
    rng = np.random.default_rng(0)
    candidate = learn(questions, 8, prefixes=64, tolerance=0.02, limit=9, rng=rng)
    assert candidate.machine.equivalent(machine)
    own = by_state(questions, candidate, 40, 8, rng)
    assert own.census == {0, candidate.machine.state((1,))}
    assert own.words[0] == [()] and own.words[candidate.machine.state((1,))] == [(1,)]
    rate, found = conflicts(questions, candidate, own)
    assert found == [] and rate.worst < 0.25 and len(rate.census) == 4
    short = [word for length in range(4) for word in product((0, 1), repeat=length)]
    assert all_words_to(machine, 2, 3, 100) == [word for word in short if machine.state(word) == 2]
    assert all_words_to(machine, 2, 20, 100) is None


def test_conflicts_and_infidelity_are_counted_where_they_are():
    """A candidate learned from words of up to four letters, tested on a model that departs from it at ten."""

    def breaks(words):
        return [word.count("a") % 2 if len(word) < 10 else "broken" for word in words]

    questions = FunctionQuestions(breaks, ["a", "b"])
    rng = np.random.default_rng(0)
    candidate = learn(questions, 4, prefixes=64, tolerance=0.02, limit=9, rng=rng)
    rate, wrong = fidelity(questions, candidate, 60, 16, rng)
    assert wrong and all(len(word) >= 10 for word in wrong)
    assert rate.value == pytest.approx(1 - len(wrong) / 120)
    own = by_state(questions, candidate, 60, 9, rng)
    _, found = conflicts(questions, candidate, own)
    assert all(max(len(u), len(v)) == 9 for u, v, _ in found)


def test_words():
    questions = FunctionQuestions(counted("a", 2), ["a", "b"], valid=lambda word: "bb" not in "".join(word))
    words = short_words(questions, 3, 100)
    assert words[:4] == [(), (0,), (1,), (0, 0)] and (1, 1) not in words and len(words) == 11
    drawn = random_words(questions, 12, 300, np.random.default_rng(0))
    assert all(questions.is_valid(word) for word in drawn)
    assert {len(word) for word in drawn} == set(range(13))
    assert max(word.count(0) for word in drawn) == 12
    repeated = list(pumped(questions, 10))
    assert (0,) * 10 in repeated and (1, 0) * 5 in repeated
    assert all(9 <= len(word) <= 10 and questions.is_valid(word) for word in repeated)


def test_words_that_lead_to_a_state():
    """The model has a state that random words seldom reach: any letter except the right one leaves the path for
    good.
    """
    corner = MooreMachine(("a", "b"), ((1, 2), (2, 0), (2, 2)), (0, 1, 2))
    rng = np.random.default_rng(0)
    for state, lengths in ((0, {0, 2, 4, 6, 8}), (1, {1, 3, 5, 7, 9}), (2, set(range(1, 10)))):
        words = words_to(corner, state, 9, 400, rng)
        assert len(words) == 400 and {corner.state(word) for word in words} == {state}
        assert {len(word) for word in words} == lengths
    assert words_to(MooreMachine(("a",), ((0,), (0,)), (0, 1)), 1, 5, 10, rng) == []


def test_the_verdict_follows_from_each_figure():
    level = [Growth(4, 3, False, 99), Growth(8, 3, False, 99), Growth(16, 3, False, 99)]
    good, bad = Rate({"c": (0, 300)}), Rate({"c": (60, 300)})
    right = Rate({"c": (300, 300)})
    assert judge(level, 0.05, good, right, good, None, (0, 10)) == ("finite", ())
    for one in (
        (bad, right, good, None, (0, 10)),
        (good, bad, good, None, (0, 10)),
        (good, right, bad, None, (0, 10)),
        (good, right, good, None, (5, 10)),
    ):
        verdict, reasons = judge(level, 0.05, *one)
        assert verdict == "refused" and len(reasons) == 1
    growing = [Growth(4, 3, False, 99), Growth(8, 5, False, 99), Growth(16, 9, False, 99)]
    assert judge(growing, 0.05, good, right, good, None, (0, 10))[0] == "counter"
    late = [Growth(4, 3, False, 99), Growth(8, 3, False, 99), Growth(16, 9, False, 99)]
    assert judge(late, 0.05, good, right, good, None, (0, 10))[0] == "refused"
    # For noise there are nearly as many classes as prefixes, or the counts only reflect where the search stopped.
    full = [Growth(4, 30, False, 31), Growth(8, 60, False, 64), Growth(16, 63, True, 64)]
    stopped = [Growth(4, 3, False, 99), Growth(8, 9, True, 99), Growth(16, 10, True, 99)]
    assert judge(full, 0.05, good, right, good, None, (0, 10))[0] == "refused"
    assert judge(stopped, 0.05, good, right, good, None, (0, 10))[0] == "refused"
    early = [Growth(4, 2, False, 99), Growth(8, 3, False, 99), Growth(16, 3, False, 99)]
    assert "use horizon=8" in judge(early, 0.05, good, right, good, None, (0, 10))[1][0]
    unsure = judge(level, 0.05, Rate({"c": (0, 9)}), right, good, None, (0, 10))[1][0]
    assert (
        "use more pairs" in unsure and "use more pairs" not in judge(level, 0.05, bad, right, good, None, (0, 10))[1][0]
    )


def test_invalid_words_have_no_output():
    questions = FunctionQuestions(counted("a", 2), ["a", "b"], valid=lambda word: word.count("b") < 2)
    assert questions.ask([(1,), (1, 1), (1, 1, 0)]).tolist() == [0, INVALID, INVALID]
    assert questions.output(INVALID) is NOT_VALID


def test_one_answer_to_everything_is_said_to_be_no_test():
    found = extract(lambda words: ["same"] * len(words), ["a", "b"])
    assert found.verdict == "finite" and "nothing was tested" in found.summary()


def test_machines_with_many_states_are_found_whole():
    """No class is common, and rare classes must not be mistaken for errors."""
    n = 14

    def counter(words):
        return [sum({"a": 1, "b": -1, "c": 7}[letter] for letter in word) % n for word in words]

    found = extract(counter, ["a", "b", "c"], horizon=8, prefixes=192, tolerance=0.1, nulls=False)
    assert found.verdict == "finite", found.reasons
    assert found.machine.states == n and found.semigroup().groups()[0].name == "Z_14"


def test_words_that_end_are_no_reason_to_refuse():
    def parity(words):
        return [word.count("a") % 2 for word in words]

    found = extract(parity, ["a", "b", "end"], valid=lambda word: "end" not in word[:-1], nulls=False)
    assert found.verdict == "finite", found.reasons
    with pytest.raises(ValueError, match="no letter is valid after the empty word"):
        extract(parity, ["a"], valid=lambda word: False)


def test_none_is_an_output_like_any_other():
    found = extract(lambda words: [None if len(word) % 2 else "even" for word in words], ["a", "b"])
    assert found.verdict == "finite" and set(found.machine.outputs) == {None, "even"}
    assert set(found.fidelity.cells) == {"0", "1"}
    with pytest.raises(ValueError, match="is not equal to itself"):
        extract(lambda words: [float("nan")] * len(words), ["a"])
    with pytest.raises(TypeError, match="cannot be hashed"):
        extract(lambda words: [[]] * len(words), ["a"])
