"""Readouts and interventions of a lens on SmolLM2-135M, compared with the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import scalpel
from scalpel.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

TEXT = "The capital of the country that has Mount Fuji is "


def test_a_readout_and_a_push(smollm2: Any, smollm2_tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    J = {layer: torch.eye(576) + torch.randn(576, 576, generator=generator) / 60 for layer in (3, 20)}
    lens = scalpel.JacobianLens(J, 1).attach(smollm2, smollm2_tokenizer)
    found = lens.readout(TEXT, [3, 20, 29], positions=-1, k=5)
    ids = torch.tensor([smollm2_tokenizer.encode(TEXT.rstrip())])
    with torch.no_grad():
        output = smollm2(ids, output_hidden_states=True)
        for row, layer in enumerate((3, 20)):
            right = smollm2.lm_head(smollm2.model.norm(J[layer] @ output.hidden_states[layer + 1][0, -1]))
            values, tokens = right.topk(5)
            assert torch.equal(found.jacobian.tokens[row, 0], tokens)
            assert torch.allclose(found.jacobian.logits[row, 0], values, atol=1e-3)
    assert found.stripped and int(found.model.tokens[0, 0]) == int(output.logits[0, -1].argmax())
    assert int(found.jacobian.ranks[2, 0, 0]) == 1
    before = [len(module._forward_hooks) for module in smollm2.modules()]  # transformers leaves some of its own
    with lens.steer(" Paris", 0.0, [3, 20]), torch.no_grad():
        assert torch.equal(smollm2(ids).logits, output.logits)
    with lens.steer(" Paris", 1.0, 29):
        assert int(lens.ranks(ids, " Paris", 29, -1)) < int(lens.ranks(ids, " Tokyo", 29, -1))
    assert [len(module._forward_hooks) for module in smollm2.modules()] == before
