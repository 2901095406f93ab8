"""The causes experiment finds known causes of a failure, and rejects what is not a cause."""

import numpy as np
import pytest
import torch

from bracket_fixtures import small_tokenizer
from scalpel import experiments
from scalpel.experiments.brackets import calibration, head_measures, laws
from scalpel.experiments.brackets import head as h
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.models.untrained import untrained
from scalpel.tasks.brackets import long_lists
from scalpel.tasks.evidence import PLACES, evidence_lists

THETA = 0.05


def circuit(theta=THETA, **options):
    return threshold_circuit(small_tokenizer(), theta, block_size=192, **options)


# ---- prompts of a factorial design --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 41, 120])
@pytest.mark.parametrize(("opened", "closed"), [(1, 0), (2, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("place", PLACES)
def test_a_cell_has_just_its_tokens_and_brackets(n, opened, closed, place):
    tokenizer = small_tokenizer()
    cell = evidence_lists(tokenizer, n, 6, opened=opened, closed=closed, place=place, block_size=192)
    assert cell.ids.shape == cell.positions.shape == cell.filler.shape == (6, n)
    for row, filler in zip(cell.ids, cell.filler, strict=True):
        text = tokenizer.decode(row)
        assert text.count("[") == opened + closed and text.count("]") == closed
        assert text.count("[") - text.count("]") == opened
        assert not any("[" in tokenizer.decode([i]) or "]" in tokenizer.decode([i]) for i in row[filler].tolist())
        assert text[-1] not in "[], "


def test_early_and_late_have_the_same_tokens_in_another_order():
    early, late = (
        evidence_lists(small_tokenizer(), 80, 4, opened=2, closed=2, place=place, block_size=192) for place in PLACES
    )
    texts = [small_tokenizer().decode(cell.ids[0]) for cell in (early, late)]
    assert texts[0].rindex("[") < texts[1].rindex("[")
    # The beginnings of the lists differ in length.
    assert int(early.filler[0].sum()) == pytest.approx(int(late.filler[0].sum()), abs=8)


def test_a_cell_without_room_says_so():
    with pytest.raises(ValueError, match="no room"):
        evidence_lists(small_tokenizer(), 12, 2, opened=2, closed=3, place="late", block_size=192)


# ---- the head, its direction and its threshold ---------------------------------------------------------------


@pytest.mark.parametrize("sink", [None, 12.0])
def test_the_constructed_head_is_found_to_be_a_mean_with_its_theta(sink):
    model = circuit(sink=sink)
    head = h.find_head(model, prompts=8)
    assert head.name == "0.0" and head.share == pytest.approx(1, abs=0.01)
    found = calibration.calibrate(model, (2, 3, 4), prompts=8, head=head)
    law = found.law()
    # u is in the head's own units; measured in units of one bracket, θ is the value that was built in.
    assert found.theta / law.u[laws.OPEN] == pytest.approx(THETA, rel=0.01)
    assert found.by_intervention()["weighted"] == pytest.approx(
        {k: k / THETA - (sink or 0) for k in (2, 3, 4)}, rel=0.02
    )
    assert found.by_intervention()["sink"] == pytest.approx({k: k / THETA - (sink or 0) for k in (2, 3, 4)}, rel=0.02)
    measures = head_measures.measure(model, head, 2, 150, prompts=4, seed=0)
    verdict = head_measures.is_mean(measures)
    assert verdict["mean"], verdict
    assert measures["sigma"] == pytest.approx(sink or 0.0, abs=0.01)
    crossing = head_measures.crossing(measures, found.theta)
    # Interpolated linearly between the measured lengths.
    assert crossing == pytest.approx(2 / THETA - (sink or 0), abs=4)


def test_a_law_from_one_length_foretells_the_others():
    found = calibration.calibrate(circuit(sink=12.0), (2, 3, 4), prompts=8)
    lengths = found.from_length(2, 2 / THETA - 12)
    assert lengths["weighted"] == pytest.approx({k: k / THETA - 12 for k in (2, 3, 4)}, rel=0.03)
    assert lengths["seed"][4] == pytest.approx(2 * (2 / THETA - 12))  # which misses: there is a sink


def test_a_head_that_prefers_some_keys_is_no_mean():
    model = circuit()
    n = np.array([10.0, 50.0, 100.0])
    even = {"n": n, "sigma": np.full(3, 2.0), "uniformity": np.full(3, 0.99), "decay": np.full(3, -0.0001)}
    assert head_measures.is_mean(even)["mean"]
    for name, worse in (("uniformity", np.full(3, 0.5)), ("decay", np.full(3, -0.01)), ("sigma", np.array([2, 2, 9]))):
        assert head_measures.is_mean(even | {name: worse})["fails_by"] == [name]
    head = h.find_head(model, prompts=4)
    lists = long_lists(model.tokenizer, 2, 100, 4, block_size=192)
    with torch.no_grad():  # every query looks for brackets
        model.transformer.h[0].attn.c_attn.weight[:4, 3] = 1.0
        model.transformer.h[0].attn.c_attn.weight[4:8, 0] = 1.0
    reading = h.read(model, head, lists, torch.tensor([20]))
    assert float(reading.uniformity.max()) < 0.9
    assert reading.attended == pytest.approx(1.0)


def test_nothing_carries_the_depth_in_a_model_that_says_the_same():
    model = circuit()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="no head carries"):
        h.find_head(model, prompts=4)


def test_classes_of_tokens_match_brackets():
    tokenizer = small_tokenizer()
    ids = [0, *tokenizer.encode("x = [[1], [2, 3")]
    names = [laws.CLASSES[i] for i in laws.token_classes(ids, tokenizer, start=(0,))]
    assert names[0] == "start" and names[1] == "head"
    assert [n for n in names if n in ("open", "closed", "closer")] == ["open", "closed", "closer", "open"]
    assert names[-1] == "element"


def test_tokens_left_is_zero_where_the_law_fails():
    model = circuit()
    found = calibration.calibrate(model, (2, 3), prompts=8)
    from dataclasses import replace

    law = replace(found.law(), tokenizer=model.tokenizer, start=(0,))
    lists = long_lists(model.tokenizer, 2, 60, 1, block_size=192)
    row, asked = lists.ids[0].tolist(), lists.asked[0].tolist()
    left = [law.tokens_left(row[: a + 1]) for a in asked]
    assert left[0] > 0 > left[-1] and np.diff(left) == pytest.approx(-2, abs=0.1)
    failing = next(a + 1 for a, tokens in zip(asked, left, strict=True) if tokens <= 0)
    assert failing == pytest.approx(2 / THETA, abs=2)


# ---- interventions -------------------------------------------------------------------------------------------


def test_a_mean_is_restored_by_taking_the_filler_away():
    result = experiments.run("causes", circuit(0.03), prompts=8, offsets=16)
    assert result.verdict == "reproduced", result.measured["summary"]
    assert result.measured["right"]["as it is"] == 0 and result.measured["right"]["filler not read"] == 1
    shares = result.measured["factors"]["share"]
    assert shares["log n"] > 0.2 and shares["late"] < 0.02  # a mean ignores the order
    assert shares["closed"] > 0.1  # for a mean, a closed bracket is evidence too


def test_a_model_that_goes_by_length_is_not_restored_by_count():
    # The model decides by 1 / n > θ: only the start token counts, and the depth does not.
    result = experiments.run("causes", circuit(0.02, evidence="<s>"), prompts=8, offsets=16)
    assert result.verdict == "not testable here"
    result = experiments.run("causes", untrained(circuit()), prompts=8, offsets=16, nulls=())
    assert result.verdict == "not testable here"


def test_a_law_whose_filler_helps_has_no_critical_length():
    counts = np.array([1.0, 3, 2, 0, 0, 10, 10])

    def law(element, theta=0.5):
        u = np.array([0, 0, 1, 1, 0, element, element], dtype=float)
        return laws.WeightedLaw(np.ones(7), u, 1.0, theta, small_tokenizer())

    assert law(0.0).critical_length(counts) < counts.sum()  # the critical length is already exceeded
    assert np.isinf(law(0.9).critical_length(counts))  # the filler alone exceeds θ
    helped = laws.WeightedLaw(np.ones(7), np.array([0, -9.0, 1, 1, 0, 0.6, 0.6]), 1.0, 0.5, small_tokenizer())
    assert helped.surplus(counts) < 0 < helped.per_token()
    assert np.isnan(helped.critical_length(counts)) and helped.tokens_left(small_tokenizer().encode("x = [[a")) <= 0
    assert np.isnan(law(0.0, float("nan")).critical_length(counts))


def test_the_sink_says_nothing_where_the_evidence_says_one():
    found = calibration.calibrate(circuit(), (2, 3), prompts=4)
    assert np.isfinite(list(found.from_length(2, 40)["sink"].values())).all()
    turned = calibration.calibrate(circuit(), (2, 3), prompts=4, head=found.head, u=-found.head.u, thetas=False)
    assert np.isnan(list(turned.from_length(2, 40)["sink"].values())).all()


def test_short_contexts_are_not_the_beginnings_of_those_measured():
    model = circuit()
    short = h.short_lists(model, 2, 2, 8, seed=0).ids
    for salt in (0, 1, 2, 3, 4, 5, 6, 8, 9, 71):
        lists = long_lists(model.tokenizer, 2, 128, 8, block_size=192, seed=salt).ids[:, : short.shape[1]]
        assert not (short[:1] == lists[:1]).all()


def test_a_list_without_room_for_its_rows_names_both():
    with pytest.raises(ValueError, match=r"k = 20: .* tokens, and lists of 48"):
        long_lists(small_tokenizer(), 20, 48, 2, block_size=192)


@pytest.mark.parametrize("name", ["dilution", "agreement", "causes", "distractors"])
def test_without_a_tokenizer_it_says_what_is_missing(name):
    model = circuit()
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        experiments.run(name, model)


def test_amounts_that_repeat_are_refused():
    with pytest.raises(ValueError, match="all distinct"):
        experiments.run("dilution", circuit(), predict=(4, 4))


def test_an_unknown_null_is_refused():
    with pytest.raises(ValueError, match="unknown null 'permuted'"):
        experiments.run("causes", circuit(), nulls=("permuted",))
