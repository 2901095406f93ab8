"""The matrices of a Jacobian lens by torch.autograd.functional.jacobian over the whole of two values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _target_of(model: nn.Module, given: Mapping[str, Any], block: nn.Module, end: nn.Module, delta: Tensor) -> Tensor:
    """The output of ``end`` when ``delta`` is added to the output of ``block``."""
    seen: dict[str, Tensor] = {}

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        moved = _first(output) + delta
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["end"] = _first(output)

    handles = [block.register_forward_hook(add), end.register_forward_hook(keep)]
    try:
        model(**given)
    finally:
        for handle in handles:
            handle.remove()
    return seen["end"]


def block_jacobian(model: nn.Module, given: Mapping[str, Any], block: nn.Module, end: nn.Module, width: int) -> Tensor:
    """The derivative (L, width, L, width) of the output of ``end`` by that of ``block``, for a batch of one text."""
    zero = torch.zeros(1, given["input_ids"].shape[1], width, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(
        lambda delta: _target_of(model, given, block, end, delta), zero, vectorize=True
    )
    return full[0, :, :, 0]


def lens_matrix(full: Tensor, tokens: range, targets: str) -> Tensor:
    """The sum over pairs of ``tokens``, source t and target t' >= t ("after") or t' = t ("same"), by their number."""
    total = torch.zeros_like(full[0, :, 0])
    for t in tokens:
        for later in tokens:
            if later == t or (targets == "after" and later > t):
                total += full[later, :, t]
    return total / len(tokens)


def blocks_of(model: Any) -> Any:
    """The layers of a model of the table of decoders."""
    if hasattr(model, "transformer"):
        return model.transformer.h
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
