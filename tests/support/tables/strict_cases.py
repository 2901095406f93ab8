"""Folders of transformers models, unchanged and modified, for the tests of strict reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis_cases import letters
from decoder_cases import model_of
from scalpel.analysis.source import load
from scalpel.models.weight_files import CheckpointError

Weights = dict[str, Tensor]


def saved(folder: Path, name: str = "llama", **config: Any) -> Weights:
    model_of(name).save_pretrained(folder)
    letters(13).save(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    return load_file(folder / "model.safetensors")


def put(weights: Weights, folder: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def refused(folder: Path) -> str:
    """Return what both readers report, and check that they agree."""
    messages = []
    for stream in (False, True):
        with pytest.raises(CheckpointError) as error:
            load(folder, stream=stream)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    return messages[0]


def without(*ends: str) -> Callable[[Weights], Weights]:
    def changed(weights: Weights) -> Weights:
        left = {name: tensor for name, tensor in weights.items() if not any(end in name for end in ends)}
        assert len(left) < len(weights)
        return left

    return changed


def beside(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(shape, dtype=torch.float64)}


AT = "model.layers.1."
