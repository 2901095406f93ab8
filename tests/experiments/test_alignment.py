"""The alignment experiment: eigenvectors, gradients and directions with known answers, and both verdicts."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from bracket_fixtures import small_tokenizer
from scalpel import CircuitGPT, experiments
from scalpel.experiments.alignment import experiment as alignment
from scalpel.experiments.alignment.measure import Components, Direction, gradients, own_directions
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.experiments.mapping.claims import CLAIMS, Setup
from scalpel.experiments.mapping.measure import Prompts
from scalpel.models.untrained import untrained
from scalpel.tasks.brackets import closers

AMOUNTS = (1, 2, 3, 4)
FAST = {"amounts": AMOUNTS, "prompts": 6, "length": 80, "resamples": 40}
WIDTH = 96


def averager():
    return threshold_circuit(small_tokenizer(), 0.05, block_size=192)


def orthogonal(seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0].T


def gradient(deviations, seed=1, prompts=24, length=40):
    """Rows whose covariance has the given standard deviations along the first rows of orthogonal()."""
    scale = np.full(WIDTH, 0.01)
    scale[: len(deviations)] = deviations
    return (np.random.default_rng(seed).standard_normal((prompts, length, WIDTH)) * scale) @ orthogonal()


# ---- eigenvectors --------------------------------------------------------------------------------------------


def test_known_components_are_found_and_steady():
    found = Components.of(gradient([4, 3, 2]), center=True, resamples=50, rng=np.random.default_rng(0))
    for i in range(3):
        cos, drawn = found.cosines(orthogonal()[i])
        assert cos[i] > 0.99 and np.percentile(drawn[:, i], 2.5) > 0.98
        assert found.steady(i) > 0.99 and found.gap(i) > 0.3
    assert found.share[:3] == pytest.approx(np.array([16, 9, 4]) / 29, abs=0.03)


def test_equal_eigenvalues_have_no_component():
    found = Components.of(gradient([3, 3, 1]), center=True, resamples=50, rng=np.random.default_rng(0))
    assert found.gap(0) < alignment.GAP and found.gap(1) < alignment.GAP and found.steady(0) < found.steady(2)
    assert found.gap(2) > 0.5 and found.steady(2) > 0.99


def test_centering_takes_the_mean_away():
    moved = gradient([2.0]) + 30 * orthogonal()[5]
    plain = Components.of(moved, center=False, resamples=20, rng=np.random.default_rng(0))
    centered = Components.of(moved, center=True, resamples=20, rng=np.random.default_rng(0))
    assert abs(plain.vectors[0] @ orthogonal()[5]) > 0.99 and abs(centered.vectors[0] @ orthogonal()[0]) > 0.99
    assert np.abs(plain.drawn[:, 0] @ orthogonal()[5]).min() > 0.99
    assert np.abs(centered.drawn[:, 0] @ orthogonal()[0]).min() > 0.99


def test_a_gradient_of_zero_is_refused():
    with pytest.raises(ValueError, match="zero"):
        Components.of(np.zeros((3, 4, 5)), center=True, resamples=0, rng=np.random.default_rng(0))


# ---- gradients and directions --------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    model = averager().double()
    prompts = Prompts.make(model, AMOUNTS, 1, 60, 0)
    hook = "0.attn.v"
    found = gradients(model, prompts, [hook])
    ends = closers(model.tokenizer)
    asked = torch.from_numpy(prompts.asked)

    def totals(step):
        def move(value, name):
            value = value.clone()
            value[:, 9, 0] += step
            return value

        with torch.no_grad():
            logits = model.run_with_hooks(prompts.ids, [(hook, move)], position_ids=prompts.positions)
        d = (logits[..., ends.two] - logits[..., ends.one]).gather(1, asked)
        sign = torch.from_numpy(np.where(prompts.k > 1, 1.0, -1.0))[:, None]
        return {"difference": d.mean(1), "loss": torch.log1p(torch.exp(-sign * d)).mean(1)}

    up, down = totals(1e-5), totals(-1e-5)
    for loss, by_hook in found.items():
        expected = ((up[loss] - down[loss]) / 2e-5).numpy()
        assert by_hook[hook][:, 9, 0] == pytest.approx(expected, rel=1e-5) and np.abs(expected).min() > 0


def test_frozen_parameters_give_the_same_gradients():
    model = averager()
    prompts = Prompts.make(model, AMOUNTS, 1, 60, 0)
    free = gradients(model, prompts, ["0.resid_in", "final_resid"])
    model.requires_grad_(False)
    frozen = gradients(model, prompts, ["0.resid_in", "final_resid"])
    for hook, value in free["loss"].items():
        assert np.abs(value).max() > 0 and frozen["loss"][hook] == pytest.approx(value)


def test_directions_of_the_averager_are_its_channels():
    model = averager()
    found = own_directions(model, Setup.make(model, AMOUNTS, 6, 80, draws=0, wrong=0, seed=0))
    assert found["mean"].hook in ("0.attn.y", "0.attn.resid_delta", "0.resid_mid", "final_resid")
    assert np.abs(found["mean"].direction).max() == pytest.approx(1) and found["mean"].r2 > 0.999
    assert np.abs(found["mean"].direction).argmax() == found["mean"].channel
    assert found["update"].r2 > 0.999 and np.linalg.norm(found["update"].direction) == pytest.approx(1)


# ---- the rule ------------------------------------------------------------------------------------------------


def judged(order=(0, 1, 2), deviations=(4, 3, 2), r2=0.9, noise=0.0, untrained_cos=None):
    """The verdict for generators with the given components along a known gradient."""
    rng = np.random.default_rng(3)
    own = {}
    for claim, row in zip(CLAIMS, order, strict=True):
        v = orthogonal()[row] + noise * rng.standard_normal(WIDTH)
        own[claim] = Direction(claim, "h", 0, r2, v / np.linalg.norm(v), np.ones(WIDTH, bool))
    grads = {"loss": {"h": gradient(deviations)}}
    options = {"center": True, "resamples": 40, "draws": 199, "nulls": ("rotated", "shuffled"), "rng": rng}
    pairs, _ = alignment._pairs(own, grads, **options)
    if untrained_cos is not None:
        pairs["mean"]["null"]["untrained"] = untrained_cos
    alignment._judge(pairs)
    return alignment.verdict(pairs, True)


def test_the_verdict_can_come_out_every_way():
    assert judged() == "reproduced"
    assert judged(noise=0.05) == "reproduced"  # |cos| of about 0.9
    assert judged(order=(1, 0, 2)) == "not reproduced"  # v1 and v2 are exchanged
    assert judged(order=(0, 1, 50)) == "not reproduced"
    assert judged(deviations=(3, 3, 2)) == "not reproduced"  # v1 and v2 cannot be distinguished
    assert judged(noise=3.0) == "not reproduced"
    assert judged(untrained_cos=0.999) == "indistinguishable"
    assert judged(r2=0.3) == "not testable here"
    assert alignment.verdict({}, True) == alignment.verdict({}, False) == "not testable here"


# ---- whole experiments ---------------------------------------------------------------------------------------


@cache
def result_of(kind):
    model = averager() if kind == "averager" else untrained(averager())
    return experiments.run("alignment", model, **FAST)


def test_the_averager_has_one_component_and_so_no_second():
    from scalpel.report.pictures.figures import draw

    result = result_of("averager")
    pairs = result.measured["pairs"]
    # The whole gradient lies along what the head reads: the mean is v1, and nothing is left for v2.
    assert pairs["mean"]["cos_with_each"][0] > 0.99 and not pairs["mean"]["resolved"]
    assert result.verdict == "not reproduced"
    assert json.loads(result.to_json())["prediction"]["pairs"]["mean"] == "v2"
    assert result.provenance["predicted_at"] <= result.provenance["measuring_from"]
    for figure in result.figures.values():
        draw(figure)


def test_an_untrained_model_is_not_testable():
    result = result_of("untrained")
    assert result.verdict == "not testable here" and "doesn't do the task" in result.measured["summary"]


def test_nulls_that_were_not_asked_for_are_named():
    result = experiments.run("alignment", averager(), **FAST, nulls=("rotated",))
    assert all(set(pair["null"]) == {"channels", "rotated"} for pair in result.measured["pairs"].values())
    assert sum("not asked for" in note for note in result.measured["left_out"]) == 2


def test_bad_input():
    with pytest.raises(ValueError, match="three or more"):
        experiments.run("alignment", averager(), amounts=(1, 2))
    with pytest.raises(ValueError, match="null 'sorted'.*untrained"):
        experiments.run("alignment", averager(), nulls=("sorted",))
    with pytest.raises(ValueError, match="splits an answer"):
        experiments.run("alignment", CircuitGPT.from_pretrained("mod3-mini"))
