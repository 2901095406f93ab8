"""What is computed for a model in every state in which it may be kept, and the gradient that plain autograd gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import scalpel

GRADIENT = "1.resid_in.grad"


def gradient_of(model: Any, ids: Tensor, layer: int) -> Tensor:
    """The gradient ∂loss/∂(input of a layer), one row per token, by plain autograd without the library."""
    held: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        held.append(arguments[0].detach().requires_grad_())
        return (held[0], *arguments[1:])

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handle = layers[layer].register_forward_pre_hook(keep)
    logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, held[0])[0].flatten(0, 1)


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def collected(model: Any, ids: Tensor, hook: str = GRADIENT, **options: Any) -> Tensor:
    return scalpel.collect(model, [ids], [hook], center=False, progress=False, **options)[hook].covariance()


def products(model: Any, ids: Tensor, *ends: str) -> Tensor:
    J = scalpel.jacobian(model, ids, *ends)
    generator = torch.Generator().manual_seed(0)
    return J.jvp(torch.randn(2, *J.source_shape, generator=generator, dtype=J.dtype))
