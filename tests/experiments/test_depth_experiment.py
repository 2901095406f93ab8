"""The depth experiment: known products, and models whose directions do vanish or cannot."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from scalpel import CircuitGPT, experiments
from scalpel.experiments.depth import cascade
from scalpel.experiments.depth import experiment as depth
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.report.pictures.figures import to_svg


def config_of(**options):
    given = {
        "block_size": 16,
        "vocab_size": 32,
        "n_layer": 2,
        "n_head": 2,
        "d_head": 4,
        "d_model": 8,
        "d_mlp": 16,
        "rms_norm": True,
        "tied_unembed": False,
    }
    return CircuitGPTConfig(**{**given, **options})


def killing():
    """Blocks that remove the four longest channels of their input; after two blocks hardly anything varies.

    Each MLP writes -c · norm(x), where c is the root mean square of every x there, through an AbsTopK of four.
    """
    model = CircuitGPT(config_of(afrac=0.5, afrac_loctypes="mlp_out", activation_type="relu"))
    sizes = torch.arange(1.0, 9.0)
    signs = torch.randint(0, 2, (32, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    left = [sizes, torch.cat([sizes[:4], torch.zeros(4)])]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name else 0.0)
        model.transformer.wte.weight.copy_(signs * sizes)
        for block, x in zip(model.transformer.h, left, strict=True):
            block.mlp.c_fc.weight.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
            block.mlp.c_proj.weight.copy_(x.square().mean().sqrt() * torch.cat([-torch.eye(8), torch.eye(8)], dim=1))
    return model.eval()


@cache
def result_of(kind):
    model = {
        "killing": killing,
        "random": lambda: CircuitGPT(config_of(afrac=0.5), seed=1),
        "on the stream": lambda: CircuitGPT(config_of(afrac=0.5, afrac_loctypes="resid_post_mlp"), seed=1),
        "no TopK": lambda: CircuitGPT(config_of(), seed=1),
        "one layer": lambda: CircuitGPT(config_of(afrac=0.5, n_layer=1), seed=1),
    }[kind]()
    return experiments.run("depth", model.eval(), prompts=4, tokens=6, directions=2, draws=2)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("killing", "reproduced"),
        ("random", "not reproduced"),
        ("on the stream", "indistinguishable"),  # the rank is at most k by construction, in the untrained model too
        ("no TopK", "not testable here"),
        ("one layer", "not reproduced"),
    ],
)
def test_verdicts(kind, verdict):
    result = result_of(kind)
    assert result.verdict == verdict, result.measured["summary"]
    assert result.prediction["rule"] == depth.RULE and result.seed_figure == depth.SEED_FIGURE
    json.loads(result.to_json())
    for figure in result.figures.values():
        assert "<svg" in to_svg(figure, "a")


def test_what_is_measured_of_the_killing_model():
    measured, null = result_of("killing").measured, result_of("killing").null
    # Where the channels are removed, only x̂ x̂ᵀ remains, once in each layer.
    assert measured["survivors"]["0.001"] == 2 and measured["k"] == 4
    assert [row["rank"] for row in measured["layers"]] == [5, 5]
    assert null["survivors"]["rotated"] == 5  # a product of random layers of rank five has rank five
    assert null["survivors"]["untrained"] == 8
    assert measured["survivors_without_the_residual_path"] <= 4
    assert measured["log_volume_per_direction_and_layer"] == -np.inf


def test_topk_bounds_what_is_added_and_the_residual_path_keeps_the_rank():
    rows = result_of("random").measured["layers"]
    for row in rows:
        assert row["rank"] == 8 and row["ranks_within_live_channels"]
        assert 0 < row["rank_attention"] <= row["live_attention"] == 4
        assert 0 < row["rank_mlp"] <= row["live_mlp"] == 4
        assert row["rank_added"] <= 8
    # Except with the TopK on the residual stream itself.
    assert result_of("on the stream").measured["layers"][0]["rank"] <= 4


def test_sweeps_and_the_dense_product_agree_from_last_to_last():
    model = CircuitGPT(config_of(afrac=0.5), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    texts, _ = cascade.short_prompts(model, 3, 0, 6)
    swept = cascade.sweep_exponents(model, texts, 3, 0)
    dense = np.stack([np.log(one.values[:3]) / 2 for one in cascade.cascades(model, texts, ranks=False)])
    assert swept["last"] == pytest.approx(dense, abs=1e-4)
    assert (swept["all"][:, 0] >= swept["last"][:, 0] - 1e-6).all()  # the last token is one of all tokens


def test_products_of_any_size():
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((5, 5)) for _ in range(3)]
    expected = np.linalg.svd(layers[2] @ layers[1] @ layers[0], compute_uv=False)
    assert cascade.product_values(layers) == pytest.approx(expected)
    assert cascade.product_values([1e80 * np.eye(3)] * 3)[0] == pytest.approx(1e240, rel=1e-9)
    assert cascade.product_values([np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]).tolist() == [0, 0]


def test_the_rotated_null_keeps_what_a_layer_does_and_not_how_layers_meet():
    killed = [np.diag([1.0, 1.0, 0.0, 0.0]), np.diag([0.0, 0.0, 1.0, 1.0])]
    one = cascade.Cascade(killed, cascade.product_values(killed), -np.inf, [])
    found = cascade.rotated(one, 3, np.random.default_rng(0))
    assert cascade.survive(found[None], 1e-3).tolist() == [2] and one.values.max() == 0
    alone = cascade.Cascade([np.diag([3.0, 2.0, 0.5])], np.array([3.0, 2.0, 0.5]), 0.0, [])
    assert cascade.rotated(alone, 2, np.random.default_rng(0)) == pytest.approx([3.0, 2.0, 0.5])


def test_what_is_left_out_is_said():
    notes = " ".join(result_of("one layer").measured["left_out"])
    assert "has one layer" in notes and "random token ids" in notes
    assert "shuffled" not in result_of("one layer").null["survivors"]
    assert "no k that could bound" in " ".join(result_of("no TopK").measured["left_out"])


def test_nulls_and_bad_options():
    model = CircuitGPT(config_of(afrac=0.5))
    result = experiments.run("depth", model, prompts=2, tokens=4, directions=1, nulls=["rotated"])
    assert set(result.null["survivors"]) == {"rotated", "topk_off"}
    with pytest.raises(ValueError, match="null 'turned'.*untrained"):
        experiments.run("depth", model, nulls=["turned"])
    with pytest.raises(ValueError, match="prompts"):
        experiments.run("depth", model, prompts=1)
