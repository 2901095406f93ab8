"""Models in the states that users keep them in: offloaded, checkpointed, hooked, created in inference mode."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import scalpel
from circuitgpt_cases import build
from decoder_cases import VOCAB, exact_norms, ids_of, model_of
from running_cases import collected, gradient_of, products, second_moment
from scalpel.models.decoders.decoder import Decoder
from scalpel.models.decoders.families import decoder_or_reason

pytest.importorskip("transformers")
ENDS = ["0.resid_in", "1.resid_in", "final_resid"]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


def test_a_gradient_that_does_not_exist_is_an_error() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.before, self.after = nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 11)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.after(self.before(self.e(input_ids)).detach())

    ids = ids_of() % 11
    with pytest.raises(ValueError) as caught:
        collected(Cut(), ids, "before.grad")
    assert all(words in str(caught.value) for words in ("before.grad", "detach", "leave this stream out"))
    assert collected(Cut(), ids, "after.grad").trace() > 0


# ---- weights and hooks that others put there -----------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk", "device map"])
def test_offloaded_weights(where: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, model, ids = model_of("llama"), model_of("llama"), ids_of()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as states:
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        elif where == "disk":
            accelerate.disk_offload(model, folder, execution_device="cpu")
        else:
            places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
            places |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        expected = second_moment(gradient_of(plain, ids, 1))
        torch.testing.assert_close(collected(model, ids), expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(collected(model, ids, folder=states), collected(model, ids, folder=states))
        torch.testing.assert_close(products(model, ids), products(plain, ids), rtol=1e-7, atol=1e-9)
        if where == "cpu":  # each product loads the weights of every layer again
            options: dict[str, Any] = {"cumulative": False, "probes": 0, "draws": 1, "hooks": ENDS}
            found, before = (scalpel.lyapunov(each, ids[:1, :2], 1, **options).exponents for each in (model, plain))
            torch.testing.assert_close(found, before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing(training: bool) -> None:
    model, ids = model_of("llama").requires_grad_(True), ids_of()
    expected, tangents = second_moment(gradient_of(model, ids, 1)), products(model, ids)
    by_paths = products(model, ids, "model.layers.0", "model.layers.1.mlp.up_proj")
    model.train(training)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for _ in range(2):
        torch.testing.assert_close(collected(model, ids), expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(products(model, ids), tangents, rtol=1e-9, atol=1e-9)
        found = products(model, ids, "model.layers.0", "model.layers.1.mlp.up_proj")
        torch.testing.assert_close(found, by_paths, rtol=1e-9, atol=1e-9)
        assert model.training == training
        model.gradient_checkpointing_disable()  # this leaves the hook at the embeddings in place
    assert len(model.model.embed_tokens._forward_hooks) > 0


def test_hidden_states_that_were_asked_for_once() -> None:
    """transformers then leaves a hook on every layer that changes no value, so the rules still apply."""
    model, ids = model_of("llama"), ids_of()
    expected = products(model, ids)
    model(ids, output_hidden_states=True)
    assert isinstance(decoder_or_reason(model), Decoder)
    assert torch.equal(products(model, ids), expected)


class _Checkpointed(nn.Module):
    """Activation checkpointing by the model itself, also in evaluation mode."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.e, self.inner, self.out, self.reentrant = nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 11), reentrant

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(checkpoint(self.inner, self.e(input_ids), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_stays_on_is_named(reentrant: bool) -> None:
    model, ids = _Checkpointed(reentrant), ids_of() % 11
    with pytest.raises(NotImplementedError, match="'e' and 'out'.*checkpointing"):
        J = scalpel.jacobian(model, ids, "e", "out")
        J.vjp(torch.ones(1, *J.target_shape))
    if reentrant:
        with pytest.raises(RuntimeError, match=r"e\.grad.*use_reentrant=False"):
            collected(model, ids, "e.grad")
        with pytest.raises(ValueError, match=r"inner\.grad.*reentrant"):
            collected(model, ids, "inner.grad")
    else:
        assert collected(model, ids, "inner.grad").trace() > 0


def test_a_model_that_counts_its_passes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.out = nn.Embedding(11, 5), nn.Linear(5, 11)
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("made", torch.zeros(()))

        def forward(self, input_ids: Tensor) -> Tensor:
            self.passes += 1
            self.made = self.made + torch.ones(2)  # a different tensor with another shape
            return self.out(self.e(input_ids)) * self.passes * self.made.mean()

    model, ids = Counting(), ids_of() % 11
    J = scalpel.jacobian(model, ids, "e", "")
    found = J.jvp(torch.ones(2, *J.source_shape))
    assert float(model.passes) == float(model.made) == 0, "a Jacobian leaves a model's buffers as they are"
    torch.testing.assert_close(found[0, 0, 0], model.out.weight.sum(dim=1).detach())
    torch.testing.assert_close(J.primal, model(ids).detach())


def test_buffers_that_the_forward_pass_writes_to() -> None:
    """Phi-3's long positions: the frequencies depend on the length of the text and are written in place."""
    import transformers

    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1],
        "long_factor": [2.0, 5.0],
        "original_max_position_embeddings": 8,
    }
    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        pad_token_id=0,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8)
    held: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        held.append(given[0])

    for length in (12, 6, 12):  # the second text must not use the first one's frequencies
        ids = ids_of(1, length)
        J = scalpel.jacobian(model, ids, "model.layers.0:in", "model.norm:in")
        tangent, cotangent = (torch.randn(J.source_shape, dtype=torch.float64) for _ in range(2))
        model(ids_of(1, 12 if length == 6 else 6))  # nor those left by the user's own forward pass
        forward, back = J.jvp(tangent[None])[0], J.vjp(cotangent[None])[0]

        embedded = model.model.embed_tokens(ids).requires_grad_()
        handle = model.model.norm.register_forward_pre_hook(keep)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            model(inputs_embeds=forward_ad.make_dual(embedded, tangent), use_cache=False)
            primal, expected = forward_ad.unpack_dual(held.pop())
        handle.remove()
        torch.testing.assert_close(J.primal, primal, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(forward, expected, rtol=1e-6, atol=1e-6)
        (expected,) = torch.autograd.grad(primal, embedded, cotangent)
        torch.testing.assert_close(back, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["by rules", "by torch.func", "circuitgpt"])
def test_a_hook_that_comes_or_goes_after_the_jacobian_is_refused(how: str) -> None:
    model: Any = build("plain") if how == "circuitgpt" else model_of("llama")
    module = model.transformer["h"][1] if how == "circuitgpt" else model.model.layers[1].mlp
    ends = ("model.layers.0", "model.layers.2.mlp.up_proj") if how == "by torch.func" else ()
    ids = ids_of() % 11

    def hook(_: nn.Module, given: Any, output: Any) -> Any:
        return 2 * output

    handle = module.register_forward_hook(hook) if how == "by torch.func" else None
    J = scalpel.jacobian(model, ids, *ends)
    V = torch.ones(1, *J.source_shape, dtype=J.dtype)
    U = torch.ones(1, *J.target_shape, dtype=J.dtype)
    before = J.jvp(V)
    if handle is None:
        handle = module.register_forward_hook(hook)
    else:
        handle.remove()
    for product, each in ((J.jvp, V), (J.vjp, U)):
        with pytest.raises(RuntimeError, match="hook was (added to|removed from) the module '.*call scalpel.jacobian"):
            product(each)
    if how != "by torch.func":
        handle.remove()
        assert torch.equal(J.jvp(V), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "circuitgpt"])
def test_weights_that_were_made_in_inference_mode(name: str) -> None:
    def make() -> Any:
        return build("like_csp_yolo2") if name == "circuitgpt" else model_of(name)

    with torch.inference_mode():
        model = make()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        frozen = copy.deepcopy(model)
    plain, ids = make(), ids_of() % 11
    assert any(each.is_inference() for each in frozen.parameters())
    torch.testing.assert_close(collected(frozen, ids), collected(plain, ids), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(products(frozen, ids), products(plain, ids), rtol=1e-6, atol=1e-9)


def test_what_torch_says_of_one_tangent() -> None:
    """The independent value with which these paths are compared, computed once without the library's own passes."""
    model, ids = model_of("gpt2"), ids_of(1, 4)
    J = scalpel.jacobian(model, ids, "transformer.h.1:in", "transformer.h.1")
    source = J.T.primal
    tangent = torch.randn(source.shape, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = jvp(lambda x: model.transformer.h[1](x), (source,), (tangent,))
    torch.testing.assert_close(J.jvp(tangent[None])[0], expected, rtol=1e-10, atol=1e-10)
