"""Jacobians of transformers' decoders through their rules, compared with plain autograd over the models themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoder_cases import MODELS, exact_norms, ids_of, model_of
from scalpel import jacobian
from scalpel.hooks.names import hook_named, module_path
from scalpel.jacobians.rows.products import DenseProducts
from scalpel.models.decoders.families import decoder_of, hooks_of
from scalpel.reference.jacobian import jacobian_dense

pytest.importorskip("transformers")
EXACT = {"rtol": 1e-9, "atol": 1e-10}
# The weights and tangents of seven products in each of three layers are rounded by at most 2^-8; independent errors
# accumulate like a square root.
BFLOAT16 = (2 * 7 * 3) ** 0.5 * 2.0**-8


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms(), warnings.catch_warnings():
        # The warning that torch.func is used; its absence shows that the rules ran.
        warnings.filterwarnings("error", message="scalpel.jacobian differentiates")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def announced(value: bool) -> None:
    import scalpel.jacobians.derivative as derivative

    derivative._announced = value


def path(model: Any, hook: str) -> str:
    decoder = decoder_of(model)
    assert decoder is not None
    found = module_path(hook, decoder.family.PATHS, hooks_of(decoder.config))
    assert hook == "logits" or found != hook, hook
    return found


def check(model: Any, ids: Tensor, source: str, target: str, positions: Any = None, **inputs: Any) -> None:
    J = jacobian(model, ids, source, target, positions, **inputs)
    expected = jacobian_dense(model, ids, path(model, source), path(model, target), positions, **inputs)
    assert bool(expected.any())
    n, m = J.shape[1], J.shape[0]
    V = torch.eye(n, dtype=torch.float64).view(n, *J.source_shape)
    torch.testing.assert_close(J.jvp(V).reshape(n, m).T, expected, **EXACT)
    U = torch.eye(m, dtype=torch.float64).view(m, *J.target_shape)
    torch.testing.assert_close(J.vjp(U).reshape(m, n), expected, **EXACT)


@pytest.mark.parametrize("positions", [None, (1, -1), ([4, 2], slice(2, 5))], ids=str)
def test_whole_models(model: Any, positions: Any) -> None:
    check(model, ids_of(), "0.resid_in", "final_resid", positions)


def test_logits(model: Any) -> None:
    check(model, ids_of(1, 5), "1.resid_in", "logits", (None, [3, 1]))
    primal = jacobian(model, ids_of(), "0.resid_in", "logits").primal
    torch.testing.assert_close(primal, model(ids_of()).logits, **EXACT)


def test_every_hook_as_source_and_as_target(model: Any) -> None:
    decoder = decoder_of(model)
    assert decoder is not None
    for hook in hooks_of(decoder.config):
        if hook.startswith("1.") and module_path(hook, decoder.family.PATHS, hooks_of(decoder.config)) != hook:
            if not hook.endswith("resid_mid"):
                check(model, ids_of(1, 4), hook, "final_resid")
            if hook != "1.resid_in":
                check(model, ids_of(1, 4), "1.resid_in", hook)


def test_the_middle_of_a_layer_is_passed_by_all_paths(model: Any) -> None:
    if model.config.model_type == "gpt_neox" and model.config.use_parallel_residual:
        pytest.skip("attention and MLP in parallel have no middle")
    first, second = jacobian(model, ids_of(), "1.resid_in", "1.resid_mid"), jacobian(model, ids_of(), "1.resid_mid")
    whole = jacobian(model, ids_of(), "1.resid_in")
    torch.testing.assert_close(second.to_dense() @ first.to_dense(), whole.to_dense(), **EXACT)
    branch = path(model, "1.resid_mid")  # the input of the norm, which is another kind of source
    with pytest.warns(UserWarning, match="torch.func"):
        announced(False)
        alone = jacobian(model, ids_of(), branch, "final_resid")
    assert not torch.allclose(alone.to_dense(), second.to_dense())


def test_within_attention(model: Any) -> None:
    """GPT-2 and GPT-NeoX have no modules for q, k and v, so these are compared with the chain through them."""
    through = jacobian(model, ids_of(1, 4), "1.attn.act_in", "1.attn.y").to_dense()
    chain = torch.zeros_like(through)
    for name in "qkv":
        before = jacobian(model, ids_of(1, 4), "1.attn.act_in", f"1.attn.{name}")
        chain += (jacobian(model, ids_of(1, 4), f"1.attn.{name}", "1.attn.y") @ before).to_dense()
    torch.testing.assert_close(chain, through, **EXACT)


def test_padding_and_positions(model: Any) -> None:
    ids = ids_of(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    check(model, ids, "0.resid_in", "final_resid", (None, [3, 5]), attention_mask=mask, position_ids=places)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    J = jacobian(model, batch, "0.resid_in", "final_resid", (None, -1))
    moved = J.to_dense().reshape(2, -1, *J.source_shape)
    assert not moved[1, :, 1, :2].any()  # no padding token takes part
    check(model, ids, "0.resid_in", "final_resid", attention_mask=torch.ones_like(ids))


def test_products_are_linear_adjoint_and_compose(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    J = jacobian(model, ids_of(), "0.resid_in", "2.resid_in")
    V = torch.randn(17, *J.source_shape, generator=generator, dtype=torch.float64)
    U = torch.randn(17, *J.target_shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((J.jvp(V) * U).sum(), (J.vjp(U) * V).sum(), **EXACT)
    torch.testing.assert_close(J.jvp(V[:1]), J.jvp(V)[:1], **EXACT)
    assert J.jvp(V[:0]).shape == (0, *J.target_shape)
    first, second = jacobian(model, ids_of(), "0.resid_in", "1.resid_in"), jacobian(model, ids_of(), "1.resid_in")
    whole = jacobian(model, ids_of())
    torch.testing.assert_close(second.jvp(first.jvp(V)), whole.jvp(V), **EXACT)
    torch.testing.assert_close((second @ first).jvp(V), whole.jvp(V), **EXACT)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300])
@pytest.mark.parametrize("length", [1, 16])
def test_any_number_of_tangents_over_one_token_and_the_full_context(length: int, count: int) -> None:
    J = jacobian(model_of("gpt2"), ids_of(1, length))
    dense = J.to_dense()
    V = torch.randn(count, *J.source_shape, dtype=torch.float64)
    torch.testing.assert_close(J.jvp(V).flatten(1), V.flatten(1) @ dense.T, **EXACT)
    torch.testing.assert_close(J.vjp(V).flatten(1), V.flatten(1) @ dense, **EXACT)


def test_chunks_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    J = jacobian(model, ids_of())
    V = torch.randn(5, *J.source_shape, dtype=torch.float64)
    whole, back = J.jvp(V), J.vjp(V)
    monkeypatch.setattr("scalpel.jacobians.rows.products._CHUNK_BYTES", 1)
    monkeypatch.setattr("scalpel.jacobians.rows.attention._TILE_NUMBERS", 1)
    J = jacobian(model, ids_of())
    torch.testing.assert_close(J.jvp(V), whole, **EXACT)
    torch.testing.assert_close(J.vjp(V), back, **EXACT)


def test_tiles_of_a_longer_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalpel.jacobians.rows.attention._TILE_NUMBERS", 1)  # a tile has sixteen queries
    model = model_of("mistral")
    check(model, ids_of(1, 32), "0.resid_in", "1.resid_in", ([3, 20], [5, 19, 23]))


def test_names(model: Any) -> None:
    decoder = decoder_of(model)
    assert decoder is not None
    for alias, hook in {
        "blocks.1.hook_resid_pre": "1.resid_in",
        "blocks.1.hook_resid_post": "2.resid_in",
        "blocks.2.hook_resid_post": "final_resid",
        "blocks.0.attn.hook_z": "0.attn.y",
        "blocks.0.hook_mlp_out": "0.mlp.resid_delta",
        decoder.family.PATHS["after"].format(i=0): "1.resid_in",
        decoder.family.PATHS["final_resid"]: "final_resid",
    }.items():
        assert hook_named(alias, decoder.family.PATHS, hooks_of(decoder.config), False) == hook
    J = jacobian(model, ids_of(), "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    torch.testing.assert_close(J.to_dense(), jacobian(model, ids_of(), "0.resid_in", "2.resid_in").to_dense())


@pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")
def test_what_has_no_rules_goes_through_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = jacobian(model, ids_of(), "0.resid_in", "final_resid").to_dense()

    def refuse(*_: Any) -> None:
        raise AssertionError("the rules ran")

    monkeypatch.setattr(DenseProducts, "__init__", refuse)
    with pytest.raises(AssertionError, match="the rules ran"):
        jacobian(model, ids_of())
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    warnings.simplefilter("ignore")
    torch.testing.assert_close(jacobian(model, ids_of(), "0.resid_in", "final_resid").to_dense(), expected, **EXACT)
    handle.remove()
    jacobian(model, ids_of(), "model.layers.0.mlp.gate_proj", "final_resid")


def test_a_hook_that_changes_a_value_counts() -> None:
    model = model_of("gpt2")
    plain = jacobian(model, ids_of(1, 3)).to_dense()
    warnings.simplefilter("ignore")
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda module, given, output: 0 * output)
    moved = jacobian(model, ids_of(1, 3)).to_dense()
    handle.remove()
    expected = jacobian(model, ids_of(1, 3)).to_dense()
    assert torch.equal(expected, plain)
    assert not torch.allclose(moved, plain)


def test_errors() -> None:
    model = model_of("gpt_neox")
    with pytest.raises(ValueError, match="no path from '1.resid_in' to '0.resid_in'"):
        jacobian(model, ids_of(), "1.resid_in", "0.resid_in")
    with pytest.raises(ValueError, match=r"no path from '0.attn.y' to '0.mlp.post_act'"):
        jacobian(model, ids_of(), "0.attn.y", "0.mlp.post_act")  # with parallel branches
    with pytest.raises(ValueError, match="no path .* at position 3 .* position 2"):
        jacobian(model, ids_of(), positions=(3, 2))
    with pytest.raises(ValueError, match="unknown source '1.resid_mid'"):
        jacobian(model, ids_of(), "1.resid_mid")
    with pytest.raises(ValueError, match="target position 6 is outside the text of 6 tokens"):
        jacobian(model, ids_of(), positions=(0, 6))
    with pytest.raises(ValueError, match="precision is 'float16'; allowed: None, 'bfloat16'"):
        jacobian(model, ids_of(), precision="float16")
    J = jacobian(model, ids_of())
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights changed"):
        J.jvp(torch.zeros(1, *J.source_shape, dtype=torch.float64))
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN at 'final_resid'"):
        jacobian(model, ids_of())


def test_bfloat16(model: Any) -> None:
    model = model.float()
    V = torch.randn(4, *jacobian(model, ids_of()).source_shape, generator=torch.Generator().manual_seed(0))
    wide, narrow = jacobian(model, ids_of()), jacobian(model, ids_of(), precision="bfloat16")
    assert torch.equal(wide.primal, narrow.primal)
    for product in ("jvp", "vjp"):
        right, found = getattr(wide, product)(V), getattr(narrow, product)(V)
        assert 1e-5 < float((found - right).norm() / right.norm()) < BFLOAT16
    before = narrow.jvp(V)
    for parameter in model.parameters():
        parameter.mul_(1.5)  # the copies must be updated
    after = jacobian(model, ids_of(), precision="bfloat16").jvp(V)
    right = jacobian(model, ids_of()).jvp(V)
    assert float((after - right).norm() / right.norm()) < BFLOAT16
    assert not torch.allclose(after, before, rtol=0.05)


def test_a_bfloat16_model(model: Any) -> None:
    model = model.bfloat16()
    J = jacobian(model, ids_of())
    assert J.dtype == torch.float32
    wide = jacobian(copy.deepcopy(model).double(), ids_of())
    V = torch.randn(4, *J.source_shape, generator=torch.Generator().manual_seed(0))
    right = wide.jvp(V.double())
    # The primal is rounded too, and a ReLU near 0 may choose the other side.
    allowed = 10 * BFLOAT16 if getattr(model.config, "activation_function", "") == "relu" else 2 * BFLOAT16
    assert float((J.jvp(V).double() - right).norm() / right.norm()) < allowed


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    name=st.sampled_from(list(MODELS)),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    length=st.integers(1, 6),
    data=st.data(),
)
def test_random_ends_and_positions(name: str, seed: int, batch: int, length: int, data: Any) -> None:
    model = model_of(name, seed)
    decoder = decoder_of(model)
    assert decoder is not None
    named, paths = hooks_of(decoder.config), decoder.family.PATHS
    hooks = [hook for hook in named if module_path(hook, paths, named) != hook]
    source = data.draw(st.sampled_from([hook for hook in hooks if not hook.endswith("resid_mid")]))
    target = data.draw(st.sampled_from([*hooks[hooks.index(source) :], "logits"]))
    picks = st.one_of(st.none(), st.lists(st.integers(0, length - 1), min_size=1, max_size=2, unique=True))
    positions = (data.draw(picks), data.draw(picks))
    ids = ids_of(batch, length, seed)
    expected = jacobian_dense(model, ids, path(model, source), path(model, target), positions)
    try:
        J = jacobian(model, ids, source, target, positions)
    except ValueError as error:
        assert "no path" in str(error)
        assert not expected.any()
        return
    T = data.draw(st.sampled_from([0, 1, 3]))
    V = torch.randn(T, *J.source_shape, dtype=torch.float64)
    U = torch.randn(T, *J.target_shape, dtype=torch.float64)
    torch.testing.assert_close(J.jvp(V).flatten(1), V.flatten(1) @ expected.T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(J.vjp(U).flatten(1), U.flatten(1) @ expected, rtol=1e-8, atol=1e-9)
