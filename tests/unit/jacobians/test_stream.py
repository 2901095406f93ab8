"""A decoder read from a folder one layer at a time, compared with the same model in memory."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from decoder_cases import MODELS, ids_of, model_of
from scalpel import jacobian
from scalpel.jacobians.stream import stream_layers
from scalpel.models.decoders.folder import FolderWeights, decoder_in, streamed_layers
from scalpel.models.weight_files import CheckpointError

pytest.importorskip("transformers")
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def saved(model: Any, folder: Path, shard: str = "4KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_in_memory(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    folder = saved(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 0] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": places}
    whole = jacobian(model, ids_of(), "0.resid_in", "final_resid", **inputs)
    V = torch.randn(3, *whole.source_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, pulled = V.clone(), []
    for layer in stream_layers(folder, ids_of(), **inputs):
        end = f"{layer.number + 1}.resid_in" if layer.number < 2 else "final_resid"
        one = jacobian(model, ids_of(), f"{layer.number}.resid_in", end, **inputs)
        torch.testing.assert_close(layer.after, one.primal, **EXACT)
        pulled.append((layer.vjp(U), one.vjp(U)))
        V = layer.jvp(V)
    torch.testing.assert_close(V, whole.jvp(U), **EXACT)
    assert len(pulled) == 3
    for found, right in pulled:
        torch.testing.assert_close(found, right, **EXACT)


def test_two_layers_of_memory_serve_all(tmp_path: Path) -> None:
    decoder = decoder_in(saved(model_of("llama"), tmp_path))
    held = [(layer.down.weight.data_ptr() >> 16, layer.down.weight.clone()) for _, layer in streamed_layers(decoder)]
    assert held[0][0] == held[2][0] != held[1][0]
    for i, (_, weight) in enumerate(held):
        assert torch.equal(weight, decoder.layer(i).down.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("qwen3").to(dtype)
    saved(model, tmp_path)
    V = torch.randn(2, 2, 6, 12, generator=torch.Generator().manual_seed(0))
    right = jacobian(model.double(), ids_of()).jvp(V.double())
    for layer in stream_layers(tmp_path, ids_of()):
        assert layer.after.dtype == torch.float32
        V = layer.jvp(V)
    allowed = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert float((V.double() - right).norm() / right.norm()) < allowed


def test_a_layer_that_has_left_refuses(tmp_path: Path) -> None:
    layers = stream_layers(saved(model_of("gpt2"), tmp_path), ids_of())
    first = next(layers)
    V = torch.zeros(1, *first.before.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tangents have shape \(2, 6, 12\); they must be \(T, 2, 6, 12\)"):
        first.jvp(V[0])
    with pytest.raises(TypeError, match="tangents are torch.float32; here they must be torch.float64"):
        first.vjp(V.float())
    next(layers)
    with pytest.raises(RuntimeError, match="layer 0 has left memory"):
        first.jvp(V)


def test_what_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        stream_layers(tmp_path, ids_of())
    folder = saved(model_of("llama"), tmp_path)
    with pytest.raises(ValueError, match="input_ids holds .*0 to 18"):
        stream_layers(folder, ids_of() + 18)
    shard = next(tmp_path.glob("model-00002*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"is cut short: 'model.* ends at byte"):
        stream_layers(folder, ids_of())
    shard.write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        stream_layers(folder, ids_of())
    shard.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        stream_layers(folder, ids_of())
    shard.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(CheckpointError, match="holds a BertModel, which has no rules; those that have: 'GPT2LM"):
        stream_layers(folder, ids_of())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.3"):
        next(stream_layers(folder, ids_of()))


def test_whole_files_and_what_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When transformers saves one file over shards it leaves the index behind, and then reads the single file."""
    old, model = model_of("llama", seed=1), model_of("llama")
    saved(old, tmp_path)
    saved(model, tmp_path, "1GB")
    monkeypatch.setattr("scalpel.models.decoders.folder._PIECE", 100)  # one tensor is read in many pieces
    V = torch.randn(2, 2, 6, 12, dtype=torch.float64)
    expected = jacobian(model, ids_of()).jvp(V)
    for layer in stream_layers(tmp_path, ids_of()):
        V = layer.jvp(V)
    torch.testing.assert_close(V, expected, **EXACT)


def test_reads_past_the_cache_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_in(saved(model_of("llama"), tmp_path))
    assert isinstance(decoder.weights, FolderWeights) and not decoder.weights.past_cache
    monkeypatch.setattr("scalpel.models.decoders.folder._memory_size", lambda: 1)
    direct = decoder_in(tmp_path)
    assert isinstance(direct.weights, FolderWeights) and direct.weights.past_cache
    for (_, a), (_, b) in zip(streamed_layers(decoder), streamed_layers(direct), strict=True):
        for one, other in ((a.norm1.gain, b.norm1.gain), (a.qkv[1].weight, b.qkv[1].weight), (a.down, b.down)):
            one, other = (each.weight if hasattr(each, "weight") else each for each in (one, other))
            assert torch.equal(one, other)


def test_the_next_layer_is_read_meanwhile(tmp_path: Path) -> None:
    decoder = decoder_in(saved(model_of("llama"), tmp_path))

    def reading() -> int:
        return sum("read-ahead" in thread.name for thread in threading.enumerate())

    before = reading()
    layers = streamed_layers(decoder)
    next(layers)
    assert reading() == before + 1
    layers.close()
    assert reading() == before


def test_tangents_of_any_kind(tmp_path: Path) -> None:
    folder = saved(model_of("qwen3"), tmp_path)
    with torch.inference_mode():
        for layer in stream_layers(folder, ids_of()):
            V = torch.randn(12, 6, 2, 3, dtype=torch.float64).permute(3, 2, 1, 0)
            kept = V.clone()
            right = layer.jvp(V.contiguous())
            torch.testing.assert_close(layer.jvp(V), right)
            assert torch.equal(V, kept)
            assert layer.jvp(V[:0]).shape == layer.vjp(V[:0]).shape == (0, 2, 6, 12)
            with ThreadPoolExecutor(4) as pool:
                for each in pool.map(layer.jvp, [V.contiguous()] * 8):
                    torch.testing.assert_close(each, right, **EXACT)
            layer.after.zero_()  # the user has its own copy
            with pytest.raises(TypeError, match="tangents are list"):
                layer.jvp([1.0])  # type: ignore[arg-type]
    assert bool(right.any())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [1, 2],
        7,
    ],
    ids=str,
)
def test_crafted_headers(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"model.norm.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FolderWeights(tmp_path)


def test_an_index_may_not_point_outside(tmp_path: Path) -> None:
    folder = saved(model_of("gpt2"), tmp_path / "inside")
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    name = next(iter(where["weight_map"].values()))
    (folder / name).rename(tmp_path / name)
    for outside in (f"../{name}", str(tmp_path / name)):
        moved = {key: outside if value == name else value for key, value in where["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(CheckpointError, match="is not there"):
            decoder_in(folder)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"vocab_size": 25}, r"embed_tokens.weight' has shape \(19, 12\), by the config \(25, 12\)"),
        ({"hidden_size": 24}, "q_proj.weight' has shape .* 26 more have other shapes"),
        ({"is_causal": False}, "is_causal=False"),
        ({"hidden_act": "prelu"}, "activation 'prelu' is not one of"),
        ({"architectures": None}, "no list of 'architectures'"),
    ],
    ids=str,
)
def test_a_config_of_another_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(model_of("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    ids = torch.full((1, 4), 22 if "vocab_size" in changes else 3)
    with pytest.raises(ValueError, match=message):
        list(stream_layers(folder, ids))


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    weights = FolderWeights(saved(model_of("llama"), tmp_path))
    rows = weights.rows("model.embed_tokens.weight", torch.tensor([[18, 3]]))
    assert torch.equal(rows, model_of("llama").model.embed_tokens.weight[[18, 3]][None])
    with pytest.raises(CheckpointError, match=r"has 19 rows, and row 22 is asked for"):
        weights.rows("model.embed_tokens.weight", torch.tensor([22]))
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.3'; it holds 'model.embed_tokens.weight'"):
        weights("model.layers.3")
