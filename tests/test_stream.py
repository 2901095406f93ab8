"""A decoder in a folder, a layer at a time, against the same model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoder_cases import MODELS, ids_of, model_of
from scalpel import jacobian
from scalpel.jacobians.stream import stream_layers
from scalpel.models.folder import decoder_in, streamed_layers
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
    held = [(layer.down.weight.data_ptr(), layer.down.weight.clone()) for _, layer in streamed_layers(decoder)]
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
    with pytest.raises(ValueError, match="ids below 19 and at most 32 tokens a row"):
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
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.layers.3"):
        next(stream_layers(folder, ids_of()))
