"""Models and batches that look ordinary but are not: they are handled correctly, or refused with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalpel
from decoder_cases import MODELS, VOCAB, _llama_like, exact_norms, ids_of, model_of
from scalpel.hooks.inputs import limits_of
from scalpel.jacobians.module_pass import ModulePass
from scalpel.models.decoders.decoder import Decoder
from scalpel.models.decoders.families import decoder_or_reason

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalpel.jacobian differentiates")
        yield


def covariance(model: Any, batch: Any, hook: str, **options: Any) -> Tensor:
    return scalpel.collect(model, [batch], [hook], progress=False, **options)[hook].covariance()


def slope(model: Any, ids: Tensor, J: Any, tangent: Tensor) -> Tensor:
    """The derivative of the logits along a tangent at the embedding, by central differences through the model alone."""
    embedded = model.get_input_embeddings()(ids)
    step = 1e-6
    ahead, behind = (model(inputs_embeds=embedded + sign * step * tangent).logits for sign in (1, -1))
    return (ahead - behind).detach() / (2 * step)


# ---- what a forward pass notes about itself ------------------------------------------------------


def test_positions_that_grow_with_the_text() -> None:
    """Some models record the text length for which their frequencies were computed; that record must follow the
    frequencies.
    """
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    make = _llama_like("Llama", rope_parameters=rope, max_position_embeddings=8)

    def fresh() -> Any:
        torch.manual_seed(0)
        model = make().double().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        return model

    model, ids, short = fresh(), ids_of(1, 20), ids_of(1, 6, seed=1)
    expected, own = fresh()(ids).logits, fresh()(short).logits
    J = scalpel.jacobian(model, ids, "0.resid_in", "logits")
    torch.testing.assert_close(J.primal, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(short).logits, own, rtol=1e-9, atol=1e-9)
    tangent = torch.randn(J.source_shape, dtype=torch.float64)
    for _ in range(2):
        found = J.jvp(tangent[None])[0]
        torch.testing.assert_close(found, slope(fresh(), ids, J, tangent), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
        model(short)


def test_a_module_or_a_buffer_that_is_exchanged_after_the_jacobian() -> None:
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU()).double().eval()
    model[2].running_var.fill_(2.0)
    ids = torch.arange(10)[:, None]
    model[0].register_forward_hook(lambda _, given, output: output[:, 0])
    for change, words in (
        (lambda m: m.__setitem__(3, nn.Tanh()), "modules changed"),
        (lambda m: m[2].running_var.fill_(3.0), "buffer '2.running_var' changed"),
    ):
        edited = copy.deepcopy(model)
        J = scalpel.jacobian(edited, ids, "1:in", "3")
        J.jvp(torch.ones(1, *J.source_shape, dtype=torch.float64))
        change(edited)
        with pytest.raises(RuntimeError, match=words):
            J.jvp(torch.ones(1, *J.source_shape, dtype=torch.float64))


# ---- weights that no rule reads ------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_rules_read_every_weight(name: str) -> None:
    assert isinstance(decoder_or_reason(model_of(name)), Decoder)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_part_that_begins_at_zero_is_no_reason_to_trust_the_rules(kind: str) -> None:
    model, ids = model_of("llama"), ids_of(1, 4)
    mlp = model.model.layers[1].mlp
    zeros = torch.zeros(12, dtype=torch.float64)
    mlp.register_buffer("steer", zeros) if kind == "buffer" else mlp.register_parameter("steer", nn.Parameter(zeros))
    plain = type(mlp).forward

    class Steered(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return plain(self, x) + self.steer

    mlp.__class__ = Steered
    scalpel.jacobian(model, ids, "0.resid_in", "logits")  # adding zeros changes nothing yet
    with torch.no_grad():
        mlp.steer.add_(3.0)
    found = scalpel.jacobian(model, ids, "0.resid_in", "logits").primal
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-9, atol=1e-9)
    assert "steer" in str(decoder_or_reason(model))


def test_an_adapter_on_a_tied_output_matrix() -> None:
    peft = pytest.importorskip("peft")
    model, ids = model_of("llama"), ids_of(1, 4)  # its output matrix is the embedding
    assert model.config.tie_word_embeddings
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])).get_base_model().double()
    scalpel.jacobian(model, ids, "0.resid_in", "logits")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = scalpel.jacobian(model, ids, "0.resid_in", "logits").primal
    torch.testing.assert_close(found, model(ids).logits.detach(), rtol=1e-6, atol=1e-6)


# ---- gradients -----------------------------------------------------------------------------------


def test_gradients_of_frozen_weights_whose_embeddings_ask_for_them() -> None:
    """As when adapters are trained: no weight needs a gradient, only the input does."""
    model, ids = model_of("gpt2"), ids_of()
    expected = covariance(model, ids, "1.resid_in.grad")
    model.enable_input_require_grads()
    torch.testing.assert_close(covariance(model, ids, "1.resid_in.grad"), expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_an_inference_mode_model_from_several_threads() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(model_of("gpt2"))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model = copy.deepcopy(model)
    batches = [ids_of(2, 6, seed) for seed in range(6)]
    expected = [covariance(model_of("gpt2"), ids, "1.resid_in.grad") for ids in batches]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda ids: covariance(model, ids, "1.resid_in.grad"), batches))
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-6, atol=1e-9)


def test_checkpointing_through_torch_func() -> None:
    """The hook at the embedding requests gradients, which no transform of torch.func allows."""
    model, ids = model_of("llama").requires_grad_(True), ids_of()
    ends = ("model.layers.0", "model.layers.1.mlp.up_proj")  # the second is not a hook of the rules
    expected = scalpel.jacobian(model, ids, *ends)
    assert isinstance(expected._source.run, ModulePass)
    V = torch.randn(2, *expected.source_shape, dtype=torch.float64)
    U = torch.randn(2, *expected.target_shape, dtype=torch.float64)
    pushed, pulled = expected.jvp(V), expected.vjp(U)
    model.enable_input_require_grads()
    J = scalpel.jacobian(model, ids, "model.embed_tokens", ends[1])
    assert J.jvp(V).shape == pushed.shape
    J = scalpel.jacobian(model, ids, *ends)
    torch.testing.assert_close(J.jvp(V), pushed, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(J.vjp(U), pulled, rtol=1e-9, atol=1e-9)


# ---- batches -------------------------------------------------------------------------------------


def test_an_encoder_and_a_decoder_have_a_text_each() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    batch = {"input_ids": ids_of(2, 6), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}
    batch |= {"decoder_input_ids": ids_of(2, 4), "decoder_attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]])}
    found = scalpel.collect(model, [batch], ["encoder.block.1", "decoder.block.1"], progress=False)
    assert [state.count for state in found.values()] == [9, 6]
    with pytest.raises(ValueError, match="encoder-decoder.*give loss="):
        covariance(model, batch, "decoder.block.1.grad")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64, "three axes"])
def test_a_mask_of_any_kind_forbids_what_it_says(kind: Any, attention: str) -> None:
    model, ids = model_of("gpt2"), ids_of(1, 5)
    model.set_attn_implementation(attention)
    padded = torch.cat([torch.full((1, 3), 7), ids], dim=1)
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    allowed[:, :3] = False
    allowed = (allowed | ~allowed.any(-1, keepdim=True))[None, None]
    mask = allowed if isinstance(kind, str) else allowed.to(kind)
    if kind is torch.float64:
        mask = torch.zeros(allowed.shape, dtype=kind).masked_fill(~allowed, -torch.inf)
    batch = {"input_ids": padded, "attention_mask": mask[:, 0] if isinstance(kind, str) else mask}
    found = scalpel.collect(model, [batch], ["2.resid_in"], progress=False)["2.resid_in"]
    alone = scalpel.collect(model, [ids], ["2.resid_in"], progress=False)["2.resid_in"]
    assert found.count == 5
    torch.testing.assert_close(found.covariance(), alone.covariance(), rtol=1e-6, atol=1e-9)
    primal = scalpel.jacobian(model, batch, "0.resid_in", "final_resid").primal[:, 3:]
    torch.testing.assert_close(primal, scalpel.jacobian(model, ids).primal, rtol=1e-6, atol=1e-8)


def test_masks_that_mean_nothing_are_refused() -> None:
    model, ids = model_of("gpt2"), ids_of(1, 4)
    causal = torch.ones(1, 1, 4, 4).tril()
    for mask, words in ((causal, "added to the scores.*-inf"), (3 * causal.long(), "0 to 3.*zeros and ones")):
        with pytest.raises(ValueError, match=words):
            scalpel.jacobian(model, ids, attention_mask=mask)


def test_a_mask_for_each_kind_of_layer() -> None:
    model, ids = model_of("qwen2"), ids_of(1, 5)
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    masks = {"full_attention": causal, "sliding_attention": causal & causal.triu(-1)}
    found = scalpel.jacobian(model, {"input_ids": ids, "attention_mask": masks}).primal
    torch.testing.assert_close(found, scalpel.jacobian(model, ids).primal, rtol=1e-7, atol=1e-9)


def test_a_row_of_nothing_but_padding() -> None:
    model = model_of("gpt2")
    batch = {"input_ids": ids_of(2, 6), "attention_mask": torch.tensor([[1] * 6, [0] * 6])}
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None, :]
    wired = batch | {"attention_mask": allowed | ~allowed.any(-1, keepdim=True)}
    for each in (batch, wired):
        assert scalpel.collect(model, [each], ["1.resid_in"], progress=False)["1.resid_in"].count == 6


def test_axes_in_another_order_and_values_without_tokens() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.turned, self.pooled = nn.Embedding(11, 4), nn.Identity(), nn.Identity()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.turned(self.e(input_ids).transpose(0, 1))
            return self.pooled(x.mean(0))

    model = Turned()
    batch = {"input_ids": ids_of(3, 4) % 11, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])}
    with pytest.raises(ValueError, match=r"turned.*\(4, 3, 4\).*without padding"):
        covariance(model, batch, "turned")
    assert covariance(model, batch, "pooled").shape == (4, 4)  # (batch, width), which looks like (batch, length)
    assert scalpel.collect(model, [batch], ["pooled"], progress=False)["pooled"].count == 3


def test_tables_of_positions_of_something_else() -> None:
    class Seeing(nn.Module):
        """A language model with a vision tower that counts the patches of an image."""

        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleDict({"position_embedding": nn.Embedding(5, 4)})
            self.language = nn.ModuleDict({"embed_tokens": nn.Embedding(11, 4), "wpe": nn.Embedding(64, 4)})

        def get_input_embeddings(self) -> nn.Module:
            return self.language["embed_tokens"]

        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            return self.language["embed_tokens"](input_ids)

        def get_rope_index(self) -> None: ...

    limits = limits_of(Seeing())
    assert limits.context == 64 and limits.vocab_size == 11
    assert not limits.takes_positions, "a model that makes positions of three axes makes them itself"
    assert limits_of(model_of("gpt2")).takes_positions


def test_adapters_around_the_embeddings_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of("gpt2"), peft.LoraConfig(target_modules=["wte"])).get_base_model()
    with pytest.raises(ValueError, match=f"input_ids holds {VOCAB}"):
        scalpel.jacobian(model, torch.tensor([[VOCAB]]), "transformer.h.0:in", "transformer.h.1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(TypeError, match="runs no hooks: give the module that it was made of"):
        scalpel.jacobian(scripted, torch.ones(1, 3), ":in", "")


# ---- offloaded -----------------------------------------------------------------------------------


def test_blocks_that_are_loaded_whole_and_states_of_another_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, model, other, ids = model_of("gpt2"), model_of("gpt2"), model_of("gpt2", seed=1), ids_of(1, 4)
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["GPT2Block"])
    accelerate.cpu_offload(other, execution_device="cpu")
    J, expected = (scalpel.jacobian(each, ids, "1.resid_in", "2.resid_in") for each in (model, plain))
    V = torch.randn(1, *expected.source_shape, dtype=torch.float64)
    torch.testing.assert_close(J.jvp(V), expected.jvp(V), rtol=1e-7, atol=1e-9)
    covariance(model, ids, "1.resid_in", folder=tmp_path)
    with pytest.raises(ValueError, match=r"another collection .*model"):
        covariance(other, ids, "1.resid_in", folder=tmp_path)
