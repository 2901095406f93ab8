"""Generator mapping finds the known channels of a hand-built model, and nothing where there is nothing."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from bracket_fixtures import small_tokenizer
from scalpel import CircuitGPT, experiments
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.experiments.mapping.experiment import verdict
from scalpel.experiments.mapping.measure import Design, Prompts, Scores, question_rows, share
from scalpel.models.untrained import untrained

FAST = {"prompts": 8, "length": 96, "draws": 199, "wrong": 2}
THETA = 0.05


def averager(evidence="["):
    return threshold_circuit(small_tokenizer(), THETA, evidence=evidence, block_size=192)


def stepper():
    """The averager, whose MLP writes 1[m > θ] to the channel where the evidence was, and whose head reads only that."""
    plain = averager()
    config = replace(plain.config, d_mlp=2, activation_type="relu")
    model = CircuitGPT(config)
    model.tokenizer = plain.tokenizer
    weights = {name: value for name, value in plain.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(weights, strict=False)
    mean, one, step, steep = 2, 3, 0, 400.0
    with torch.no_grad():
        mlp = model.transformer.h[0].mlp
        for parameter in mlp.parameters():
            parameter.zero_()
        # relu(z + 1/2) - relu(z - 1/2) is a step of slope one around z = 0, and the norm multiplies by √2.
        mlp.c_fc.weight[:, mean], mlp.c_fc.weight[:, one] = steep, -steep * THETA
        mlp.c_fc.bias[:] = torch.tensor([0.5, -0.5])
        mlp.c_proj.weight[step] = torch.tensor([1.0, -1.0])
        model.lm_head.weight.zero_()
        answer = small_tokenizer().single("]]\n")
        model.lm_head.weight[answer, step], model.lm_head.weight[answer, one] = 1.0, -0.5
    return model.eval()


@cache
def result_of(kind):
    model = {
        "averager": averager,
        "stepper": stepper,
        "start": lambda: averager("<s>"),  # averages the start token: 1/n for any brackets
        "untrained": lambda: untrained(averager()),
    }[kind]()
    return experiments.run("mapping", model, **FAST)


def mapped(result, claim):
    return sorted(f["node"] for f in result.measured["channels"] if f["claim"] == claim and f["outcome"] == "mapped")


# ---- the regression ------------------------------------------------------------------------------------------


def test_partial_r2_is_that_of_two_regressions():
    model = averager()
    prompts = Prompts.make(model, (1, 2, 3, 4), 6, 80, 0)
    rows = question_rows(prompts, 12)
    rng = np.random.default_rng(0)
    v = rows.pick(share(prompts.evidence))
    values = np.stack([v + 0.02 * rng.standard_normal(len(v)), rng.standard_normal(len(v)), 0 * v], 1)
    found = Scores.of(rows, rows.design.residuals(v[:, None]), values)
    nuisance = rows.design._all  # a basis of the nuisance directions on every row
    for channel in range(2):
        y = values[:, channel]
        errors = []
        for design in (nuisance, np.column_stack([nuisance, v])):
            fitted = np.linalg.lstsq(design[rows.fit], y[rows.fit], rcond=None)[0]
            errors.append(np.square(y[rows.score] - design[rows.score] @ fitted).sum())
        assert found.r2[0, channel] == pytest.approx(1 - errors[1] / errors[0], abs=1e-6)
    assert np.isnan(found.r2[0, 2]) and not found.live[2]
    once = found.reweighted(np.ones((1, found.prompts)), 0)
    assert once[0, :2] == pytest.approx(found.r2[0, :2])
    assert found.r2[0, 0] > 0.3 > 0.05 > found.r2[0, 1]


def test_nothing_is_scored_on_prompts_or_cells_that_were_fitted():
    prompts = Prompts.make(averager(), (1, 2, 3, 4), 4, 80, 0)
    rows = question_rows(prompts, 12)
    assert rows.fit.any() and rows.score.any() and not (rows.fit & rows.score).any()
    assert not set(rows.prompt[rows.fit]) & set(rows.prompt[rows.score])
    cells = [set(zip(prompts.k[rows.prompt[part]], rows.n[part], strict=True)) for part in (rows.fit, rows.score)]
    assert not cells[0] & cells[1]


def test_a_token_seen_in_no_fitted_row_leaves_the_prediction_finite():
    nuisance = np.column_stack([np.ones(6), [0, 0, 0, 0, 1, 0]])
    fit = np.array([True, True, True, True, False, False])
    y = np.arange(6.0)[:, None]
    assert Design(nuisance, fit).residuals(y)[:, 0] == pytest.approx(np.arange(6.0) - 1.5)


# ---- models whose channels are known -------------------------------------------------------------------------


def test_the_averagers_channels_are_found_and_no_others():
    result = result_of("averager")
    # Both embedding channels distinguish "[" from other tokens, and only what the head or the norm reads changes the
    # answer.
    assert mapped(result, "update") == ["0.attn.act_in:0", "0.attn.v:0", "0.resid_in:0", "0.resid_in:1"]
    assert mapped(result, "mean") == ["0.attn.resid_delta:2", "0.attn.y:0", "0.resid_mid:2", "final_resid:2"]
    assert mapped(result, "threshold") == []
    assert result.verdict == "not reproduced"  # the threshold is applied in the answer, not in a channel
    assert result.measured["by_hook"]["0.attn.y"]["best_r2"]["mean"] > 0.999
    assert result.null["rate"]["rate"] == 0
    assert {f["outcome"] for f in result.measured["channels"] if f["node"] == "0.mlp.act_in:2"} == {
        "does not move the output"
    }


def test_a_threshold_is_found_where_there_is_one():
    result = result_of("stepper")
    assert mapped(result, "threshold") == ["0.mlp.resid_delta:0", "final_resid:0"]
    assert "0.attn.y:0" in mapped(result, "mean") and "final_resid:2" not in mapped(result, "mean")
    assert result.measured["thetas"]["the model's own"] == pytest.approx(THETA, abs=0.01)
    assert result.verdict == "reproduced" and result.interval["share_of_hooks"][1] >= 0.5


def test_averaging_another_token_is_not_averaging_brackets():
    result = result_of("start")
    assert mapped(result, "mean") == mapped(result, "threshold") == mapped(result, "update") == []
    assert result.verdict == "not testable here"


def test_an_untrained_model_maps_nothing():
    result = result_of("untrained")
    assert result.measured["counts"]["hooks_mapped"] == result.measured["counts"]["channels_mapped"] == 0
    assert result.verdict == "not testable here" and "doesn't do the task" in result.measured["summary"]


def test_the_result_is_json_and_has_its_pictures():
    from scalpel.report.pictures.figures import draw

    result = result_of("averager")
    assert json.loads(result.to_json())["seed_figure"].endswith("41/81 mapped")
    assert result.provenance["predicted_at"] <= result.provenance["measuring_from"]
    for figure in result.figures.values():
        draw(figure)


def test_nulls_that_were_not_asked_for_are_named():
    model = averager()
    result = experiments.run("mapping", model, **FAST, nulls=("shuffled",))
    assert set(result.null) == {"summary", "shuffled", "rate"}
    assert any("untrained" in note for note in result.measured["left_out"])
    none = experiments.run("mapping", model, **FAST, nulls=("rotated",))
    assert none.verdict == "not testable here"


# ---- the rule, and bad input ---------------------------------------------------------------------------------

ALL = {"update": ["a"], "mean": ["b"], "threshold": ["c"]}


@pytest.mark.parametrize(
    ("by_claim", "share_", "null", "loose", "able", "expected"),
    [
        (ALL, (0.6, 0.5, 0.7), 0.0, (True, 0.6), True, "reproduced"),
        (ALL, (0.4, 0.3, 0.52), 0.0, (True, 0.4), True, "indistinguishable"),
        (ALL, (0.4, 0.3, 0.45), 0.0, (True, 0.4), True, "not reproduced"),
        (ALL, (0.4, 0.3, 0.45), 0.0, (True, 0.6), True, "indistinguishable"),
        (ALL | {"threshold": []}, (0.6, 0.5, 0.7), 0.0, (False, 0.6), True, "not reproduced"),
        (ALL, (0.6, 0.5, 0.7), 0.02, (True, 0.6), True, "not reproduced"),
        (ALL, (0.6, 0.5, 0.7), float("nan"), (True, 0.6), True, "not testable here"),
        (ALL, (0.6, 0.5, 0.7), 0.0, (True, 0.6), False, "not testable here"),
    ],
)
def test_the_verdict_follows_the_rule(by_claim, share_, null, loose, able, expected):
    assert verdict(by_claim, share_, null, loose, able) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amounts": (1, 2, 3)}, "three or more"),
        ({"amounts": (2, 3, 4, 5)}, "depth 1"),
        ({"least_accuracy": 95.0}, "from 0 to 1"),
        ({"prompts": 4.5}, "whole number"),
        ({"nulls": "untrained"}, "list of names"),
        ({"length": 40}, "at least"),
        ({"nulls": ("permuted",)}, "null 'permuted'"),
        ({"draws": 5}, "draws"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        experiments.run("mapping", averager(), **{**FAST, **options})


def test_a_model_without_the_task_is_refused():
    bare = averager()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        experiments.run("mapping", bare, **FAST)
