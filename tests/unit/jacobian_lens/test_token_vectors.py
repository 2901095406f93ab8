"""The directions of tokens without a matrix are those of a lens that was fitted on the same prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import scalpel
from analysis_cases import letters
from lens_cases import lens_model
from scalpel.jacobian_lens import token_vectors
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

PROMPTS = ["abcdefg", torch.tensor([5, 4, 3, 2, 1, 0]), [7, 8, 1, 2, 3]]
IDS = [[0, 1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 0], [7, 8, 1, 2, 3]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "circuit"])
def test_vectors_are_those_of_the_mean_matrix(kind: str) -> None:
    model = lens_model(kind)
    layers = [0] if kind == "circuit" else [0, 1]
    found = token_vectors(model, ["d", 2], PROMPTS, skip_first=1, max_tokens=6, tokenizer=letters(13))
    gained = token_vectors(model, [3], PROMPTS[1:], layers=0, skip_first=1, norm_gain=True)
    head = dict(model.named_modules())["lm_head"].weight
    norm = model.model.norm if kind == "llama" else model.transformer.ln_f
    matrices = [lens_matrices(model, torch.tensor([ids[:6]]), layers=layers, skip_first=1) for ids in IDS]
    assert list(found) == layers
    for layer in layers:
        mean = torch.stack([each[layer] for each in matrices]).mean(0)
        assert torch.allclose(found[layer], head[[3, 2]] @ mean, atol=1e-9)
    mean = torch.stack([each[0] for each in matrices[1:]]).mean(0)
    assert torch.allclose(gained[0], (norm.weight * head[[3]]) @ mean, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    model: Any = lens_model("gpt2")
    with pytest.raises(ValueError, match="prompts is empty"):
        token_vectors(model, [1], [])
    with pytest.raises(ValueError, match="the prompt has 3 tokens"):
        token_vectors(model, [1], [[1, 2, 3]])
    with pytest.raises(ValueError, match="skip_first is -1"):
        token_vectors(model, [1], [[1, 2, 3]], skip_first=-1)
    with pytest.raises(ValueError, match="the paths of the modules as layers"):
        token_vectors(torch.nn.Linear(3, 3), [1], [[1, 2, 3]])
    assert scalpel.jacobian_lens.token_vectors is token_vectors
