"""A transformers folder contains what its config describes, or it is refused, by every reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis_cases import invoke
from decoder_cases import MODELS, exact_norms, ids_of, model_of
from scalpel.analysis.source import load
from scalpel.jacobians.stream import stream_layers
from scalpel.models.decoders import families, llama
from scalpel.models.decoders.folder import decoder_in
from scalpel.models.decoders.strict import check_loaded
from scalpel.models.weight_files import CheckpointError
from strict_cases import AT, Weights, beside, put, refused, saved, without

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "change,words",
    [
        (without(f"{AT}mlp.up_proj"), ["lacks", f"'{AT}mlp.up_proj.weight'", "same model", "complete"]),
        (without(AT), ["lacks", f"'{AT}self_attn.q_proj.weight'", "and 4 more"]),
        (without("model.norm"), ["lacks", "'model.norm.weight'"]),
        (beside("model.layers.7.mlp.up_proj.weight", 10, 12), ["holds 'model.layers.7.", "3 layers"]),
        (beside(f"{AT}self_attn.o_proj.bias", 12), [f"'{AT}self_attn.o_proj.bias'", "attention_bias"]),
        (beside(f"{AT}mlp.down_proj.bias", 12), [f"'{AT}mlp.down_proj.bias'", "mlp_bias"]),
        (beside(f"{AT}self_attn.q_norm.weight", 4), [f"'{AT}self_attn.q_norm.weight'", "Qwen3"]),
        (beside("score.weight", 2, 12), ["'score.weight'"]),
        (lambda w: w | {f"{AT}mlp.up_proj.weight": torch.ones(9, 12)}, ["up_proj.weight", "(9, 12)", "(10, 12)"]),
        (lambda w: w | {"lm_head.weight": torch.ones(19, 12)}, ["'lm_head.weight'", "'model.embed_tokens.weight'"]),
        (
            lambda w: w | {"layers.1.mlp.up_proj.weight": w[f"{AT}mlp.up_proj.weight"]},
            [f"'{AT}mlp.up_proj.w", "'layers.1.mlp.up_proj.weight'"],
        ),
        (
            lambda w: w | {f"{AT}mlp.up_proj.weight": torch.ones(10, 12, dtype=torch.int8)},
            ["up_proj.weight", "I8", "F32"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_config_does_not_describe(
    change: Callable[[Weights], Weights], words: list[str], tmp_path: Path
) -> None:
    put(change(saved(tmp_path)), tmp_path)
    said = refused(tmp_path)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    """One tensor is missing, one is additional, and one has another shape."""
    weights = saved(tmp_path, name)
    for key in (next(reversed(weights)), next(key for key in weights if ".1." in key and "bias" not in key)):
        put({each: tensor for each, tensor in weights.items() if each != key}, tmp_path)
        assert f"lacks '{key}'" in refused(tmp_path)
        put(weights | {key: torch.ones(3, 2)}, tmp_path)
        assert f"'{key}' has shape (3, 2)" in refused(tmp_path)
    for end in ("bias", "q_norm.weight", "gate.weight"):
        stem = "gpt_neox.layers.1.attention" if "neox" in name else "model.layers.1.self_attn"
        extra = f"{'transformer.h.1.attn.c_proj' if 'gpt2' in name else stem}.{end}"
        if extra in weights or extra == "gpt_neox.layers.1.attention.bias":  # this is the causal mask
            extra = f"{extra.removesuffix(end)}more.{end}"
        put(weights | {extra: torch.ones(2)}, tmp_path)
        assert f"holds '{extra}'" in refused(tmp_path)


def test_one_of_a_kind_is_said_as_one(tmp_path: Path) -> None:
    """One layer, and one tensor beyond the listed ones."""
    weights = saved(tmp_path, num_hidden_layers=1)
    assert "By the config it has 1 layer, numbered 0" in refused(tmp_path)
    saved(tmp_path)
    four = [f"{AT}mlp.{each}_proj.weight" for each in ("up", "down", "gate")] + [f"{AT}self_attn.q_proj.weight"]
    put(weights | {name: torch.ones(3, 2) for name in four}, tmp_path)
    assert "1 more has another shape" in refused(tmp_path)


def test_no_model_is_said_in_whole_sentences(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\. A model of another kind") as error:
        load(tmp_path)
    assert ".." not in str(error.value)


def test_the_command_refuses(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "model"
    put(without("lm_head")(saved(folder, "qwen3")), folder)
    for options in ([], ["--stream"]):
        done = invoke(folder, "--text", text, "--out", tmp_path / "out", *options)
        assert done.exit_code == 2 and done.stdout == ""
        message = " ".join(done.stderr.split())
        assert "'lm_head.weight'" in message and "tie_word_embeddings" in message and "Traceback" not in message
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_the_same_hash_in_each_run(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    model = model_of("qwen3")
    for found in (load(tmp_path), load(tmp_path)):
        assert found.facts["weights_sha256"] == load(tmp_path).facts["weights_sha256"]
        assert found.trained is not None
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.trained.state_dict()[name], tensor), name


# ---- pickles and shards --------------------------------------------------------------------------


def pickled(weights: Weights, folder: Path) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")


def test_pickles_are_as_strict(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    before = load(tmp_path).facts
    pickled(weights, tmp_path)
    assert load(tmp_path).facts == before
    for change, word in (
        (without(f"{AT}mlp.up_proj"), f"lacks '{AT}mlp.up_proj.weight'"),
        (beside(f"{AT}self_attn.o_proj.bias", 12), f"holds '{AT}self_attn.o_proj.bias'"),
        (lambda w: w | {f"{AT}mlp.up_proj.weight": torch.ones(10, 12, dtype=torch.int8)}, "torch.int8"),
    ):
        pickled(change(weights), tmp_path)
        with pytest.raises(CheckpointError, match=word):
            load(tmp_path)
    pickled(weights, tmp_path)
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    at = raw.index(weights["model.norm.weight"].numpy().tobytes())
    (tmp_path / "pytorch_model.bin").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: one of model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_are_not_streamed(name: str, tmp_path: Path) -> None:
    pickled(saved(tmp_path), tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, stream=True)
    said = str(error.value)
    assert f"{tmp_path} holds {name}, which" in said and "save_pretrained" in said and "is not there" not in said


def test_a_link_to_weights_that_leads_nowhere(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gone")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "removed")
    said = refused(tmp_path)
    assert str(tmp_path / "model.safetensors") in said and str(tmp_path / "removed") in said


def test_a_shard_that_is_not_complete(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    first, second = (load_file(path) for path in shards[:2])
    lost = next(iter(second))
    save_file({name: tensor for name, tensor in second.items() if name != lost} | {"x": torch.ones(1)}, shards[1])
    said = refused(tmp_path)
    assert f"lacks '{lost}'" in said and "holds 'x'" in said
    save_file(second | {next(iter(first)): next(iter(first.values()))}, shards[1])
    assert f"{next(iter(first))!r}" in refused(tmp_path)


# ---- what may lie beside the weights --------------------------------------------------------------


def old_gpt2(weights: Weights) -> Weights:
    """Tensors named as in the public checkpoints: no prefix, and causal masks beside the weights."""
    mask = torch.randn(1, 1, 16, 16)
    masks = {f"h.{i}.attn.{name}": mask for i in range(3) for name in ("bias", "masked_bias")}
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()} | masks


def old_neox(weights: Weights) -> Weights:
    at = [f"gpt_neox.layers.{i}.attention" for i in range(3)]
    masks = {f"{each}.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool) for each in at}
    masks |= {f"{each}.masked_bias": torch.tensor(-1e9) for each in at}
    assert "embed_out.weight" in weights
    return weights | masks | {f"{each}.rotary_emb.inv_freq": torch.ones(2) for each in at}


def old_llama(weights: Weights) -> Weights:
    return weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}


def head_twice(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def head_alone(weights: Weights) -> Weights:
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in weights.items()}


def renamed_neox(weights: Weights) -> Weights:
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "name,change",
    [
        ("gpt2", old_gpt2),
        ("gpt2, unusual", old_gpt2),
        ("gpt_neox", old_neox),
        ("gpt_neox, in series", old_neox),
        ("gpt_neox", renamed_neox),
        ("llama", old_llama),
        ("llama, scaled rope", old_llama),
        ("llama", head_twice),
        ("llama", head_alone),
        ("qwen3", old_llama),
    ],
)
def test_harmless_left_overs(name: str, change: Callable[[Weights], Weights], tmp_path: Path) -> None:
    """Both readers return the saved model, even though its file has more tensors or other names."""
    put(change(saved(tmp_path, name)), tmp_path)
    model = model_of(name)
    found, streamed = load(tmp_path), load(tmp_path, stream=True)
    assert found.trained is not None
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.trained.state_dict()[key], tensor), key
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found.facts["parameters"] == streamed.facts["parameters"] == count
    _, head = decoder_in(tmp_path).final()
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    same_layers(model, tmp_path)


def same_layers(model: Any, folder: Path) -> None:
    """The values of the stream equal the hidden states of the class."""
    with exact_norms(), torch.no_grad():
        states = model(ids_of(), output_hidden_states=True).hidden_states
    layers = list(stream_layers(folder, ids_of()))
    assert len(layers) == 3
    for layer, state in zip(layers, states, strict=False):
        torch.testing.assert_close(layer.before, state, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_follows_the_config_and_not_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the extra tensors were accepted, those without a place in the class would still not be applied."""
    weights, extra = saved(tmp_path, name), r".*(o_proj|down_proj|dense|query_key_value|proj)\.bias|.*[qk]_norm\.weight"
    heads = {"gpt2": "transformer.h.{}.", "gpt_neox": "gpt_neox.layers.{}."}
    at = heads.get(name.partition(",")[0], "model.layers.{}.").format(1)
    attention = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(name.partition(",")[0], "self_attn.o_proj")
    added = {f"{at}{attention}.bias": 16 if "neox" in name else 12}
    if attention == "self_attn.o_proj":
        added |= {f"{at}mlp.down_proj.bias": 12, f"{at}self_attn.q_norm.weight": 4, f"{at}self_attn.q_proj.bias": 16}
    more = {key: torch.ones(size, dtype=torch.float64) for key, size in added.items()}
    put(more | weights, tmp_path)
    for family in families.FAMILIES:
        monkeypatch.setattr(family, "PASSED_OVER", dict.fromkeys([*family.PASSED_OVER, extra], ""))
    same_layers(model_of(name), tmp_path)


def test_what_no_rule_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of transformers may give a class more modules than the rules know."""
    saved(tmp_path, "qwen3")
    monkeypatch.setattr(llama, "final", lambda get: (get("model.norm.weight"), None))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight', which no rule reads"):
        decoder_in(tmp_path)


# ---- configs that say two things ------------------------------------------------------------------


@pytest.mark.parametrize(
    "config,words",
    [
        ({"model_type": "mistral"}, ["LlamaForCausalLM", "'mistral'", "MistralForCausalLM"]),
        ({"num_hidden_layers": 2}, ["holds 'model.layers.2.", "2 layers"]),
        ({"attention_bias": True}, ["lacks", "q_proj.bias"]),
        ({"vocab_size": 25}, ["(19, 12)", "(25, 12)"]),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"transformers_weights": "other.safetensors"}, ["save_pretrained"]),
    ],
    ids=str,
)
def test_a_config_of_another_model(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    saved(tmp_path, **config)
    said = refused(tmp_path)
    assert all(word in said for word in words), said


def test_an_adapter_is_not_left_out(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    assert "merge" in refused(tmp_path)


def test_weights_are_not_rounded_to_the_configs_dtype(tmp_path: Path) -> None:
    model_of("llama").float().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    found, right = load(tmp_path), load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert found.trained is not None and found.facts["dtype"] == "float32"
    assert torch.equal(found.trained.state_dict()["model.layers.1.mlp.up_proj.weight"], right)


def test_a_foreign_default_device(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3")
    torch.set_default_device("meta")
    try:
        found = load(tmp_path)
        assert found.untrained is not None
        fresh = found.untrained(3)
    finally:
        torch.set_default_device(None)
    assert found.facts["weights_sha256"] == load(tmp_path).facts["weights_sha256"]
    assert {parameter.device.type for parameter in fresh.parameters()} == {"cpu"}


def test_what_transformers_reports() -> None:
    """The second safeguard, which is the only one for quantised folders."""
    nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    check_loaded(nothing, "LlamaForCausalLM", "here")
    check_loaded(nothing | {"unexpected_keys": {"transformer.h.0.attn.masked_bias"}}, "GPT2LMHeadModel", "here")
    for kind, keys in (
        ("missing_keys", {"a.weight"}),
        ("unexpected_keys", {"a.weight"}),
        ("mismatched_keys", {("a.weight", (1,), (2,))}),
        ("error_msgs", ["a.weight"]),
    ):
        with pytest.raises(CheckpointError, match=r"a\.weight"):
            check_loaded(nothing | {kind: keys}, "LlamaForCausalLM", "here")
