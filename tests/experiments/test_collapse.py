"""The collapse experiment: measures with known answers, controls for the effect of a mask alone, and both verdicts."""

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from bracket_fixtures import SOURCES, small_tokenizer
from scalpel import CircuitGPT, experiments
from scalpel.experiments.collapse import experiment as collapse
from scalpel.experiments.collapse import generators as collapse_generators
from scalpel.experiments.collapse.gather import Rows, Texts, gather, masked_afterwards, shuffled, topk_hooks
from scalpel.experiments.collapse.measure import VARIANTS, VERSION, compare, measure
from scalpel.experiments.collapse.training import CONTROLS, Difference, Study, measure_snapshot
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.training import study as training
from scalpel.training.loop import train
from scalpel.training.recipe import Recipe
from scalpel.training.text import TextCourse

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(post, activation=None, mask=None):
    post = torch.as_tensor(post, dtype=torch.float32)
    activation = (
        torch.randn(post.shape, generator=torch.Generator().manual_seed(9)) if activation is None else activation
    )
    mask = torch.ones(post.shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return Rows(torch.as_tensor(activation, dtype=torch.float32), post, mask, torch.arange(len(post)))


def one(rows, variant="pre.raw.centered"):
    return compare({"only": {"hook": rows}})["only"]["hook"][variant]


def exact(spectrum, basis, mean=0.0, tokens=512):
    """Rows whose covariance is exactly basisᵀ diag(spectrum) basis."""
    rows = RNG(0).standard_normal((tokens, len(spectrum)))
    rows -= rows.mean(0)
    rows = np.linalg.qr(rows)[0] * np.sqrt(tokens * np.array(spectrum))
    return rows @ basis + mean


def rotation(width, seed=1):
    return np.linalg.qr(RNG(seed).standard_normal((width, width)))[0]


# ---- spectra and scores with a known answer -----------------------------------------------------------------


def test_a_planted_collapse_is_found_and_the_moments_are_not_mixed():
    spectrum, basis = [6.0, 2.0, 1.0, 0.5, 0.25, 0.25], rotation(6)
    p = np.array(spectrum) / 10
    found = one(rows_of(exact(spectrum, basis)))
    assert (found.top1, found.top3) == (pytest.approx(0.6, abs=1e-5), pytest.approx(0.9, abs=1e-5))
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    # A mean of squared length 90 along the last direction leaves the covariance unchanged and is nine tenths of the
    # second moment.
    far = rows_of(exact(spectrum, basis, mean=basis[5] * np.sqrt(90)))
    assert one(far).top1 == pytest.approx(0.6, abs=1e-4)
    assert one(far, "pre.raw.second").top1 == pytest.approx(90.25 / 100, abs=1e-4)


def test_the_score_is_one_in_the_gradients_own_basis_zero_in_a_random_one_and_below_in_the_reverse():
    spectrum, basis = 2.0 ** -np.arange(8.0), rotation(8)
    gradient = exact(spectrum, basis)
    own = one(rows_of(gradient, exact(3 * spectrum, basis)))
    assert own.area == pytest.approx(1, abs=1e-4) and own.reverse_area == pytest.approx(1, abs=1e-4)
    assert one(rows_of(gradient, exact(spectrum[::-1], basis))).area == pytest.approx(-1, abs=1e-4)
    areas = [one(rows_of(gradient, exact(spectrum, rotation(8, seed)))).area for seed in range(2, 42)]
    assert abs(np.mean(areas)) < 3 * np.std(areas) / np.sqrt(40) and np.std(areas) < 0.5


def test_an_isotropic_gradient_has_full_rank_and_no_score():
    found = one(rows_of(RNG(3).standard_normal((20_000, 32))))
    assert found.effective_rank == pytest.approx(32, rel=0.01) and found.top1 < 0.04 and abs(found.area) < 0.3


def test_ten_outliers_in_twenty_thousand_tokens_lower_the_rank_of_raw_gradients_only():
    gradient = RNG(4).standard_normal((20_000, 32))
    gradient[:10, 0] += 500
    rows = rows_of(gradient)
    assert one(rows).effective_rank < 8
    assert one(rows, "pre.trimmed.centered").effective_rank > 31 and one(rows, "pre.unit.centered").effective_rank > 31


# ---- what a mask does by itself, and the control that catches it --------------------------------------------


def ranks(rows):
    found = compare({"own": {"h": rows}, "shuffled": shuffled({"h": rows}, RNG(5))})
    return found["own"]["h"], found["shuffled"]["h"]


def test_a_random_mask_lowers_the_rank_and_shuffled_supports_show_that_it_is_the_mask():
    gradient = RNG(6).standard_normal((4000, 32))
    mask = RNG(7).random(gradient.shape) < np.geomspace(0.9, 0.01, 32)  # channels are kept with unequal frequency
    own, other = ranks(rows_of(gradient, mask=mask))
    assert own["post.raw.centered"].effective_rank > 31 and own["pre.raw.centered"].effective_rank < 20
    assert other["pre.raw.centered"].effective_rank == pytest.approx(own["pre.raw.centered"].effective_rank, rel=0.05)


def test_supports_that_go_by_the_gradient_collapse_it_and_shuffled_ones_do_not():
    gradient = RNG(8).standard_normal((4000, 32))
    own, other = ranks(rows_of(gradient, mask=gradient > 0))  # the kept values point in one direction
    assert own["pre.raw.second"].top1 == pytest.approx((0.5 + 31 / (2 * np.pi)) / 16, rel=0.03)
    assert own["pre.raw.second"].effective_rank < 0.8 * other["pre.raw.second"].effective_rank
    assert other["pre.raw.second"].top1 < 0.04 and own["post.raw.second"].top1 < 0.04


def test_any_mask_raises_the_rank_of_a_gradient_of_low_rank():
    gradient = RNG(11).standard_normal((4000, 1)) * np.ones(32)
    own, _ = ranks(rows_of(gradient, mask=RNG(12).random(gradient.shape) < 0.25))
    assert own["post.raw.centered"].effective_rank < 1.01 and own["pre.raw.centered"].effective_rank > 5


def test_dead_channels_are_taken_off_before_ranks_are_compared():
    full = RNG(13).standard_normal((8000, 32))
    half = rows_of(RNG(14).standard_normal((8000, 32)) * (np.arange(32) < 16))
    found = compare({"full": {"h": rows_of(full)}, "half": {"h": half}})
    a, b = found["full"]["h"]["pre.raw.centered"], found["half"]["h"]["pre.raw.centered"]
    assert (a.live, b.live, a.equal_channels, b.equal_channels) == (32, 16, 16, 16)
    assert a.effective_rank > 1.9 * b.effective_rank and a.equal_rank == pytest.approx(b.equal_rank, rel=0.01)
    # Channels that are dead in both models must not count as alignment either.
    activation = RNG(15).standard_normal((8000, 32)) * (np.arange(32) < 16)
    assert abs(one(rows_of(half.post, activation)).area) < 0.4


# ---- gradients at the AbsTopKs ------------------------------------------------------------------------------


def small(afrac=0.25, locations="attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out", seed=0):
    config = CircuitGPTConfig(
        block_size=48,
        vocab_size=40,
        n_layer=2,
        n_head=2,
        d_model=16,
        afrac=afrac,
        afrac_loctypes=locations,
        rms_norm=True,
    )
    return CircuitGPT(config, seed=seed).double()


def texts(count=3, length=12, vocab=40):
    ids = torch.from_numpy(RNG(16).integers(vocab, size=(count, length)))
    mask = torch.arange(length) < torch.tensor([[length - i] for i in range(count)])
    return [Texts(ids, mask)]


@pytest.mark.parametrize("locations", ["attn_v,mlp_neuron,mlp_out", "resid_post_attn,resid_post_mlp"])
def test_gradients_are_those_of_the_summed_loss_and_masks_those_of_the_pass(locations):
    model, batch = small(locations=locations), texts()[0]
    hooks = topk_hooks(model)
    assert len(hooks) == 2 * len(locations.split(","))
    gathered = gather(model, [batch], hooks)
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)

    @torch.no_grad()
    def loss(hook, step):
        def nudge(value, name):
            return value + step

        logits = model.run_with_hooks(batch.ids, [(hook, nudge)])[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))

    real = batch.mask[:, 1:].nonzero()
    for hook in hooks:
        rows = gathered.rows[hook]
        width = rows.post.shape[1]
        assert len(rows.post) == len(real) == 11 + 10 + 9 and bool((rows.mask.sum(1) == width // 4).all())
        assert torch.equal(rows.text, real[:, 0]) and not bool(rows.activation[~rows.mask].any())
        for row in (0, 14, 29):
            text, token = real[row].tolist()
            step = torch.zeros(*batch.ids.shape, width, dtype=torch.float64)
            step[text, token] = torch.from_numpy(RNG(row).standard_normal(width))
            slope = (loss(hook, 1e-5 * step) - loss(hook, -1e-5 * step)) / 2e-5
            assert float(rows.post[row].double() @ step[text, token]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert gathered.loss == pytest.approx(loss(hooks[0], 0.0) / 30, rel=1e-6)


def test_a_mask_put_on_afterwards_keeps_the_weights():
    dense, like = small(None), small()
    masked = masked_afterwards(dense.float(), like)
    assert topk_hooks(dense) == [] and topk_hooks(masked) == topk_hooks(like)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), dense.parameters(), strict=True))
    assert set(measure(masked, texts())) == set(topk_hooks(like))
    with pytest.raises(ValueError, match="two tokens"):
        gather(like, [Texts(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool))], ["0.attn.q"])


# ---- generators ---------------------------------------------------------------------------------------------


def test_a_model_that_always_says_one_bracket_has_no_generator():
    words = collapse_generators.words(5)
    state = collapse_generators.state
    constant = collapse_generators.acting_of({w: state(w) == 1 for w in words})
    assert constant["]"].after == 1 and all(constant[letter].acts <= 0.5 for letter in "x[]")
    right = collapse_generators.acting_of(dict.fromkeys(words, True))
    assert all(one.acts == one.after == 1 for one in right.values())
    # Only the letter "[" is missing: the model misses an open list directly after its bracket.
    misses = collapse_generators.acting_of({w: not w or w[-1] != "[" for w in words})
    assert misses["["].acts == 0 and misses["x"].after == 1


def test_a_generator_is_there_from_the_step_after_which_it_never_fails():
    assert collapse_generators.appeared([0, 1, 2, 4], [0.0, 0.96, 0.97, 1.0]) == 1
    assert collapse_generators.appeared([0, 1, 2, 4], [0.96, 0.9, 0.97, 1.0]) == 2
    assert collapse_generators.appeared([0, 1, 2], [1.0, 1.0, 0.9]) is None


# ---- the study ----------------------------------------------------------------------------------------------

RECIPE = Recipe(
    d_model=16, n_layer=1, d_head=8, block_size=64, vocab_size=small_tokenizer().vocab_size, steps=6, batch=4
)
PLAN = training.Plan(replace(RECIPE, tokenizer_name="tiny"), seeds=(0, 1, 2), steps=(0, 2, 6), batches=2)
TEXT = training.Text(SOURCES, small_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def content(folder):
    batches = training.held_out(PLAN, TEXT)
    measure = partial(measure_snapshot, batches=batches, last=6)
    return training.compute(PLAN, TEXT, folder, measure, VERSION)


def test_both_arms_begin_with_the_same_weights_and_have_the_same_density(content, folder):
    begin, end = (training.models_at(PLAN, TEXT, folder, 1, step) for step in (0, 6))
    pairs = zip(begin["topk"].parameters(), begin["dense"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert topk_hooks(end["topk"]) and not topk_hooks(end["dense"])
    for a, b in zip(end["topk"].parameters(), end["dense"].parameters(), strict=True):
        assert a.dim() != 2 or abs(int(a.count_nonzero()) - int(b.count_nonzero())) < 0.1 * a.numel()


def test_differences_in_differences_are_taken_hook_by_hook_over_seeds(content):
    study = Study(content)
    assert study.values("topk", "equal_rank").shape == (3, 3, 8)

    def log(condition, step):
        return np.log(study.values(condition, "equal_rank", "pre.unit.centered", step))

    by_seed = np.nanmean(log("topk", 6) - log("topk", 0) - log("dense", 6) + log("dense", 0), axis=1)
    found = study.difference("dense")
    low, high = stats.ttest_1samp(by_seed, 0).confidence_interval()
    assert found.by_seed == pytest.approx(by_seed.tolist())
    assert (found.mean, found.low, found.high) == pytest.approx((by_seed.mean(), low, high))
    assert study.difference("shuffled", "effective_rank", "post.raw.centered").mean == 0
    assert {len(of) for of in study.appeared()["topk"].values()} == {3}


def test_a_stored_study_comes_back_and_a_stale_one_is_named(content, tmp_path):
    path = tmp_path / "study.json"
    training.save(content, path)
    assert training.load(path, PLAN, VERSION) == json.loads(json.dumps(content))
    with pytest.raises(training.StaleStudy, match="measure_version"):
        training.load(path, PLAN, VERSION + 1)
    with pytest.raises(training.StaleStudy, match="recipe"):
        training.load(path, replace(PLAN, recipe=replace(PLAN.recipe, lr=1e-3)), VERSION)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no stored study"):
        training.load(path, PLAN, VERSION)


def planted(content, rank, area):
    """The study, with the ranks of the topk arm multiplied and its scores raised at the last step, slightly per
    seed.
    """
    changed = json.loads(json.dumps(content))
    for number, seed in enumerate(changed["seeds"].values()):
        for step, found in seed.items():
            of = {c: found["conditions"][c]["pre.unit.centered"] for c in ("topk", *CONTROLS)}
            score = found["conditions"]["dense"]["post.unit.centered"]  # without a mask, the rank of "pre" changes too
            for condition, kept in of.items():
                last = step == "6" and condition == "topk"
                kept["equal_rank"] = [10 * (rank * (1 + 0.01 * number) if last else 1)] * 8
                (score if condition == "dense" else kept)["area"] = [0.2 + (area + 0.01 * number if last else 0)] * 8
    return changed


@cache
def tiny():
    model = CircuitGPT(RECIPE.config())
    model.tokenizer = small_tokenizer()
    return model.eval()


@pytest.mark.parametrize(
    ("rank", "area", "verdict"),
    [
        (0.5, 0.3, "reproduced"),
        (1.0, 0.3, "not reproduced"),
        (2.0, 0.3, "not reproduced"),
        (0.5, 0.0, "not reproduced"),
        (0.5, -0.3, "not reproduced"),
    ],
)
def test_the_verdict_comes_from_the_study(content, tmp_path, monkeypatch, rank, area, verdict):
    path = tmp_path / "study.json"
    training.save(planted(content, rank, area if area else -0.01), path)
    monkeypatch.setattr(collapse, "FILE", path)
    monkeypatch.setattr(collapse, "PLAN", PLAN)
    result = experiments.run("collapse", tiny(), tokens=200)
    assert result.verdict == verdict, result.measured["summary"]
    assert result.interval["ln_rank_difference"][0] < np.log(rank * 1.01) < result.interval["ln_rank_difference"][1]
    assert result.measured["model"]["text"].startswith("bracket prompts")
    assert any("dense twin" in sentence for sentence in result.measured["left_out"])
    json.loads(result.to_json())


def test_masks_that_do_as_much_make_it_indistinguishable():
    below, above, none = Difference(-1, -1.1, -0.9, []), Difference(1, 0.9, 1.1, []), Difference(0, -0.1, 0.1, [])
    every = {"dense": below, "afterwards": below, "shuffled": below}
    assert collapse.decide(every, above) == "reproduced"
    assert collapse.decide({**every, "shuffled": none}, above) == "indistinguishable"
    assert collapse.decide({**every, "afterwards": above}, above) == "indistinguishable"
    assert collapse.decide({**every, "dense": none}, above) == collapse.decide(every, none) == "not reproduced"


def test_a_model_without_topk_and_one_without_text_say_what_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(collapse, "FILE", tmp_path / "none.json")
    result = experiments.run("collapse", small(None).float())
    assert result.verdict == "not testable here" and not result.figures
    assert any("no AbsTopK" in sentence for sentence in result.measured["left_out"])
    result = experiments.run("collapse", small().float(), tokens=200, nulls=("shuffled",))
    assert any("random ids" in sentence for sentence in result.measured["left_out"])
    assert list(result.null["means_over_hooks"]) == ["shuffled"] and not len(result.null["rotated_areas"])
    assert set(result.measured["by_hook"]["0.attn.q"]) == set(VARIANTS)
    with pytest.raises(ValueError, match="tokens"):
        experiments.run("collapse", small().float(), tokens=8)
    with pytest.raises(ValueError, match="null"):
        experiments.run("collapse", small().float(), nulls=("nothing",))


# ---- snapshots of a training run ----------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_snapshots_that_are_missing(tmp_path):
    course = TextCourse(RECIPE, SOURCES, small_tokenizer())

    def run(file, stop=None):
        calls = []

        def keep(step, model):
            calls.append((step, {name: value.clone() for name, value in model.state_dict().items()}))

        def progress(step, steps, loss):
            if step == stop:
                raise KeyboardInterrupt

        try:
            final = train(RECIPE, course, tmp_path / file, progress, keep, (0, 2, 4, 6)).model.state_dict()
        except KeyboardInterrupt:
            final = None
        return calls, final

    whole, final = run("whole.pt")
    before, stopped = run("stopped.pt", stop=4)
    after, resumed = run("stopped.pt")
    plain = train(RECIPE, course, tmp_path / "plain.pt").model.state_dict()
    assert [step for step, _ in whole] == [0, 2, 4, 6] and stopped is None
    assert [step for step, _ in before] == [0, 2, 4] and [step for step, _ in after] == [6]
    for (_, a), (_, b) in zip(whole, [*before, *after], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(final[n], resumed[n]) and torch.equal(final[n], plain[n]) for n in final)
    assert not torch.equal(whole[0][1]["lm_head.weight"], whole[1][1]["lm_head.weight"])
