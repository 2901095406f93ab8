"""The guard counts correctly, acts once and in time, and its experiment matches the model's algorithm."""

import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch

from bracket_fixtures import small_tokenizer
from circuitgpt_cases import one_thread
from scalpel import experiments
from scalpel.experiments.brackets import guard as experiment
from scalpel.experiments.brackets import guard_prompts
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.experiments.brackets.guard_prompts import held_out_prompts, lengthened
from scalpel.guard.hole_guard import HoleGuard, HoleReached, open_lists
from scalpel.models.untrained import untrained
from scalpel.report.pictures.figures import to_svg
from scalpel.semigroup import ThresholdCounter
from scalpel.tasks import held_out
from scalpel.tasks.literals import literals_of

__all__ = ["one_thread"]

LAW = ThresholdCounter("1/10")  # two brackets suffice for up to 19 tokens
NESTED = "x = [[a, a"


@cache
def circuit(theta=0.04, **options):
    return threshold_circuit(small_tokenizer(), theta, block_size=192, **options)


def guard(**options):
    return HoleGuard(circuit(), options.pop("law", LAW), **options)


def ids(text):
    return [small_tokenizer().token_to_id("<s>"), *small_tokenizer().encode(text)]


def grown(elements):
    return torch.tensor([ids("x = [[" + ", ".join("a" * elements))])


# ---- distances --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("x = [[1, 2], [3", 2),
        ("x = [1, 2]\ny = [", 1),
        ("x = '[['\ny = [\"[[\", [f", 2),
        ("# [[ no list\nx = [(1, [2", 2),
        ('"""[[\n[[', 0),
        ('"""[["""\n[[[', 3),
        ("it's [ an\n[", 1),
        ("x = 'a\\'[' + [", 1),
        ("f([1, (2, {3: [4)", 1),
        ("]])[[", 2),
        ("", 0),
    ],
)
def test_open_lists(text, count):
    assert open_lists(text) == count


@pytest.mark.parametrize("text", ["x = [[a", NESTED, "x = [[a], [b], [c, d", "x = [[[a, b", "# [ \nx = [[a"])
def test_the_distance_is_what_the_counter_leaves(text):
    found = guard(evidence="all").distance(text)
    k, n = text.count("["), len(ids(text))
    assert (found.k, found.n, found.tokens_left) == (k, n, 10 * k - n)
    assert found.critical_length == 10 * k and found.failing == (not LAW.decide(k, n))
    same = guard(evidence="all")
    assert same.distance(ids(text)) == found == same.distance(torch.tensor(ids(text)))
    by_open = guard().distance(text)
    assert by_open.k == open_lists(text) and by_open.tokens_left == 10 * open_lists(text) - n


def test_adding_tokens_comes_nearer_until_the_counter_fails():
    found = [guard().distance(grown(i)[0]) for i in range(2, 14)]
    assert [one.tokens_left for one in found] == [found[0].tokens_left - 2 * i for i in range(12)]
    assert [one.failing for one in found] == [not LAW.decide(2, one.n) for one in found]
    assert {one.failing for one in found} == {True, False}


@pytest.mark.parametrize("text", ["x = [a, b", "x = 3", "x = [[a], [b]]\ny = [a", "x = '[[' + a"])
def test_where_no_nested_list_is_open_nothing_can_fail(text):
    found = guard(law=ThresholdCounter(100)).distance(text)
    assert math.isinf(found.tokens_left) and not found.failing and "no failure" in str(found)


class Until:
    """Another kind of law: it fails at a fixed length, whatever the evidence."""

    def __init__(self, length):
        self.length = length

    def tokens_left(self, ids):
        return self.length - len(ids)


def test_any_object_that_counts_tokens_is_a_law():
    found = guard(law=Until(12)).distance(NESTED)
    assert found.tokens_left == 12 - len(ids(NESTED)) and math.isinf(guard(law=Until(12)).distance("x").tokens_left)
    with pytest.raises(ValueError, match="NaN"):
        guard(law=Until(float("nan"))).distance(NESTED)


class Backwards:
    """A law that predicts the opposite of what happens."""

    def tokens_left(self, ids):
        return len(ids) - 40


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"law": 0.15}, TypeError, "law is 0.15"),
        ({"law": ThresholdCounter}, TypeError, "law is <class"),
        ({"on_failure": "ignore"}, ValueError, "'warn', 'stop'"),
        ({"margin": float("nan")}, ValueError, "finite number"),
        ({"evidence": "most"}, ValueError, "'all', 'open'"),
    ],
)
def test_bad_options(options, error, says):
    with pytest.raises(error, match=says):
        guard(**options)


def test_bad_prompts_and_a_model_without_text():
    with pytest.raises(TypeError, match="must be integers"):
        guard().distance([1.5, 2.0])
    with pytest.raises(ValueError, match="empty"):
        guard().distance([])
    with pytest.raises(ValueError, match="one row"):
        guard().distance(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="tokenizer="):
        HoleGuard(torch.nn.Linear(2, 2), LAW)
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        guard()(torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 5))


# ---- acting -----------------------------------------------------------------------------------------


def grow(watch, lengths=range(2, 14)):
    """One generation that adds an element and a comma at a time; returns what the guard reported at each token."""
    longest = grown(max(lengths))
    return [watch(longest[:, :n], torch.zeros(1, 9)) for n in range(grown(min(lengths)).shape[1], longest.shape[1] + 1)]


@pytest.mark.parametrize(("margin", "left"), [(0, 0), (3, 3)])
def test_it_tells_once_a_crossing_and_again_in_the_next_generation(margin, left):
    told = []
    watch = guard(on_failure=told.append, margin=margin)
    assert all(bool((scores == 0).all()) for scores in grow(watch))
    assert [one.tokens_left for one in told] == [left]
    grow(watch)
    assert len(told) == 2
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        grow(guard(margin=margin))
    assert len(seen) == 1 and "k = 2" in str(seen[0].message)


def test_rows_that_change_places_are_not_told_twice():
    told = []
    watched = guard(on_failure=told.append)
    rows = torch.cat([grown(12), grown(3).new_zeros(0, grown(12).shape[1]), grown(12)])
    rows[1, -2:] = torch.tensor(ids("b, ")[1:3])
    watched(rows, torch.zeros(2, 8))
    seen = len(told)
    assert seen == 2
    comma = small_tokenizer().encode(", ")[0]
    longer = torch.cat([rows.flip(0), torch.full((2, 1), comma)], 1)
    watched(longer, torch.zeros(2, 8))
    assert len(told) == seen
    watched(longer[:, :-3], torch.zeros(2, 8))  # another generation
    assert len(told) > seen


def test_stop_ends_the_row_that_fails_and_leaves_the_others():
    rows = torch.tensor([ids(NESTED) + [ids("a")[-1]] * 12, ids("x = [a, a") + [ids("a")[-1]] * 13])
    scores = torch.randn(2, 20)
    before = scores.clone()
    out = guard(on_failure="stop", eos_token_id=7)(rows, scores)
    assert out[0].argmax() == 7 and out[0].isinf().sum() == 19
    assert out[1].equal(before[1]) and scores.equal(before)


def test_stop_without_an_end_token_raises_what_was_reached():
    watch = guard(on_failure="stop")
    assert watch.eos == []
    with pytest.raises(HoleReached, match="k = 2, n = 20.*critical length 20 is reached.*eos_token_id") as caught:
        grow(watch)
    assert caught.value.distance.n == 20 and caught.value.row == 0


def test_padding_is_no_context():
    texts = ["x = [[a, a, a, a", "x = [[a", "x = [[a], [b, c, d, e"]
    batch, mask = small_tokenizer().batch(texts, side="left")
    pad = small_tokenizer().single("~")
    padded = torch.where(mask == 1, batch, pad)
    expected = [guard().distance(row[one == 1]) for row, one in zip(batch, mask, strict=True)]
    assert len({one.n for one in expected}) == 3
    for watch, given in ((guard(pad_token_id=pad), padded), (guard(attention_mask=mask), batch)):
        watch(given, torch.zeros(3, 5))
        assert watch.distances == expected
    beams = guard(attention_mask=mask)
    beams(batch.repeat_interleave(2, 0), torch.zeros(6, 5))
    assert beams.distances == [one for one in expected for _ in range(2)]
    done = guard(pad_token_id=pad)
    done(torch.cat([padded, torch.full((3, 1), pad)], 1), torch.zeros(3, 5))
    assert done.distances == [None] * 3


def test_it_is_a_logits_processor_of_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer()
    end, pad = tokenizer.single("~"), tokenizer.single("^")
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=1,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight)  # it always generates token 0
    batch, mask = tokenizer.batch(["x = [[a, a, a, a", "x = [[a", "x = [a, a"], side="left")
    batch = torch.where(mask == 1, batch, pad)

    def lengths(**options):
        out = model.generate(batch, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)
        return [int((~torch.isin(row, torch.tensor([end, pad]))).sum()) for row in out]

    alone = mask.sum(1) + 24
    assert lengths() == alone.tolist()
    watch = HoleGuard(model, LAW, tokenizer=tokenizer, on_failure="stop", margin=1)
    assert lengths(logits_processor=[watch]) == [19, 19, int(alone[2])]
    with pytest.warns(UserWarning, match="k = 2, n = 20"):
        assert lengths(logits_processor=[HoleGuard(model, LAW, tokenizer=tokenizer)]) == alone.tolist()


# ---- the experiment ---------------------------------------------------------------------------------


def library(count=260):
    """Nested lists as a library might contain them, with rows of any number and length."""
    rng = np.random.default_rng(3)
    lines = []
    for i in range(count):
        rows = rng.integers(1, 36, size=int(rng.integers(1, 4)))
        lines.append(f"v{i % 7} = [{', '.join('[' + ', '.join('abc'[i % 3] * n) + ']' for n in rows)}]")
    return "\n".join(lines) + "\n"


@pytest.fixture
def lists(monkeypatch):
    found = tuple(one for i in range(6) for one in literals_of(library(), f"file{i}.py"))
    monkeypatch.setattr(guard_prompts, "literals", lambda: found)
    return found


def test_lengthened_prompts_are_the_real_ones_with_more_of_their_own(lists):
    (one,) = literals_of("x = [\n    [1, 2],\n    [3, 4]]\n")
    assert lengthened(one, 0, whole_rows=True) == one.prompt == lengthened(one, 0, whole_rows=False)
    assert lengthened(one, 3, whole_rows=False) == one.prompt + ", 1, 2, 3"
    assert lengthened(one, 3, whole_rows=True) == "x = [\n    [1, 2],\n    [3],\n    [1, 2],\n    [3, 4"
    asked = held_out_prompts(circuit(), 60, np.random.default_rng(0))
    real = {small_tokenizer().decode(row[1:]) for row, kept in zip(asked.rows, asked.real, strict=True) if kept}
    assert real <= {one.prompt for one in lists} and len(real) == 60
    longest = [max(len(r) for r, k in zip(asked.rows, asked.real, strict=True) if k == kept) for kept in (True, False)]
    assert max(longest) <= 192 and longest[1] > 150
    for row, kept, origin in zip(asked.rows, asked.real, asked.prompt, strict=True):
        assert open_lists(small_tokenizer().decode(row[1:])) == 2
        assert kept or len(row) > len(asked.rows[origin])


FAST = {"prompts": 80, "offsets": 16}


@cache
def result_of_the_counter():
    return experiment.run(circuit(), **FAST)


@pytest.mark.parametrize(
    ("kind", "options", "verdict"),
    [
        ("mean", {}, "reproduced"),  # the model implements the law
        # Only the length, under another name, so it cannot beat the length.
        ("mean", {"law": Until(40)}, "indistinguishable"),
        # Considers longer texts safer, so it is worse than the length.
        ("mean", {"law": Backwards()}, "not reproduced"),
        ("length", {}, "not testable here"),  # answers the same at both depths
        ("untrained", {}, "not testable here"),
        ("never", {}, "not testable here"),  # never fails
    ],
)
def test_verdicts(lists, kind, options, verdict):
    model = {
        "mean": circuit,
        "length": lambda: circuit(0.05, evidence="<s>"),
        "untrained": lambda: untrained(circuit()),
        "never": lambda: circuit(1e-6),
    }[kind]()
    plain = kind == "mean" and not options
    result = result_of_the_counter() if plain else experiment.run(model, **FAST, **options)
    assert result.verdict == verdict, result.measured["summary"]
    for name, figure in result.figures.items():
        assert to_svg(figure, name)
    assert result.provenance["predicted_at"] < result.provenance["measuring_from"] and result.to_json()


def test_the_counters_distance_is_perfect_on_a_counter_and_nothing_else_is(lists):
    result = result_of_the_counter()
    area = result.measured["auroc"][result.measured["judged_on"]]
    assert area["law"] > 0.99 > 0.97 > area["n"] and area["open"] < 0.97
    rates = result.measured["alarms_at_margin_0"]
    assert rates["law"]["missed"]["rate"] < 0.1 > rates["law"]["false"]["rate"]
    assert rates["open"]["false"]["rate"] > 0.1  # it does not count closed rows, which are evidence here
    null = result.null
    assert null["shuffled"]["high"] < 0.75 and null["shuffled"]["at_least_the_laws"] == 0
    assert null["rotated"]["auroc"] < 0.75
    chosen = experiment.run(circuit(), nulls=("shuffled",), **FAST)
    assert "rotated" not in chosen.null and any("'untrained'" in note for note in chosen.measured["left_out"])


def test_areas_and_leads_against_sklearn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    failed, part = rng.random(300) < 0.4, rng.random(300) < 0.8
    scores = {name: np.round(failed * tilt + rng.normal(size=300), 1) for name, tilt in (("law", 2), ("n", 1))}
    scores["margin"] = np.where(rng.random(300) < 0.1, -np.inf, rng.normal(size=300))
    alone = experiment.judged(scores, failed, part, np.arange(300), rng)
    for name, score in scores.items():
        finite = np.maximum(score, -99)
        assert alone[name]["auroc"] == pytest.approx(roc_auc_score(failed[part], finite[part]))
        assert alone[name]["low"] < alone[name]["auroc"] < alone[name]["high"]
    lead = alone["law_minus_n"]
    assert lead["difference"] == pytest.approx(alone["law"]["auroc"] - alone["n"]["auroc"])
    assert 0 < lead["low"] < lead["difference"] < lead["high"]
    five = experiment.judged(scores, failed, part, np.arange(300) // 60, rng)
    assert five["law"]["auroc"] == alone["law"]["auroc"] and five["law"]["low"] != alone["law"]["low"]
    nothing = experiment.judged(scores, failed, np.zeros(300, dtype=bool), np.arange(300), rng)
    assert math.isnan(nothing["law"]["auroc"]) and math.isnan(nothing["law_minus_n"]["low"])


def test_bad_options_of_the_experiment(lists):
    with pytest.raises(ValueError, match="null 'random'.*untrained, rotated"):
        experiments.run("guard", circuit(), nulls=["random"])
    with pytest.raises(ValueError, match="40 or more"):
        experiments.run("guard", circuit(), prompts=3)
    nobody = circuit(0.2)
    nobody.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        experiments.run("guard", nobody)


def test_real_nested_lists_are_found_in_the_held_out_files(monkeypatch):
    few = [one for one in held_out.sources() if "]]\n" in one.text and len(one.text) < 30_000][:12]
    monkeypatch.setattr(held_out, "sources", lambda: tuple(few))
    held_out.literals.cache_clear()
    try:
        found = held_out.literals()
        assert {one.depth for one in found} >= {1, 2} and {one.source for one in found} <= {one.name for one in few}
    finally:
        held_out.literals.cache_clear()
