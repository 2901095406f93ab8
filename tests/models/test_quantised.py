"""Folders with quantised weights are dequantised completely or refused, and never read as if they were plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalpel.analysis.source import load
from scalpel.models.decoders.folder import decoder_in
from scalpel.models.weight_files import CheckpointError
from strict_cases import AT, Weights, put, refused, saved

pytest.importorskip("transformers")


ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.mark.parametrize(
    "quantised,method",
    [
        (ONLINE, "'bitnet'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "unheard-of"}, "'unheard-of'"),
        ({"bits": 4}, "without a 'quant_method'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_quantised_folder_is_not_streamed_as_if_it_were_plain(
    quantised: dict[str, Any], method: str, tmp_path: Path
) -> None:
    saved(tmp_path, quantization_config=quantised)
    for call in (decoder_in, lambda folder: load(folder, stream=True)):
        with pytest.raises(CheckpointError) as error:
            call(tmp_path)
        said = str(error.value)
        assert all(word in said for word in ("quantization_config", method, str(tmp_path), "save_pretrained")), said


def test_a_null_quantisation_is_none(tmp_path: Path) -> None:
    saved(tmp_path, quantization_config=None)
    assert load(tmp_path).facts["parameters"] == load(tmp_path, stream=True).facts["parameters"]


@pytest.mark.parametrize("quantised", [ONLINE, {"quant_method": "unheard-of"}], ids=["bitnet", "unheard-of"])
def test_a_model_that_stays_quantised_is_refused_in_memory(quantised: dict[str, Any], tmp_path: Path) -> None:
    """Weights that are quantised at run time cannot be recognised by class, names or dtypes, all of which are
    ordinary.
    """
    pytest.importorskip("accelerate")
    saved(tmp_path, quantization_config=quantised)
    said = refused(tmp_path)
    assert repr(quantised["quant_method"]) in said and "dequantize()" in said and "LlamaForCausalLM" in said


@pytest.fixture
def eighths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """A folder of float8 weights and scales, which transformers dequantises where there is no GPU."""
    pytest.importorskip("accelerate")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    weights: Weights = {}
    for name, tensor in saved(tmp_path, quantization_config=quantised).items():
        weights[name] = tensor.float()
        if "_proj" in name:
            weights[name] = tensor.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)
    put(weights, tmp_path)
    return weights


def test_a_folder_that_is_dequantised_whole(eighths: Weights, tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.trained is not None
    name = f"{AT}mlp.up_proj.weight"
    assert torch.equal(found.trained.state_dict()[name], 2 * eighths[name].double())


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda w: {name: each for name, each in w.items() if f"{AT}mlp.up" not in name}, ["lacks", f"{AT}mlp.up"]),
        (lambda w: w | {"score.weight": torch.ones(2, 12)}, ["no place for", "'score.weight'"]),
    ],
    ids=["missing", "extra"],
)
def test_a_quantised_folder_that_is_not_whole(
    change: Callable[[Weights], Weights], words: list[str], eighths: Weights, tmp_path: Path
) -> None:
    """Its tensor names belong to the quantisation, so only transformers' loading report can reveal it."""
    put(change(eighths), tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert all(word in str(error.value) for word in words), error.value
