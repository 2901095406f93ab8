"""The forward pass of a dense decoder, layer by layer, and the values that the rules of its sublayers need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...hooks.inputs import Inputs
from ...models.decoders.decoder import Decoder, DecoderConfig, DecoderLayer, NormWeight
from .attention import DenseAttention, Mask
from .rules import DenseNorm, rotate, share_of, slope_of


class Text(NamedTuple):
    """The tokens of a pass, their positions, and which of them are padding."""

    ids: Tensor  # (B, L)
    positions: Tensor  # (B or 1, L)
    real: Tensor | None  # (B, L) bool, False at padding; None where there is no mask

    @classmethod
    def of(cls, inputs: Inputs) -> Text:
        """The text of ``inputs``; where they give no positions, tokens are counted from 0."""
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(inputs.ids.shape[1], device=inputs.ids.device)[None]
        return cls(inputs.ids, positions, None if inputs.mask is None else inputs.mask.bool())


class Places(NamedTuple):
    """Which tokens are padding, and the rotation of each token's position: the same for all layers."""

    real: Tensor | None  # (B, L) bool, False at padding; None where there is no padding
    cosine: Tensor | None  # (B or 1, L, 1, pairs); None where positions are not rotated
    sine: Tensor | None  # as cosine

    def rows(self, part: slice) -> Places:
        """The same with the rotation of the tokens ``part`` alone; ``real`` stays that of all tokens."""
        if self.cosine is None or self.sine is None:
            return self
        return Places(self.real, self.cosine[:, part], self.sine[:, part])


class DensePrimal:
    """What the rules of one layer need, at one value of the residual stream.

    Attributes that belong to values after the hook of the target are not set.
    """

    norm1: DenseNorm
    norm2: DenseNorm
    attention: DenseAttention
    q_norm: DenseNorm | None
    k_norm: DenseNorm | None
    slope: Tensor  # (B, L, neurons): of the activation; in a gated MLP times the values that the gate multiplies
    opened: Tensor | None  # (B, L, neurons): the activation of the gate; None where the MLP has no gate


Tap = Callable[[str, Tensor], Tensor]


def places_of(decoder: Decoder, text: Text, dtype: torch.dtype) -> Places:
    """The padding of ``text`` and the tables that rotate its positions, in ``dtype``."""
    rotary = decoder.config.rotary
    cosine, sine = (None, None) if rotary is None else rotary.tables(text.positions, dtype)
    return Places(None if text.real is None or bool(text.real.all()) else text.real, cosine, sine)


def heads_of(config: DecoderConfig, layer: DecoderLayer, parts: list[Tensor]) -> list[Tensor]:
    """Split the products of the matrices for q, k and v, (..., L, out), into heads.

    Returns q (..., L, heads, d), and k and v (..., L, kv_heads, d). A layer has either three matrices or a single one
    that gives q, k and v together.
    """
    if len(parts) == 3:
        return [part.unflatten(-1, (-1, config.head_dim)) for part in parts]
    joined = parts[0]
    if layer.by_head:
        return list(joined.unflatten(-1, (config.heads, 3, config.head_dim)).unbind(-2))
    return [part.unflatten(-1, (config.heads, -1)) for part in joined.chunk(3, dim=-1)]


def parts_of(layer: DecoderLayer, heads: list[Tensor]) -> list[Tensor]:
    """The adjoint of :func:`heads_of`."""
    if len(layer.qkv) == 3:
        return [part.flatten(-2) for part in heads]
    if layer.by_head:
        return [torch.stack(heads, -2).flatten(-3)]
    return [torch.cat([part.flatten(-2) for part in heads], -1)]


def through_layer(
    decoder: Decoder,
    i: int,
    layer: DecoderLayer,
    x: Tensor,
    places: Places,
    tap: Tap,
    primal: DensePrimal,
    relevance: bool = False,
) -> Tensor:
    """Return the residual stream (B, L, width) after layer ``i``, and fill in ``primal``.

    ``tap(hook, value)`` is called at every hook, and the pass goes on with what it returns. With ``relevance`` products
    follow the rules of the relevance lens instead of the derivative, as :mod:`scalpel.jacobian_lens.sweeps.sweep` says;
    the values are the same.
    """
    config = decoder.config
    x = tap(f"{i}.resid_in", x)
    norm1 = primal.norm1 = replace(DenseNorm.at(x, layer.norm1, config.eps, config.rms), fixed=relevance)
    normed = tap(f"{i}.attn.act_in", norm1.value())
    q, k, v = heads_of(config, layer, [dense(normed) for dense in layer.qkv])
    k = tap(f"{i}.attn.k", k.flatten(-2)).view(k.shape)
    q = tap(f"{i}.attn.q", q.flatten(-2)).view(q.shape)
    v = tap(f"{i}.attn.v", v.flatten(-2)).view(v.shape)
    q, primal.q_norm = _head_norm(q, layer.q_norm, config)
    k, primal.k_norm = _head_norm(k, layer.k_norm, config)
    if places.cosine is not None and places.sine is not None:
        q, k = (rotate(part.clone(), places.cosine, places.sine) for part in (q, k))
    mask = Mask(places.real, config.window(i))
    primal.attention = DenseAttention(q.contiguous(), k.contiguous(), v.contiguous(), mask, config.scale(i))
    y = tap(f"{i}.attn.y", primal.attention.y.flatten(-2))
    delta = tap(f"{i}.attn.resid_delta", layer.out(y))
    if config.parallel:
        middle, x = x, x + delta
    else:
        middle = x = tap(f"{i}.resid_mid", x + delta)
    norm2 = primal.norm2 = replace(DenseNorm.at(middle, layer.norm2, config.eps, config.rms), fixed=relevance)
    normed = tap(f"{i}.mlp.act_in", norm2.value())
    before_activation = layer.up[0](normed)
    neurons = decoder.activation(before_activation)
    primal.slope = (share_of if relevance else slope_of)(decoder.activation, before_activation)
    primal.opened = None
    if len(layer.up) == 2:
        gated = layer.up[1](normed)
        primal.opened, neurons = neurons, neurons * gated
        primal.slope = primal.slope * gated
        if relevance:  # each factor of the product gets half
            primal.opened, primal.slope = 0.5 * primal.opened, 0.5 * primal.slope
    neurons = tap(f"{i}.mlp.post_act", neurons)
    return x + tap(f"{i}.mlp.resid_delta", layer.down(neurons))


def _head_norm(x: Tensor, gain: Tensor | None, config: DecoderConfig) -> tuple[Tensor, DenseNorm | None]:
    """Normalise each head of q or k where the model has such a norm; without a ``gain`` it has none."""
    if gain is None:
        return x, None
    norm = DenseNorm.at(x, NormWeight(gain, None), config.eps, rms=True)
    return norm.value(), norm
