"""SmolLM2-135M-Instruct, dequantised from Q4_1: read, saved and streamed, and its Jacobian compared with torch.func."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import scalpel
from decoder_cases import exact_norms
from scalpel.analysis import source
from scalpel.analysis.source import Source
from scalpel.analysis.text import Choice, read_text
from scalpel.jacobians.stream import stream_layers
from scalpel.models.gguf import conventions
from scalpel.models.tokenizer import Tokenizer
from scalpel.models.weight_files import CheckpointError
from wrapper_cases import mapped

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

CAPITAL = "The capital of France is"
TEXT = "Once upon a time, a small model read 12 tokens and forgot none of them."
FIRST, LAYERS = 15, 30


def ids_of(tokenizer: Tokenizer, text: str, count: int | None = None) -> Tensor:
    return torch.tensor([tokenizer.encode(text)[:count]])


def residuals(model: Any, ids: Tensor, layers: range) -> list[Tensor]:
    """The input (1, L, width) of each of ``layers``, as transformers computes it."""
    found: list[Tensor] = []
    modules = [model.model.layers[i] for i in layers]
    handles = [each.register_forward_pre_hook(lambda _, given: found.append(given[0])) for each in modules]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


# ---- the file ------------------------------------------------------------------------------------


def test_it_says_paris(smollm2: Any, smollm2_tokenizer: Tokenizer) -> None:
    ids = ids_of(smollm2_tokenizer, CAPITAL)
    assert smollm2_tokenizer.decode([int(smollm2(ids).logits[0, -1].argmax())]) == " Paris"
    assert type(smollm2).__name__ == "LlamaForCausalLM" and smollm2.dtype == torch.float32
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134515008


def test_text_is_cut_as_it_was_trained(smollm2_tokenizer: Tokenizer) -> None:
    """Each digit is a token of its own, with a space before it too, and the start of a chat is one token."""
    spelt = [smollm2_tokenizer.id_to_token(i) for i in smollm2_tokenizer.encode("in  2024<|im_start|>")]
    assert spelt == ["in", "ĠĠ", "2", "0", "2", "4", "<|im_start|>"]
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(TEXT)) == TEXT


@pytest.fixture(scope="module")
def folder(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("smollm2")
    smollm2.save_pretrained(path, max_shard_size="120MB")
    yield path
    for each in path.glob("*.safetensors"):  # half a gigabyte
        each.unlink()


def test_it_is_saved_and_read_again(smollm2: Any, smollm2_tokenizer: Tokenizer, folder: Path) -> None:
    ids = ids_of(smollm2_tokenizer, CAPITAL)
    again = source.load(folder)
    assert again.trained is not None and again.facts["weights_sha256"] == source._fingerprint(smollm2)
    assert again.facts["layers"] == LAYERS and "quantization_config" not in json.loads(
        (folder / "config.json").read_text()
    )
    assert torch.equal(again.trained(ids).logits, smollm2(ids).logits)


def test_the_stream_gives_the_same_residuals(smollm2: Any, smollm2_tokenizer: Tokenizer, folder: Path) -> None:
    ids = ids_of(smollm2_tokenizer, CAPITAL)
    states = residuals(smollm2, ids, range(4))
    layers = stream_layers(folder, ids)
    for i in range(3):
        layer = next(layers)
        torch.testing.assert_close(layer.before, states[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.after, states[i + 1], rtol=1e-4, atol=1e-3)
    layers.close()  # type: ignore[attr-defined]


def test_a_key_that_is_missing(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    lost = "model.layers.20.mlp.up_proj.weight"
    shard = folder / index[lost]
    whole = load_file(shard)
    try:
        save_file({name: tensor for name, tensor in whole.items() if name != lost}, shard, metadata={"format": "pt"})
        for stream in (False, True):
            with pytest.raises(CheckpointError, match=f"lacks '{lost}'"):
                source.load(folder, stream=stream)
    finally:
        save_file(whole, shard, metadata={"format": "pt"})


def test_an_analysis_takes_the_file_alone(
    smollm2: Any, smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save the folder with its tokenizer. Reading the weights again would take as long as everything else."""
    monkeypatch.setattr(source, "plain_model", lambda file: {smollm2_gguf: smollm2}[file])
    found = source.load(smollm2_gguf)
    assert found.facts["name"] == "SmolLM2-135M-Instruct.Q4_1" and found.facts["layers"] == LAYERS
    assert found.facts["dtype"] == "float32, dequantised from a GGUF whose tensors are 210 Q4_1, 61 F32, 1 Q8_0"
    assert found.context == 8192 and found.trained is smollm2
    (tmp_path / "text.txt").write_text(CAPITAL)
    text = read_text(tmp_path / "text.txt", found, None, 4)
    assert text.ids == (504, 3575, 282, 4649, 314) and text.facts["tokenizer"] == "the model's own"


# ---- which tokens count --------------------------------------------------------------------------


LONG = TEXT + "\n\nIn 1827, it was \u201cnaïve\u201d:\n    return 日本 + x  # 3.14\n" + CAPITAL + (" " + TEXT) * 2


@pytest.fixture(scope="module")
def readers(smollm2_gguf: Path, smollm2_tokenizer: Tokenizer) -> tuple[Source, Any]:
    """The file as an analysis finds it, and transformers' tokenizer of it. Each takes seconds to read."""
    transformers = pytest.importorskip("transformers")
    agreed = conventions(smollm2_gguf)
    found = Source("decoder", {"name": "SmolLM2"}, 8192, 49152, smollm2_tokenizer, None, conventions=lambda: agreed)
    theirs = transformers.AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    # transformers does not split off digits
    theirs.backend_tokenizer.pre_tokenizer = smollm2_tokenizer.inner.pre_tokenizer
    return found, theirs


@pytest.mark.parametrize("length", [32, 40])
def test_bos_and_the_chat_template_are_those_of_transformers(
    length: int, readers: tuple[Source, Any], tmp_path: Path
) -> None:
    """Each chunk is what transformers makes of a message with the rest of the text, up to the length."""
    found, theirs = readers
    path = tmp_path / "text.txt"
    path.write_text(LONG, encoding="utf-8")
    encoded = theirs(LONG, return_offsets_mapping=True)
    plain = encoded.input_ids

    begun = read_text(path, found, None, length, Choice(prepend_bos=True))
    assert theirs.bos_token_id == 1 and len(begun.chunks) == len(plain) // (length - 1) > 1
    for i, chunk in enumerate(begun.chunks):
        assert list(chunk.ids) == [1, *plain[i * (length - 1) : (i + 1) * (length - 1)]]

    for bos in (False, True):  # the template begins with the same token
        written = read_text(path, found, None, length, Choice(prepend_bos=bos, chat_template=True))
        at = 0
        assert len(written.chunks) > 3
        for chunk in written.chunks:
            assert chunk.start == next(i for i, (_, end) in enumerate(encoded.offset_mapping) if end > at)
            message = [{"role": "user", "content": LONG[at:]}]
            assert list(chunk.ids) == theirs.apply_chat_template(message, return_dict=False)[:length]
            said = theirs.apply_chat_template(message, tokenize=False)
            offsets = theirs(said, return_offsets_mapping=True).offset_mapping
            at += offsets[length - 1][1] - said.index(LONG[at:])
        assert f"; 24 of a chunk's {length} tokens stand" in written.facts["chat template"]
        said = "none added: each chunk has '<|im_start|>' (1) already" if bos else "those of the chat template"
        assert written.facts["special tokens"] == said


def test_states_without_the_first_token(smollm2: Any, smollm2_tokenizer: Tokenizer) -> None:
    """The first token's norm is so large that it hides all others; it is attended to, and left out."""
    ids = torch.cat([torch.tensor([[1]]), ids_of(smollm2_tokenizer, TEXT)], dim=1)
    padded = {"input_ids": torch.nn.functional.pad(ids, (3, 0), value=2)}
    padded["attention_mask"] = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    value = residuals(smollm2, ids, range(12, 13))[0][0].double()
    for batch in (ids, padded):
        for rows in (scalpel.Rows(skip_first=1), scalpel.Rows(skip_ids=smollm2_tokenizer.special_ids)):
            state = scalpel.collect(smollm2, [batch], ["12.resid_in"], rows=rows, progress=False)["12.resid_in"]
            expected = torch.cov(value[1:].T, correction=0)
            assert state.count == len(value) - 1
            assert float((state.covariance() - expected).norm() / expected.norm()) < 1e-5
    assert float(torch.cov(value.T, correction=0).trace() / expected.trace()) > 10


# ---- its Jacobian --------------------------------------------------------------------------------


def residual_after(model: Any, exact: bool) -> Callable[[Tensor], Tensor]:
    """The layers from FIRST on, written out from the weights: (L, width) → (L, width).

    ``exact`` computes the norms in float64; otherwise they are float32, as in transformers.
    """
    weights, config = dict(model.named_parameters()), model.config
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        y = x if exact else x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return weights[f"{name}.weight"] * y.to(x.dtype)

    def turned(x: Tensor) -> Tensor:  # (heads, L, size); the angles are float32, as in transformers
        inverse = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        angle = torch.arange(x.shape[1]).float()[:, None] * inverse
        cos, sin = angle.cos().double(), angle.sin().double()
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)

    def layer(x: Tensor, i: int) -> Tensor:
        at = f"model.layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (y @ weights[f"{at}.self_attn.{each}_proj.weight"].T).reshape(len(x), count, size).transpose(0, 1)
            for each, count in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k, v = turned(q), turned(k).repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        scores = (q @ k.mT / size**0.5).masked_fill(later, -torch.inf).softmax(-1)
        x = x + (scores @ v).transpose(0, 1).flatten(1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up, down = (weights[f"{at}.mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
        return x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def all_of_them(x: Tensor) -> Tensor:
        for i in range(FIRST, LAYERS):
            x = layer(x, i)
        return x

    return all_of_them


@pytest.fixture(scope="module")
def in_float64(smollm2: Any) -> Iterator[Any]:
    yield copy.deepcopy(smollm2).double()


@pytest.mark.parametrize("exact,allowed", [(False, 1e-6), (True, 1e-9)], ids=["norms in float32", "norms in float64"])
def test_its_jacobian_is_that_of_torch_func(
    exact: bool, allowed: float, in_float64: Any, smollm2_tokenizer: Tokenizer
) -> None:
    """The Jacobian of 12 tokens from layer 15 to the end, in float64."""
    ids = ids_of(smollm2_tokenizer, TEXT, 12)
    assert ids.shape == (1, 12)
    draw = torch.Generator().manual_seed(0)
    with exact_norms() if exact else nullcontext():
        J = scalpel.jacobian(in_float64, ids, f"{FIRST}.resid_in", "final_resid")
        assert J.primal.dtype == torch.float64 and J.source_shape == J.target_shape == (1, 12, 576)
        V = torch.randn(2, *J.source_shape, dtype=torch.float64, generator=draw)
        pushed, pulled = J.jvp(V), J.vjp(V)
        x = residuals(in_float64, ids, range(FIRST, FIRST + 1))[0][0]
    reference = residual_after(in_float64, exact)
    primal, expected = torch.func.vmap(lambda v: torch.func.jvp(reference, (x,), (v,)))(V[:, 0])
    _, pull = torch.func.vjp(reference, x)
    (back,) = torch.func.vmap(pull)(V[:, 0])
    for found, right in ((J.primal[0], primal[0]), (pushed[:, 0], expected), (pulled[:, 0], back)):
        assert float((found - right).norm() / right.norm()) < allowed


def test_its_attention_weights_are_those_of_eager_attention(
    smollm2: Any, in_float64: Any, smollm2_tokenizer: Tokenizer
) -> None:
    """Their Jacobian over five layers at two queries, in float64, and their covariance with padding, in float32."""
    ids, layer = ids_of(smollm2_tokenizer, TEXT, 12), FIRST + 5
    eager = copy.deepcopy(in_float64)
    eager.config._attn_implementation = "eager"
    entry = eager.model.layers[FIRST]

    def weights(delta: Tensor) -> Tensor:
        moved = entry.register_forward_pre_hook(lambda _, given: (given[0] + delta, *given[1:]))
        try:
            return eager(ids, output_attentions=True, use_cache=False).attentions[layer][:, :, [5, 11]]
        finally:
            moved.remove()

    with exact_norms():
        J = scalpel.jacobian(in_float64, ids, f"{FIRST}.resid_in", f"{layer}.attn.pattern", (None, [5, 11]))
        draw = torch.Generator().manual_seed(0)
        V = torch.randn(1, *J.source_shape, dtype=torch.float64, generator=draw)
        U = torch.randn(1, *J.target_shape, dtype=torch.float64, generator=draw)
        pushed, pulled = J.jvp(V)[0], J.vjp(U)[0]
        zero = torch.zeros_like(V[0])
        primal, expected = torch.func.jvp(weights, (zero,), (V[0],))
        delta = zero.requires_grad_()
        cotangent = U[0].unflatten(-1, (9, 12)).transpose(1, 2)
        (back,) = torch.autograd.grad(weights(delta), delta, cotangent)
    pairs = [(J.primal, primal.transpose(1, 2).flatten(2)), (pushed, expected.transpose(1, 2).flatten(2))]
    for found, right in (*pairs, (pulled, back)):
        assert float((found - right).norm() / right.norm()) < 1e-5  # eager attention rounds its weights to float32

    eager = copy.deepcopy(smollm2)
    eager.config._attn_implementation = "eager"
    batch = {"input_ids": ids.expand(2, -1), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    batch["attention_mask"][1, :4] = 0
    states = scalpel.collect(smollm2, [batch], [f"blocks.{layer}.attn.hook_pattern"], progress=False)
    (state,) = states.values()
    rows = eager(**batch, output_attentions=True).attentions[layer].transpose(1, 2).flatten(2)
    rows = rows[batch["attention_mask"].bool()].double()
    assert state.count == 20 and state.dim == 9 * 12
    torch.testing.assert_close(state.covariance(), torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-6)


# ---- inside wrappers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoRA", "headless", "DataParallel"])
def test_names_of_hooks_inside_a_wrapper(smollm2: Any, smollm2_tokenizer: Tokenizer, kind: str) -> None:
    """Products and second moments beside torch.func and forward hooks on the plain or merged model."""
    ids = ids_of(smollm2_tokenizer, TEXT, 8)
    plain = smollm2
    if kind == "LoRA":
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(smollm2), config).eval()
        plain = copy.deepcopy(model).merge_and_unload()
    else:
        model = smollm2.model if kind == "headless" else torch.nn.DataParallel(smollm2)
    target = "28.mlp.post_act"
    J = scalpel.jacobian(model, ids, "27.resid_in", target)
    value_of = mapped(plain, ids, "model.layers.27:in", "model.layers.28.mlp.down_proj:in")
    tangent = torch.randn(J.source_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        primal, pushed = torch.func.jvp(value_of, (torch.zeros_like(tangent),), (tangent,))
    torch.testing.assert_close(J.primal, primal, rtol=1e-3, atol=1e-3)
    assert (J.jvp(tangent[None])[0] - pushed).norm() < 1e-3 * pushed.norm()
    found = scalpel.collect(model, [ids], [target], center=False, progress=False)[target].covariance()
    rows = primal.double().flatten(0, 1)
    expected = rows.T @ rows / len(rows)
    assert (found - expected).norm() < 1e-3 * expected.norm()
