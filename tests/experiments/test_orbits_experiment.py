"""The orbits experiment on models whose anchor, component and cycles are built in."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from scalpel import CircuitGPT, experiments
from scalpel.experiments.orbits import experiment as orbits
from scalpel.experiments.orbits.first_component import Moments, closeness, moments_at
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.report.pictures.figures import to_svg

WIDTH = 16
FAST = {"prompts": 6, "window": 6, "steps": 64, "starts": 3, "iterations": 60, "radii": (1,)}


def config_of(**options):
    given = {
        "block_size": 16,
        "vocab_size": 12,
        "n_layer": 1,
        "n_head": 2,
        "d_head": 4,
        "d_model": WIDTH,
        "d_mlp": 8,
        "rms_norm": True,
        "tied_unembed": False,
        "enable_bigram_table": True,
    }
    return CircuitGPTConfig(**{**given, **options})


def built(along=0, successor=None):
    """Every block adds one vector.

    The embeddings differ along it (``along`` 0) or across it (1). Token 3 follows every token, or ``successor`` gives
    the next token of each.
    """
    model = CircuitGPT(config_of())
    added = torch.arange(1.0, WIDTH + 1)
    across = torch.tensor([2.0, -1.0] + [0.0] * (WIDTH - 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name else 0.0)
        model.transformer.wte.weight.copy_(torch.arange(1.0, 13.0)[:, None] * (added, across)[along])
        model.transformer.h[0].mlp.c_proj.bias.copy_(added)
        follows = [3] * 12 if successor is None else successor
        model.bigram_table[torch.arange(12), torch.tensor(follows)] = 1.0
    return model.eval()


@cache
def result_of(kind):
    model = {
        "built": built,
        "component elsewhere": lambda: built(along=1),
        "two cycles": lambda: built(successor=[0, 0, 0, 0, 0, 0, 7, 6, 6, 6, 6, 6]),
        "random": lambda: CircuitGPT(config_of(afrac=0.25, n_layer=2), seed=1).eval(),
    }[kind]()
    return experiments.run("orbits", model, **FAST)


PARTS = ("anchor_on_one_position", "anchor_on_a_sequence", "anchor_is_first_component", "decoding_ends_in_one_token")


@pytest.mark.parametrize(
    ("kind", "verdict", "fails"),
    [
        ("built", "reproduced", []),
        ("component elsewhere", "not reproduced", [2]),
        ("two cycles", "not reproduced", [3]),
    ],
)
def test_each_part_of_the_rule_can_fail_by_itself(kind, verdict, fails):
    result = result_of(kind)
    assert result.verdict == verdict, result.measured["summary"]
    assert result.measured["parts"] == {name: i not in fails for i, name in enumerate(PARTS)}


def test_a_random_model_with_topk_does_not_settle_and_without_it_is_shown():
    result = result_of("random")
    assert result.verdict == "not reproduced" and not result.measured["parts"]["anchor_on_one_position"]
    assert "TopKs off" in result.null["maps"] and "TopKs off" not in result.null["decoding"]
    assert {one["map"] for one in result.measured["maps"]} >= {"block 0, one position", "block 1, one position"}


def test_an_untrained_model_that_does_it_too_makes_it_indistinguishable(monkeypatch):
    monkeypatch.setattr(orbits, "untrained", lambda model: model)
    assert experiments.run("orbits", built(), **FAST).verdict == "indistinguishable"
    assert experiments.run("orbits", built(), nulls=["rotated"], **FAST).verdict == "not testable here"


def test_what_is_measured_of_the_built_model():
    result = result_of("built")
    rows = result.measured["maps"][0]["radii"]
    length = float(np.linalg.norm(np.arange(1, WIDTH + 1)))
    assert rows[0]["spectral_radius"] == pytest.approx(1 / (1 + length), rel=1e-6)
    assert rows[0]["directions"] == 1 and rows[0]["settled"] == 1
    first = result.measured["first_component"][0]
    assert first["activations"]["cos"] == pytest.approx(1) and first["activations"]["p_rotated"] == 0.001
    assert np.isnan(first["gradients"]["cos"])  # the logits ignore the residual, so nothing varies there
    end = result.measured["decoding"]
    assert end["one_token"] == 1 and end["distinct_cycles"] == 1 and set(end["period"]) == {1}
    assert result.measured["apparent"]["one_token"] == 1
    growth = result.measured["norm_grows_to"]["all blocks, one position"]
    assert growth == pytest.approx(50 * length, rel=0.05)
    assert result_of("two cycles").measured["decoding"]["distinct_cycles"] == 2


@pytest.mark.parametrize("kind", ["built", "random"])
def test_it_can_be_written_and_drawn(kind):
    result = result_of(kind)
    json.loads(result.to_json())
    assert result.prediction["rule"] == orbits.RULE and result.seed_figure == orbits.SEED_FIGURE
    for part in (result.measured, result.interval, result.null):
        assert part["summary"]
    assert "random token ids" in " ".join(result.measured["left_out"])
    for figure in result.figures.values():
        assert "<svg" in to_svg(figure, "a")


def test_bad_options():
    with pytest.raises(ValueError, match="radii"):
        experiments.run("orbits", built(), **{**FAST, "radii": (0,)})
    with pytest.raises(ValueError, match="starts"):
        experiments.run("orbits", built(), **{**FAST, "starts": 1})


# ---- components ------------------------------------------------------------------------------------------------


def moments_of(rows):
    return Moments(
        np.array([len(x) for x in rows], dtype=float),
        np.stack([x.sum(axis=0) for x in rows]),
        np.stack([x.T @ x for x in rows]),
    )


def test_components_are_those_of_the_models_activations():
    model = CircuitGPT(config_of(), seed=1).eval()
    texts = [[1, 5, 2, 7], [3, 3, 8], [9, 0, 4, 4, 2]]
    found = moments_at(model, texts, "final_resid")
    with torch.no_grad():
        rows = [model.run_with_cache(torch.tensor([text]))[1]["final_resid"][0].double().numpy() for text in texts]
    every = np.concatenate(rows)
    _, sizes, axes = np.linalg.svd(every - every.mean(axis=0))
    shares, components = found["activations"].components()
    assert shares[:5] == pytest.approx((sizes**2 / (sizes**2).sum())[:5], abs=1e-5)
    assert abs(components[0] @ axes[0]) == pytest.approx(1, abs=1e-5)
    assert found["gradients"].counts.tolist() == [4, 3, 5]
    again = found["activations"].components(np.array([1, 1]))[1][0]  # repeating a prompt changes nothing
    alone = rows[1] - rows[1].mean(axis=0)
    assert abs(again @ np.linalg.svd(alone)[2][0]) == pytest.approx(1, abs=1e-5)


def test_closeness_knows_the_first_component_from_others_and_from_chance():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 2.0] + [0.5] * 10)
    moments = moments_of([rng.standard_normal((30, 12)) * scales for _ in range(20)])
    first = closeness(np.eye(12)[0] * 7, moments, np.random.default_rng(1))
    assert first["nearest"] == 0 and first["interval"][0] > 0.99 and first["p_rotated"] == 0.001
    assert first["share"] == pytest.approx(25 / (25 + 4 + 2.5), abs=0.03)
    second = closeness(np.eye(12)[1], moments, np.random.default_rng(1))
    assert second["nearest"] == 1 and second["cos"] < 0.2 and second["p_rotated"] > 0.05
    chance = [
        closeness(axis, moments, rng, draws=99, resamples=2)["p_rotated"] for axis in rng.standard_normal((40, 12))
    ]
    assert np.mean(np.array(chance) <= 0.2) == pytest.approx(0.2, abs=0.15)
    # A vector with a single entry is matched whenever the exchange of twelve channels hits its place: once in twelve.
    assert first["p_shuffled"] == pytest.approx(1 / 12, abs=0.03)
