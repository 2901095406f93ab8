"""Experiments give the correct verdict on models whose algorithm is known by construction."""

import json
from functools import cache

import numpy as np
import pytest

from bracket_fixtures import small_tokenizer
from scalpel import experiments
from scalpel.experiments.brackets import critical as c
from scalpel.experiments.brackets import dilution
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.experiments.brackets.distractors import CLASSES, comment_lines
from scalpel.experiments.controls import Controls, untrained
from scalpel.experiments.result import Protocol, plain
from scalpel.tasks.brackets import long_lists, preference

FAST = {"prompts": 16, "offsets": 16}


def circuit(theta=0.05, **options):
    return threshold_circuit(small_tokenizer(), theta, block_size=192, **options)


# ---- the constructed circuit does what it says --------------------------------------------------------------


@pytest.mark.parametrize("sink", [None, 12.0])
@pytest.mark.parametrize("k", [2, 4])
def test_the_circuit_is_the_seeds_formula(k, sink):
    model = circuit(0.05 + 1e-4, sink=sink)
    lists = long_lists(model.tokenizer, k, 160, 4, block_size=192)
    expected = k / (lists.n + (sink or 0)) - (0.05 + 1e-4)
    assert preference(model, lists).numpy() == pytest.approx(2**0.5 * expected.numpy(), rel=0.9)
    assert np.array_equal(preference(model, lists).numpy() > 0, expected.numpy() > 0)


# ---- critical lengths ---------------------------------------------------------------------------------------


def step_curve(lengths, most=100):
    x = np.tile(np.arange(1, most + 1), (len(lengths), 1))
    return c.Curve(x, x < np.array(lengths)[:, None])


def test_a_clean_step_is_found_within_one_token():
    found = c.critical(step_curve([40] * 20), np.random.default_rng(0))
    assert abs(found.value - 39.5) <= 1 and found.status == "crosses" and found.sign_changes == 1


def test_spread_steps_have_an_interval_that_holds_the_truth():
    lengths = np.random.default_rng(1).integers(30, 61, size=64)
    found = c.critical(step_curve(lengths), np.random.default_rng(0))
    assert found.low <= np.median(lengths) <= found.high and found.high - found.low < 12 and found.error > 0.3


@pytest.mark.parametrize(("lengths", "status", "value"), [([1000] * 5, "above", 100), ([0] * 5, "below", 1)])
def test_lengths_outside_what_was_asked(lengths, status, value):
    found = c.critical(step_curve(lengths), np.random.default_rng(0))
    assert (found.status, found.value) == (status, value)


def noisy(p, seed=0, prompts=64):
    """Independent answers that are correct with probability p(n)."""
    x = np.tile(np.arange(1, 401), (prompts, 1))
    return c.Curve(x, np.random.default_rng(seed).random(x.shape) < p(x))


@pytest.mark.parametrize(
    ("p", "status"),
    [
        (lambda n: np.where(n < 100, 0.98, 0.47), "none"),  # falls to one half and stays there
        (lambda n: np.where((n > 100) & (n < 160), 0.1, 0.97), "none"),  # falls and recovers
        (lambda n: np.where(n < 100, 0.05, 0.95), "none"),  # rises, so there is no failure length
        (lambda n: np.full(n.shape, 0.8), "above"),
        (lambda n: 0.5 + 0.4 * np.cos(n / 15), "none"),
        (lambda n: 1 / (1 + np.exp((n - 150) / 30)), "crosses"),
        (lambda n: np.where(n < 150, 0.99, 0.01), "crosses"),
    ],
)
def test_which_curves_have_a_critical_length(p, status):
    found = c.critical(noisy(p), np.random.default_rng(0), resamples=20)
    assert found.status == status
    if status == "crosses":
        assert abs(found.value - 150) < 6


def test_logistic_fit_against_sklearn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.uniform(0, 100, 4000)
    y = (rng.random(4000) < 1 / (1 + np.exp((x - 55) / 9))).astype(float)
    ours = c.logistic_fit(x, y, ridge=0)
    theirs = LogisticRegression(C=1e9, max_iter=1000).fit((x[:, None] - 50) / 30, y)
    slope = theirs.coef_[0, 0] / 30
    assert ours == pytest.approx((theirs.intercept_[0] - 50 * slope, slope), rel=1e-3)


def test_laws_from_two_lengths():
    laws = c.fit_laws({2: 30.0, 3: 50.0})
    assert laws["affine"][0](5) == pytest.approx(90)
    assert laws["sink"][0](5) == pytest.approx(90) and laws["sink"][1]["sigma"] == pytest.approx(10)
    assert laws["constant"][0](9) == pytest.approx(40)
    assert laws["seed"][1]["theta"] == pytest.approx(13 / 210)
    # A line with a positive intercept would need a negative sink, so the sink law then equals the seed's law.
    assert c.fit_laws({2: 30.0, 3: 40.0})["sink"][1]["sigma"] == 0


# ---- whole experiments, able to come out either way ---------------------------------------------------------


@cache
def result_of(name, kind):
    model = {
        "mean": lambda: circuit(),
        "late": lambda: circuit(0.032),  # k = 6 fails beyond the context, as the law predicts
        "sink": lambda: circuit(0.04, sink=24.0),
        "length": lambda: circuit(0.02, evidence="<s>"),
        "untrained": lambda: untrained(circuit()),
        "never": lambda: circuit(1e-6),
    }[kind]()
    options = {
        "dilution": {"calibrate": (2, 3), "predict": (4, 5, 6)},
        "agreement": {"amounts": (2, 3, 4, 5)},
        "distractors": {"k": 6, "step": 8},
    }[name]
    if name != "distractors":
        options["controls"] = Controls({"untrained": untrained(model)})
    if kind == "mean" and name == "distractors":
        model = circuit(0.06)  # right at depth 1 from 17 tokens, and at k = 6 up to 100
    return experiments.run(name, model, **FAST, **options)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("mean", "reproduced"),
        ("late", "reproduced"),
        ("sink", "not reproduced"),
        ("length", "not testable here"),  # answers the same at both depths, so it cannot do the task
        ("untrained", "not testable here"),
        ("never", "not testable here"),
    ],
)
def test_dilution_verdicts(kind, verdict):
    result = result_of("dilution", kind)
    assert result.verdict == verdict, result.measured["summary"]


def test_without_a_calibrated_law_dilution_is_not_testable():
    """Laws by intervention exist even if a calibration amount never crosses, as in the model without TopK."""
    x = np.tile(np.arange(10.0, 90, 4), (8, 1))
    crossing = c.critical(c.Curve(x, x < 50), np.random.default_rng(0))
    assert crossing.status == "crosses"
    measured = dict.fromkeys((4, 5, 6), crossing)
    assert dilution.verdict(measured, (4, 5, 6), {"weighted, intervention": False}, True) == "not testable here"
    assert dilution.verdict(measured, (4, 5, 6), {"seed": False}, True) == "not reproduced"


def test_dilution_of_the_mean_is_k_over_theta():
    measured = result_of("dilution", "mean").measured["critical_length"]
    for k in (2, 3, 4, 5, 6):
        assert measured[str(k)]["value"] == pytest.approx(k / 0.05, abs=2)


def test_the_sink_is_told_from_the_plain_mean():
    result = result_of("dilution", "sink")
    holds = result.measured["law_holds"]
    assert holds["sink"] and not holds["seed"]
    # n* = k/θ - σ, with θ = 0.04 and σ = 24 as built in.
    said = result.prediction["critical_length"]["sink"]
    assert said == pytest.approx({str(k): k / 0.04 - 24 for k in (4, 5, 6)}, abs=6)


@pytest.mark.parametrize(
    ("kind", "verdict"), [("mean", "reproduced"), ("sink", "not reproduced"), ("length", "not testable here")]
)
def test_agreement_verdicts(kind, verdict):
    result = result_of("agreement", kind)
    assert result.verdict == verdict, result.measured["summary"]


@pytest.mark.parametrize(("kind", "verdict"), [("mean", "reproduced"), ("length", "not testable here")])
def test_distractor_verdicts(kind, verdict):
    result = result_of("distractors", kind)
    assert result.verdict == verdict, str(result.prediction["d"]) + result.measured["summary"]


def test_distractors_of_the_mean():
    result = result_of("distractors", "mean")
    n0, fewest = result.prediction["n0"], result.measured["fewest"]
    for name in ("comment words", "one letter"):
        assert fewest[name]["value"] == pytest.approx(6 / 0.06 - n0, abs=4), name
    # "[]" adds so much evidence of its own that the circuit never flips; the law predicts this, and it is what happens.
    assert result.prediction["d"]["matched []"] is None and fewest["matched []"]["status"] == "above"
    assert result.null["moved_least_accuracy"] == 1.0


def test_a_crossing_between_two_coarse_steps_is_found():
    model = circuit(0.06)
    result = experiments.run("distractors", model, k=2, step=40, elements=4, **FAST)  # it fails at 2 / 0.06 = 33 tokens
    n0 = result.prediction["n0"]
    assert 0 < 33 - n0 < 40
    assert result.measured["fewest"]["one letter"]["value"] == pytest.approx(33 - n0, abs=4)


def test_comments_are_whole_units_with_their_brackets_matched():
    model = circuit()
    for name, filler in CLASSES.items():
        comment = comment_lines(model, filler, 60)
        assert comment.lines[0] == [] and len(comment.lines) > 8
        for line, evidence in zip(comment.lines, comment.evidence, strict=True):
            text = model.tokenizer.decode(line) if line else ""
            assert text.count("[") == text.count("]") == evidence and len(line) <= 60, name
            assert all(model.tokenizer.single(closer) not in line for closer in ("]\n", "]]\n"))
            assert [model.tokenizer.single("[")] * evidence == [i for i in line if i == model.tokenizer.single("[")]


def test_results_are_json_with_the_prediction_first():
    for result in (result_of("dilution", "mean"), experiments.run("minimal_simulator", None)):
        read = json.loads(result.to_json())
        provenance = read["provenance"]
        # Equal times are allowed, because a clock may not advance in between; test_the_order_is_enforced checks the
        # order.
        assert provenance["predicted_at"] <= provenance["measuring_from"] <= provenance["measured_at"]
        assert set(read) == set(vars(result))


# ---- the protocol -------------------------------------------------------------------------------------------


def test_a_prediction_is_frozen_when_it_is_made():
    protocol = Protocol("x", "?", "", {})
    said = {"n": [14]}
    protocol.predict(said)
    said["n"].append(99)
    protocol.measuring()
    result = protocol.conclude(measured={}, interval={}, null={}, verdict="reproduced")
    assert result.prediction == {"n": [14]}


def test_the_order_is_enforced():
    protocol = Protocol("x", "?", "", {})
    with pytest.raises(RuntimeError, match="predict"):
        protocol.measuring()
    with pytest.raises(RuntimeError, match="predict"):
        protocol.conclude(measured={}, interval={}, null={}, verdict="reproduced")
    protocol.predict({})
    with pytest.raises(RuntimeError, match="x: a prediction was made already"):
        protocol.predict({})
    with pytest.raises(RuntimeError, match="measuring"):
        protocol.conclude(measured={}, interval={}, null={}, verdict="reproduced")
    protocol.measuring()
    with pytest.raises(ValueError, match="allowed"):
        protocol.conclude(measured={}, interval={}, null={}, verdict="confirmed")


def test_plain_values():
    assert plain({1: np.array([1.5, np.nan]), "b": (np.int64(2), float("inf"), True)}) == {
        "1": [1.5, None],
        "b": [2, None, True],
    }


def test_the_minimal_simulator_is_exact_and_could_fail(monkeypatch):
    from scalpel.experiments.brackets import minimal_simulator

    assert minimal_simulator.run().verdict == "reproduced"
    monkeypatch.setattr(minimal_simulator, "simulate", lambda k, n, theta: k >= theta * n)  # wrong at equality
    assert minimal_simulator.run().verdict == "not reproduced"


def test_unknown_names_and_options_say_what_there_is():
    with pytest.raises(ValueError, match="dilution"):
        experiments.run("nonsense", None)
    with pytest.raises(ValueError, match="no option 'promts'"):
        experiments.run("dilution", circuit(), promts=3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dilution", {"calibrate": 9}, r"list of whole numbers, such as \[2, 3\]"),
        ("dilution", {"calibrate": [2, 2]}, "all distinct"),
        ("dilution", {"prompts": True}, "whole number"),
        ("dilution", {"prompts": 1}, "2 or more"),
        ("dilution", {"offsets": 600}, "from 0 to 128"),
        ("dilution", {"least_accuracy": float("nan")}, "from 0 to 1"),
        ("dilution", {"controls": 3}, "Controls"),
        ("agreement", {"amounts": [2, 3, 3]}, "distinct"),
        ("agreement", {"width": 0}, "of 1 to 64"),
        ("distractors", {"step": 0}, "1 or more"),
        ("distractors", {"elements": 60}, "give fewer"),
        ("minimal_simulator", {"k_max": 0}, "2 or more"),
        ("minimal_simulator", {"seed": -1}, "0 or more"),
    ],
)
def test_bad_options_are_named(name, options, says):
    with pytest.raises(ValueError, match=says):
        experiments.run(name, circuit(), **options)
