"""Which layers a lens finds in a model, by number, with and without a family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from circuitgpt_cases import build
from decoder_cases import ids_of, model_of
from scalpel.jacobian_lens.sweeps.autograd_sweep import AutogradSweep
from scalpel.jacobian_lens.sweeps.hooks import all_layers, blocks_in, ends_of, layers_of
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices


def blocks(count: int, kind: Any = nn.Linear) -> nn.ModuleList:
    return nn.ModuleList([kind(2, 2) for _ in range(count)])


class Mixture(nn.Module):
    """Blocks that each hold more experts than there are blocks."""

    def __init__(self, *_: int) -> None:
        super().__init__()
        self.experts = blocks(5)


def test_blocks_of_a_model_of_no_family() -> None:
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.layers = blocks(3, Mixture)
    model.heads = blocks(2)
    assert blocks_in(model) == [f"encoder.layers.{i}" for i in range(3)]
    assert layers_of(model) == 3
    assert all_layers(model) == [0, 1]
    assert all_layers(model, 1) == all_layers(model, "encoder.layers.1") == [0]
    assert ends_of(model, [1, 0], None) == ({0: "encoder.layers.0", 1: "encoder.layers.1"}, "encoder.layers.2")
    assert all_layers(nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])) == [0, 1]
    with pytest.raises(ValueError, match="the target is 'heads.0', so it can't be told which layers come before"):
        all_layers(model, "heads.0")
    with pytest.raises(ValueError, match="there is no layer 3; this Module has layers 0 to 2"):
        ends_of(model, [0], 3)


def test_blocks_that_cant_be_told() -> None:
    model = nn.Module()
    with pytest.raises(ValueError, match=r"this Module belongs to no family .* no nn.ModuleList of two blocks or more"):
        all_layers(model)
    model.encoder, model.decoder = blocks(3), blocks(3)
    with pytest.raises(ValueError, match="'encoder' and 'decoder' both hold 3 modules"):
        all_layers(model)
    model.decoder = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()])
    with pytest.raises(
        ValueError, match="the modules of 'decoder' in this Module are of several classes, Linear and ReLU"
    ):
        ends_of(model, [0], None)


def test_layers_of_a_family() -> None:
    for model in (model_of("gpt2"), model_of("llama").model):
        assert all_layers(model) == [0, 1]
        assert all_layers(model, 1) == [0]
        with pytest.raises(ValueError, match="there is no layer 3"):
            all_layers(model, 3)
        with pytest.raises(ValueError, match="the target is layer 0 of this .* so there is no lens"):
            all_layers(model, 0)
    assert all_layers(build("plain")) == [0]
    with pytest.raises(ValueError, match="has no layers"):
        all_layers(build("no_layer"))


def test_circuitgpt_as_transformers_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses the rules of the CircuitGPT inside, under the names of either."""
    pytest.importorskip("transformers")
    from scalpel.models.transformers_classes.configuration import CircuitGPTHubConfig
    from scalpel.models.transformers_classes.modeling import CircuitGPTForCausalLM

    def refuse(*_: Any) -> None:
        raise AssertionError("autograd ran")

    monkeypatch.setattr(AutogradSweep, "__init__", refuse)
    core = build("like_csp_yolo2")
    model = CircuitGPTForCausalLM(CircuitGPTHubConfig(**core.config.to_public_dict())).double().eval()
    model.circuitgpt.load_state_dict(core.state_dict())
    ids = ids_of(1, 7) % 13
    right = lens_matrices(core, ids, layers=[0], skip_first=1)[0]
    assert all_layers(model) == [0]
    assert torch.equal(lens_matrices(model, ids, layers=[0], skip_first=1)[0], right)
    paths = ["circuit_model.transformer.h.0", "circuit_model.transformer.h.1"]
    named = lens_matrices(model, ids, layers=paths[:1], target=paths[1], skip_first=1)
    assert torch.equal(named[paths[0]], right)
    relevance = lens_matrices(model, ids, layers=[0], skip_first=1, estimator="relevance")[0]
    assert torch.equal(relevance, lens_matrices(core, ids, layers=[0], skip_first=1, estimator="relevance")[0])
