"""Modified models and configs with switches: correct through the rules or through torch.func, and never wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from decoder_cases import exact_norms, ids_of, model_of
from edited_decoders import EDITS, another_head, biased_head
from scalpel import CircuitGPT, jacobian
from scalpel.models.decoders.families import decoder_inside, decoder_of
from scalpel.reference.jacobian import jacobian_dense

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield
    torch.set_num_threads(threads)


def check(model: Any) -> None:
    """The Jacobian from the first layer's input to the last norm's, compared with plain autograd over the
    unchanged model.
    """
    found = decoder_inside(model)
    assert found is not None
    source, target = found.paths["resid_in"].format(i=0), found.paths["final_resid"]
    expected = jacobian_dense(model, ids_of(), source, target)
    torch.testing.assert_close(jacobian(model, ids_of()).to_dense(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_gives_what_it_computes(name: str) -> None:
    kind, edit = EDITS[name]
    model = model_of(kind)
    before = jacobian(model, ids_of()).to_dense()  # earlier findings about the model must not be reused
    with torch.no_grad():
        edit(model)
    check(model)

    changed = not torch.allclose(jacobian(model, ids_of()).to_dense(), before)
    assert changed == (not any(word in name for word in ("ignores", "head", "config's eps")))


def test_logits_of_an_edited_head() -> None:
    for edit in (another_head, biased_head):
        model = model_of("llama")
        with torch.no_grad():
            edit(model)
        found = jacobian(model, ids_of(), "2.resid_in", "logits")
        torch.testing.assert_close(found.primal, model(ids_of()).logits)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_without_rules(kind: str) -> None:
    more = {"short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0} | (more if kind == "longrope" else {})
    import transformers

    model = model_of("llama")
    config = transformers.LlamaConfig(**(model.config.to_dict() | {"rope_parameters": rope}))
    other = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    assert decoder_of(other) is None
    if kind == "dynamic":  # longrope writes to a buffer in its forward pass, which torch.func refuses
        check(other)


def test_hooks_that_come_later_are_refused_and_global_ones_count() -> None:
    model = model_of("gpt2")
    J = jacobian(model, ids_of())
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda module, given, output: 2 * output)
    with pytest.raises(RuntimeError, match="a hook was added to the module 'transformer.h.1.mlp'"):
        J.jvp(torch.zeros(1, *J.source_shape, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"'1.attn.q' is no module's value.*there is a hook on the module 'transformer.h.1.mlp'"
    ):
        jacobian(model, ids_of(), "1.attn.q")
    handle.remove()
    J.jvp(torch.zeros(1, *J.source_shape, dtype=torch.float64))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: 2 * output if isinstance(module, nn.LayerNorm) else None
    )
    try:
        check(model)
    finally:
        handle.remove()


def test_a_change_through_data_reaches_the_narrow_copies() -> None:
    model = model_of("gpt2").float()
    V = torch.randn(2, *jacobian(model, ids_of()).source_shape)
    jacobian(model, ids_of(), precision="bfloat16").jvp(V)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    right = jacobian(model, ids_of()).jvp(V)
    found = jacobian(model, ids_of(), precision="bfloat16").jvp(V)
    assert float((found - right).norm() / right.norm()) < 2e-2


def test_a_function_that_works_in_place() -> None:
    model = model_of("gpt2")
    plain = jacobian(model, ids_of(), "2.resid_in", ("logits", torch.exp))
    inside = jacobian(model, ids_of(), "2.resid_in", ("logits", lambda z: z.exp_()))
    torch.testing.assert_close(inside.primal, plain.primal)
    torch.testing.assert_close(inside.to_dense(), plain.to_dense())


def test_precision_says_why_not() -> None:
    model = model_of("llama").float()
    with pytest.raises(ValueError, match=r"precision='bfloat16' needs the rules.*which keys it reads"):
        causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
        jacobian(model, ids_of(), attention_mask=causal, precision="bfloat16")
    with pytest.raises(ValueError, match=r"precision='bfloat16' needs the rules.*Linear is none of GPT2LMHeadModel"):
        jacobian(nn.Linear(3, 3), torch.zeros(1, 3), ":in", "", precision="bfloat16")


def test_autocast_and_inference_mode_change_nothing() -> None:
    model = model_of("llama").float()
    V = torch.randn(2, *jacobian(model, ids_of()).source_shape)
    right = jacobian(model, ids_of()).jvp(V)
    with torch.autocast("cpu"):
        assert torch.equal(jacobian(model, ids_of()).jvp(V), right)
    with torch.inference_mode():
        assert torch.equal(jacobian(model, ids_of()).jvp(V), right)
        sparse = CircuitGPT.from_pretrained("bracket-mini")
        logits = sparse(torch.arange(8)[None])  # its weights are inference tensors
    torch.testing.assert_close(logits, CircuitGPT.from_pretrained("bracket-mini")(torch.arange(8)[None]).detach())


def test_tangents_are_left_alone_whatever_their_strides() -> None:
    J = jacobian(model_of("gpt_neox"), ids_of())
    V = torch.randn(6, 16, 2, 3, dtype=torch.float64).permute(3, 2, 0, 1)
    before = V.clone()
    torch.testing.assert_close(J.jvp(V), J.jvp(V.contiguous()))
    torch.testing.assert_close(J.vjp(V), J.vjp(V.contiguous()))
    assert torch.equal(V, before)
    first = J.jvp(V)
    kept = first.clone()
    J.jvp(2 * V)
    assert torch.equal(first, kept)  # no result shares memory that is reused
