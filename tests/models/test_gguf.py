"""GGUF files are read as models that compute with exactly what the file holds, or they are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scalpel
from analysis_cases import chunk, invoke, text_of
from gguf_cases import CONTEXT, KV_HEADS, NAMES, TOKENS, gpt2, llama, qwen, tensors_of, write
from scalpel.analysis.source import load
from scalpel.jacobians.stream import stream_layers
from scalpel.models.gguf import gguf_in, plain_model, stored_as, tokenizer
from scalpel.models.gguf.header import read_header
from scalpel.models.weight_files import CheckpointError

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", tensors_of(llama()))


def same_weights(found: Any, model: Any) -> None:
    assert type(found) is type(model) and not found.training
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_was_written(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    found = plain_model(write(tmp_path / "tiny.gguf", tensors_of(model)))
    same_weights(found, model)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    found.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.facts["weights_sha256"] == load(tmp_path / "tiny.gguf").facts["weights_sha256"]
    (layer, *_) = stream_layers(tmp_path / "saved", ids)
    expected = model.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(layer.after, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    model = gpt2(file) if name == "gpt2" else qwen(file, int(name[-1]))
    found = plain_model(tmp_path)
    same_weights(found, model)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    J = scalpel.jacobian(found, ids, "1.resid_in", "final_resid")
    assert J.shape == (5 * found.config.hidden_size,) * 2
    assert tokenizer(file).encode("abc") == [14, 2]


def test_heads_of_a_width_that_transformers_does_not_read(tmp_path: Path) -> None:
    qwen(tmp_path / "tiny.gguf", 3, **{"attention.key_length": 64})
    with pytest.raises(CheckpointError, match=r"attention\.key_length is 64 in the file and 128 in the config"):
        plain_model(tmp_path)


def blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode in Q8_0 (per 32 numbers, a float16 scale and 32 bytes); return the bytes and the decoded numbers."""
    each = weight.reshape(-1, 32)
    scale = (np.abs(each).max(axis=1) / 127).astype(np.float16)
    whole = np.round(each / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8).reshape(-1, 2), whole.view(np.uint8)], axis=1)
    numbers = whole.astype(np.float32) * scale.astype(np.float32)[:, None]
    return raw.reshape(len(weight), -1), numbers.reshape(weight.shape)


def test_blocks_are_dequantised(tmp_path: Path) -> None:
    """The values follow the definition of the format, a scale times integers, and nothing stays quantised."""
    model = llama()
    tensors, kinds = tensors_of(model), {}
    turned = tensors["blk.1.ffn_up.weight"]
    tensors["blk.1.ffn_up.weight"], expected = blocks(turned)
    kinds["blk.1.ffn_up.weight"] = gguf.GGMLQuantizationType.Q8_0
    file = write(tmp_path / "tiny.gguf", tensors, kinds=kinds)
    found = plain_model(file)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    np.testing.assert_array_equal(found.model.layers[1].mlp.up_proj.weight.detach(), expected)
    assert 0 < np.abs(expected - turned).max() < 0.02
    assert stored_as(file) == "20 F32, 1 Q8_0"
    assert load(file).facts["dtype"].endswith("20 F32, 1 Q8_0")


def test_transformers_is_asked_to_dequantise(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default transformers may keep quantised blocks for the architectures for which it has a kernel."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this transformers always dequantises")
    auto, asked = transformers.AutoModelForCausalLM, []
    read = auto.from_pretrained

    def noted(*given: Any, **options: Any) -> Any:
        asked.append(options.get("quantization_config"))
        return read(*given, **options)

    monkeypatch.setattr(auto, "from_pretrained", noted)
    plain_model(file)
    assert len(asked) == 1 and isinstance(asked[0], transformers.GgufConfig) and asked[0].dequantize is True


def test_what_transformers_could_not_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second safeguard: without the first, which reads the file's header, a weight would be initialised
    randomly.
    """
    monkeypatch.setattr(scalpel.models.gguf.model, "check_tensors", lambda *_: None)
    left = {name: array for name, array in tensors_of(llama()).items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        plain_model(write(tmp_path / "less.gguf", left))


def test_nothing_random_and_nothing_of_the_place(file: Path, tmp_path: Path) -> None:
    """Reading twice gives the same config and hash, whatever lies beside the file, and draws no random number."""
    state = torch.get_rng_state()
    first = load(file)
    assert torch.equal(torch.get_rng_state(), state)
    crowded = tmp_path / "crowded"
    crowded.mkdir()
    file.rename(crowded / "tiny.gguf")
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json"):
        (crowded / name).write_text('{"base_model_name_or_path": "somewhere/else", "model_type": "bert"}')
    second = load(crowded)
    assert first.facts == second.facts and first.facts["name"] == "tiny"
    configs: list[Any] = [each.trained.config.to_dict() for each in (first, second) if each.trained is not None]
    assert configs[0] == configs[1] and "quantization_config" not in configs[0]
    assert str(crowded) not in json.dumps(configs[1], default=str)


def test_a_foreign_default_device_and_dtype(file: Path) -> None:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = plain_model(file)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    same_weights(found, llama())
    assert found.model.rotary_emb.inv_freq.device.type == "cpu"


# ---- text ----------------------------------------------------------------------------------------


def test_its_own_tokenizer(file: Path, tmp_path: Path) -> None:
    found = tokenizer(file)
    spelt = [found.id_to_token(i) for i in found.encode("abc  12 12<|end|>")]
    # Each digit is a token of its own, the rest is as in GPT-2.
    assert spelt == ["ab", "c", "ĠĠ", "1", "2", "Ġ", "1", "2", "<|end|>"]
    assert found.decode(found.encode("abc  12")) == "abc  12"
    assert max(found.encode("".join(TOKENS[:13]) + "<|end|>")) == len(TOKENS) - 1
    found.save(tmp_path)
    assert scalpel.models.tokenizer.Tokenizer.from_folder(tmp_path).encode("abc") == found.encode("abc")
    as_gpt2 = tokenizer(write(tmp_path / "gpt2.gguf", tensors_of(llama()), cut="gpt-2"))
    assert [as_gpt2.id_to_token(i) for i in as_gpt2.encode("c  12")] == ["c", "Ġ", "Ġ", "1", "2"]


def test_the_command_needs_no_tokenizer(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(40))
    out = tmp_path / "out"
    done = invoke(tmp_path, "--text", text, "--out", out, "--length", 6, "--chunks", 1, "--tangents", 3, "--spectra", 0)
    assert done.exit_code == 0, done.stderr
    ids = torch.tensor([tokenizer(file).encode(text_of(40))[:6]])
    L = scalpel.lyapunov(llama(), ids, 3)
    np.testing.assert_allclose(chunk(out, 0)["trained"]["exponents"], L.exponents, rtol=1e-4, atol=1e-4)
    facts = json.loads((out / "analysis.json").read_text())["model"]
    assert facts["kind"] == "LlamaForCausalLM" and "GGUF" in facts["dtype"] and facts["layers"] == 2


def test_text_that_is_cut_in_an_unknown_way(tmp_path: Path) -> None:
    """Such a file can still be used as a model, for text with a separate tokenizer."""
    file = write(tmp_path / "tiny.gguf", tensors_of(llama()), cut="as-nobody-does")
    text = tmp_path / "text.txt"
    text.write_text(text_of(40))
    with pytest.raises(CheckpointError, match="'as-nobody-does'"):
        tokenizer(file)
    options = ("--text", text, "--out", tmp_path / "out", "--length", 6, "--chunks", 1, "--tangents", 3, "--spectra", 0)
    done = invoke(file, *options)
    message = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "'as-nobody-does'" in message and "--tokenizer" in message
    tokenizer(write(tmp_path / "known.gguf", tensors_of(llama()))).save(tmp_path)
    done = invoke(file, *options, "--tokenizer", tmp_path / "tokenizer.json")
    assert done.exit_code == 0, done.stderr
    none = write(tmp_path / "none.gguf", tensors_of(llama()), tokens=False)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        tokenizer(none)


# ---- which file ----------------------------------------------------------------------------------


def test_a_folder_with_one(file: Path, tmp_path: Path) -> None:
    assert gguf_in(file) == gguf_in(tmp_path) == gguf_in(str(tmp_path)) == file
    other = file.with_name("weights-without-a-suffix")
    file.rename(other)
    assert gguf_in(other) == other and gguf_in(tmp_path) is None
    same_weights(plain_model(other), llama())
    parts = [tmp_path / f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 GGUF files, 'big-00001-of-00002.gguf', 'big-0.*--merge"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_in(tmp_path) is None  # a folder of safetensors with GGUF copies beside them
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.gguf"):
        load(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="neither a GGUF file nor a folder with one"):
        plain_model(tmp_path)


def test_a_link_that_leads_nowhere(file: Path, tmp_path: Path) -> None:
    """A link whose target was removed, as in a cleaned cache: the folder still counts as one with a GGUF."""
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "model.gguf"
    link.symlink_to(tmp_path / "removed.gguf")
    for name in (folder, link):
        for call in (load, plain_model, scalpel.CircuitGPT.from_pretrained):
            with pytest.raises(CheckpointError) as error:
                call(name)
            assert str(link) in str(error.value) and str(tmp_path / "removed.gguf") in str(error.value)
    (folder / "other.gguf").symlink_to(file)
    with pytest.raises(CheckpointError, match=r"2 GGUF files, 'model\.gguf', 'other\.gguf'"):
        load(folder)
    same_weights(plain_model(folder / "other.gguf"), llama())
    (folder / "nested.gguf").mkdir()  # a folder is not a file, whatever its name
    link.unlink()
    same_weights(plain_model(folder), llama())


def test_what_takes_no_gguf_says_what_does(file: Path, tmp_path: Path) -> None:
    for name in (file, str(tmp_path)):
        with pytest.raises(
            CheckpointError, match=r"scalpel analyze.*from scalpel\.models\.gguf import plain_model.*jacobian"
        ):
            scalpel.CircuitGPT.from_pretrained(name)
        with pytest.raises(CheckpointError, match=r"can't be streamed.*without --stream.*save_pretrained"):
            stream_layers(name, torch.zeros(1, 3, dtype=torch.int64))
        with pytest.raises(CheckpointError, match=r"can't be streamed.*without --stream.*save_pretrained"):
            load(name, stream=True)


def test_packages_that_are_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=rf"{name}: pip install 'semigroup-scalpel\[gguf\]'"):
                plain_model(file)
            with pytest.raises(CheckpointError, match=rf"{name}: pip install 'semigroup-scalpel\[gguf\]'"):
                load(file)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts,words",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, ["rope.scaling.type", "'linear'", "safetensors"]),
        ({"attention.key_length": 16}, ["attention.key_length", "16", "8"]),
        ({"attention.sliding_window": 8}, ["attention.sliding_window", "8"]),
        ({"expert_count": 2}, ["expert_count"]),
        ({"logit_scale": 0.5}, ["'logit_scale'"]),
        ({"context_length": None}, ["context_length is not in the file"]),
        ({"attention.layer_norm_rms_epsilon": None}, ["attention.layer_norm_rms_epsilon is not in the file"]),
    ],
    ids=str,
)
def test_metadata_that_transformers_passes_over(facts: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", tensors_of(llama()), facts)
    with pytest.raises(CheckpointError) as error:
        plain_model(file)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "facts,words,helps",
    [
        ({"logit_scale": 0.5}, "'logit_scale' has no place in the config", False),
        ({"logit_scale": 0.5, "x": 1}, "'logit_scale', 'x' have no place in the config", False),
        ({"rope.scaling.type": "linear"}, "'linear' in the file", False),
        ({"context_length": None}, "context_length is not in the file", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_advice_that_can_help(facts: dict[str, Any], words: str, helps: bool, tmp_path: Path) -> None:
    """Metadata that transformers' reader ignores are ignored in a fresh process too."""
    with pytest.raises(CheckpointError) as error:
        plain_model(write(tmp_path / "tiny.gguf", tensors_of(llama()), facts))
    said = str(error.value)
    assert words in said and "safetensors" in said and ("download the file again" in said) is helps, said


def test_what_a_file_need_not_say(tmp_path: Path) -> None:
    """The defaults of llama.cpp, which must equal those of transformers."""
    facts = {"rope.freq_base": None, "rope.dimension_count": None, "attention.head_count_kv": 2, "vocab_size": None}
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    found = plain_model(write(tmp_path / "tiny.gguf", tensors_of(model), facts))
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    same_weights(found, model)


def test_tensors_without_a_place_and_places_without_a_tensor(tmp_path: Path) -> None:
    tensors, ones = tensors_of(llama()), np.ones(8, dtype=np.float32)
    for extra in ("blk.0.attn_q.bias", "blk.7.attn_norm.weight", "rope_freqs.weight"):
        with pytest.raises(CheckpointError, match=rf"would drop '{extra}'.*safetensors") as error:
            plain_model(write(tmp_path / "more.gguf", tensors | {extra: ones}))
        assert "download" not in str(error.value)
    for lost in ("blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"):
        left = {name: array for name, array in tensors.items() if name != lost}
        with pytest.raises(CheckpointError, match=f"lacks '{lost}'.*download the file again"):
            plain_model(write(tmp_path / "less.gguf", left))
    with pytest.raises(CheckpointError, match=r"'output_norm.weight' has shape \(8,\), by the config \(32,\)"):
        plain_model(write(tmp_path / "other.gguf", tensors | {"output_norm.weight": ones}))


def test_one_part_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one of 3 parts .*--merge"):
        plain_model(write(tmp_path / "part.gguf", tensors_of(llama()), {"split.count": 3}))


def test_memory_that_runs_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf, dequantised .* does not fit into memory"):
        load(file)


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'clip'"):
        plain_model(write(tmp_path / "clip.gguf", {}, architecture="clip"))
    with pytest.raises(CheckpointError, match="holds a Gemma2ForCausalLM, which has no rules"):
        plain_model(write(tmp_path / "gemma.gguf", {}, architecture="gemma2"))


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    whole, broken = file.read_bytes(), tmp_path / "broken.gguf"
    header = read_header(file)
    assert header.architecture == "llama" and header.facts["llama.context_length"] == CONTEXT
    assert header.tensors["blk.0.attn_k.weight"].shape == (8 * KV_HEADS, 32) and len(header.tensors) == len(NAMES)
    for raw, word in (
        (whole[:-100], "cut short: 'output"),
        (b"GGML" + whole[4:], "does not begin with 'GGUF'"),
        (whole[:4] + b"\x01\0\0\0" + whole[8:], "version 1"),
        (whole[:4] + b"\0\0\0\x03" + whole[8:], "big-endian"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "cut short or damaged"),
        (whole[:20], "cut short or damaged"),
        (b"", "no GGUF file"),
    ):
        broken.write_bytes(raw)
        with pytest.raises(CheckpointError, match=word):
            plain_model(broken)
    generator = np.random.default_rng(0)
    for end in generator.integers(4, header.begin, size=60):  # a header that is cut off at any byte
        broken.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            plain_model(broken)
