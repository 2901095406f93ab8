"""Rows of a prompt's matrices of a Jacobian lens on SmolLM2-135M, compared with plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalpel.jacobian_lens.sweeps.positions import valid_tokens
from scalpel.jacobian_lens.sweeps.sweep import lens_of_sweep
from scalpel.jacobians.choosing import pass_between
from scalpel.jacobians.sweep import sweep_of
from scalpel.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

TEXT = "The ferry had stopped running in June, so people who wanted to cross walked down to the old mill."
FIRST, DIMENSIONS = 24, 3


def by_autograd(model: Any, ids: Tensor, skip_first: int) -> list[Tensor]:
    """The first rows of the matrices of the layers from ``FIRST`` on, (DIMENSIONS, width) each."""
    kept: list[Tensor] = []

    def keep(module: Any, given: Any, output: Any) -> Tensor:
        kept.append(output if kept else output.detach().requires_grad_())
        return kept[-1]

    handles = [block.register_forward_hook(keep) for block in model.model.layers[FIRST:]]
    try:
        with torch.enable_grad():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    *sources, target = kept
    valid = slice(skip_first, ids.shape[1] - 1)
    rows = [torch.zeros(DIMENSIONS, target.shape[-1]) for _ in sources]
    for dimension in range(DIMENSIONS):
        with torch.enable_grad():
            total = target[0, valid, dimension].sum()
        gradients = torch.autograd.grad(total, sources, retain_graph=True)
        for row, gradient in zip(rows, gradients, strict=True):
            row[dimension] = gradient[0, valid].mean(0)
    return rows


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_rows_are_those_of_autograd(smollm2: Any, smollm2_tokenizer: Tokenizer, precision: str | None) -> None:
    ids, skip_first = torch.tensor([smollm2_tokenizer.encode(TEXT)]), 5
    right = by_autograd(smollm2, ids, skip_first)
    hooks = [*(f"{layer + 1}.resid_in" for layer in range(FIRST, 29)), "final_resid"]
    beside = {"attention_mask": None, "position_ids": None}
    run = pass_between(smollm2, ids, beside, hooks[0], hooks[-1], precision)
    tokens = valid_tokens(ids.shape[1], skip_first)
    signs = torch.ones(1, tokens.stop - tokens.start)
    found = lens_of_sweep(sweep_of(run, hooks, tokens), hooks[:-1], signs, slice(0, DIMENSIONS))
    allowed = 1e-4 if precision is None else 1e-2
    for matrix, rows in zip(found.values(), right, strict=True):
        assert float((matrix[:DIMENSIONS] - rows).norm() / rows.norm()) < allowed
        assert not matrix[DIMENSIONS:].any()
