"""Slow, obvious twins of the rules in `scalpel.lanes`: dense arrays, one tangent at a time, through autograd.

A tangent is (N, channels), and zero in the channels that an index does not list; a list of sixteen tangents stands for
the lanes. Everything is computed in the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["attend", "jvp", "lanes_of", "linear", "norm", "tangents_of", "vjp"]


def tangents_of(values: Tensor, index: Tensor | None, channels: int) -> list[Tensor]:
    """Read tangents (N, channels) from lanes (N, entries, T), at ``index`` (N, entries) or at all channels."""
    tangents = []
    for t in range(values.shape[2]):
        tangent = values.new_zeros(values.shape[0], channels)
        for n in range(values.shape[0]):
            for e in range(values.shape[1]):
                tangent[n, e if index is None else int(index[n, e])] = values[n, e, t]
        tangents.append(tangent)
    return tangents


def lanes_of(tangents: list[Tensor], index: Tensor | None) -> Tensor:
    """Arrange tangents (N, channels) as lanes (N, entries, T), at ``index`` or at all channels."""
    together = torch.stack(tangents, dim=-1)
    if index is None:
        return together
    lanes = together.new_zeros(*index.shape, len(tangents))
    for n, chosen in enumerate(index):
        lanes[n] = together[n, chosen]
    return lanes


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the map x (N, cols) → (N, rows); a bias has no tangent and is left out."""
    return lambda x: x @ weight.T


def norm(gain: Tensor, eps: float, centered: bool) -> Callable[[Tensor], Tensor]:
    """Return RMSNorm, or LayerNorm if centered, over the last dimension, without a bias."""

    def apply(x: Tensor) -> Tensor:
        moved = x - x.mean(-1, keepdim=True) if centered else x
        return gain * moved / (moved.square().mean(-1, keepdim=True) + eps).sqrt()

    return apply


def attend(
    heads: int, kv_heads: int, allowed: Tensor, sink: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention on q (B, L, heads * d), k and v (B, L, kv_heads * d), with allowed (1 or B, L, L)."""

    def apply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = q.shape[-1] // heads
        outputs = []
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            shared = h * kv_heads // heads
            theirs = slice(shared * d, (shared + 1) * d)
            scores = scale * q[..., mine] @ k[..., theirs].transpose(-1, -2)
            scores = scores.masked_fill(~allowed, -torch.inf)
            if sink is not None:
                scores = torch.cat([sink[h].expand(*scores.shape[:-1], 1), scores], dim=-1)
            weights = scores.softmax(-1)
            outputs.append((weights if sink is None else weights[..., 1:]) @ v[..., theirs])
        return torch.cat(outputs, dim=-1)

    return apply


def jvp(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Differentiate ``function`` at ``primals`` along ``tangents``, as the derivative of a vjp.

    This double backward trick shares nothing with forward-mode rules.
    """
    inputs = [primal.detach().requires_grad_() for primal in primals]
    output = function(*inputs)
    dummy = torch.zeros_like(output, requires_grad=True)
    back = torch.autograd.grad(output, inputs, dummy, create_graph=True)
    total = torch.stack([(g * t).sum() for g, t in zip(back, tangents, strict=True)]).sum()
    (tangent,) = torch.autograd.grad(total, dummy)
    return tangent


def vjp(function: Callable[..., Tensor], primals: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Compute the cotangents of ``primals``."""
    inputs = [primal.detach().requires_grad_() for primal in primals]
    return torch.autograd.grad(function(*inputs), inputs, cotangent)
