"""The layers of a CircuitGPT: attention and MLP with AbsTopK at any of its places.

The forward pass names each value at a hook (``0.attn.q``, ``1.mlp.post_act``) and hands it to a *tap*, which may record
it or give another in its place. Each layer is a chain of stages, methods called ``from_...``, and a caller that has a
value of its own enters the chain there. So whoever needs part of the forward pass runs it, and nobody writes it again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...hooks.masks import activating, watched
from ...hooks.names import PATTERN
from ...lanes import FORWARD_BELOW, Linear, apply_linear
from ...topk import keep_topk
from ..fresh import PARAMETER_DTYPE, linear, zeros
from .attention import attend, attend_showing
from .config import CircuitGPTConfig

__all__ = ["MLP", "Attention", "Block", "LayerInputs", "Tap", "norm"]

Tap = Callable[[str, Tensor], Tensor]
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, bias: bool, device: torch.device) -> None:
        super().__init__(width, eps=1e-5, bias=bias, device=device, dtype=PARAMETER_DTYPE)


def norm(config: CircuitGPTConfig, width: int, device: torch.device) -> nn.Module:
    """Make the norm that the config asks for, LayerNorm or RMSNorm, of ``width`` channels."""
    if config.rms_norm:
        return nn.RMSNorm(width, device=device, dtype=PARAMETER_DTYPE)
    return _LayerNorm(width, config.ln_bias, device)


class LayerInputs(NamedTuple):
    """What a layer is given beside the residual stream in one forward pass.

    ``name``: the layer's number, with which the names of its hooks begin. ``allowed``: which keys each query may read,
    as :func:`.attention.attend` takes it. ``positions`` (..., L, d_pos_emb): the position embeddings, where they stand
    beside the normed residual; None where they were added to the token embeddings. ``rows``: the tokens whose values
    are wanted after the layer; the queries and all that follows are computed for these alone, and ``allowed`` has only
    their rows; None means all tokens. ``remember``: a function that is given the keys and values of these tokens and
    gives those of all tokens that the queries may read, which include tokens of earlier passes. ``overwrite``: values
    that the layer has made itself are overwritten by the next step, which saves fresh memory; only where nobody keeps
    what a tap or a watch sees and nothing is differentiated. ``pattern``: whether the weights of attention are written
    out and shown to the tap; the fused kernels have none.
    """

    name: str
    tap: Tap
    allowed: Tensor
    positions: Tensor | None = None
    rows: Tensor | None = None
    overwrite: bool = False
    remember: Remember | None = None
    pattern: bool = False

    def wanted(self, value: Tensor) -> Tensor:
        """``value`` (..., L, width) at the rows that are wanted after the layer."""
        return value if self.rows is None else value[..., self.rows, :]


class _Sparsifier:
    """AbsTopK at a named location, or nothing where the config leaves that location off."""

    def __init__(self, config: CircuitGPTConfig) -> None:
        self.config = config

    def __call__(self, x: Tensor, location: str, name: str, overwrite: bool = False) -> Tensor:
        k = self.config.k_at(location, x.shape[-1])
        if k is None:
            return x
        watched(name, x, k)
        return keep_topk(x, k, out=x if overwrite else None)


class _Sink(nn.Module):
    """One slot per head that takes attention and gives nothing: logit ``sink_logit``, value zero."""

    def __init__(self, n_head: int, device: torch.device) -> None:
        super().__init__()
        self.sink_logit = nn.Parameter(zeros(n_head, device=device))


class Attention(nn.Module):
    """Causal self-attention with an optional sink. Input (B, L, d_in), output (B, L, d_model).

    ``forward`` runs through the stages below; each of them is the rest of the pass from one value on.
    """

    def __init__(self, config: CircuitGPTConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.c_attn = linear(config.d_in, 3 * config.d_attn, config.bias, device)
        self.c_proj = linear(config.d_attn, config.d_model, config.bias, device)
        if config.sink:
            self.attn_imp = _Sink(config.n_head, device)
        self._sparsify = _Sparsifier(config)

    def forward(self, x: Tensor, layer: LayerInputs) -> Tensor:
        name = f"{layer.name}.attn.act_in"
        x = layer.tap(name, self._sparsify(x, "attn_in", name, layer.overwrite))
        width = self.config.d_attn
        if layer.rows is None:
            q, k, v = apply_linear(self.c_attn, x).split(width, dim=-1)
        else:
            k, v = _some_outputs(self.c_attn, x, slice(width, None)).split(width, dim=-1)
            q = _some_outputs(self.c_attn, layer.wanted(x), slice(0, width))
        return self.from_qkv(q, k, v, layer)

    def from_qkv(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerInputs) -> Tensor:
        """From the queries, keys and values (B, L, d_attn) before their AbsTopKs."""
        at, tap, overwrite = f"{layer.name}.attn", layer.tap, layer.overwrite
        k = tap(f"{at}.k", self._sparsify(k, "attn_k", f"{at}.k", overwrite))
        q = tap(f"{at}.q", self._sparsify(q, "attn_q", f"{at}.q", overwrite))
        v = tap(f"{at}.v", self._sparsify(v, "attn_v", f"{at}.v", overwrite))
        if layer.remember is not None:
            k, v = layer.remember(k, v)
        y = tap(f"{at}.y", self._attended(q, k, v, layer))
        return self.from_product(apply_linear(self.c_proj, y), layer)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerInputs) -> Tensor:
        given = q, k, v, self.config.n_head, layer.allowed, self.sink_logit
        if not layer.pattern:
            return attend(*given)
        return attend_showing(*given, lambda weights: layer.tap(f"{layer.name}.{PATTERN}", weights))

    def from_product(self, product: Tensor, layer: LayerInputs) -> Tensor:
        """From the output projection's product (B, L, d_model), before its AbsTopK."""
        return self._sparsify(product, "attn_out", f"{layer.name}.attn.resid_delta", layer.overwrite)

    @property
    def sink_logit(self) -> Tensor | None:
        """The sink's logit of each head (n_head,); None where attention has no sink."""
        return self.attn_imp.sink_logit if self.config.sink else None


class MLP(nn.Module):
    """One hidden layer. Input (B, L, d_in), output (B, L, d_model). Staged as :class:`Attention` is."""

    def __init__(self, config: CircuitGPTConfig, device: torch.device) -> None:
        super().__init__()
        assert config.d_mlp is not None
        self.config = config
        self.c_fc = linear(config.d_in, config.d_mlp, config.bias, device)
        self.c_proj = linear(config.d_mlp, config.d_model, config.bias, device)
        self.activation = F.gelu if config.activation_type == "gelu" else F.relu
        self._sparsify = _Sparsifier(config)

    def forward(self, x: Tensor, layer: LayerInputs) -> Tensor:
        name = f"{layer.name}.mlp.act_in"
        x = layer.tap(name, self._sparsify(x, "mlp_in", name, layer.overwrite))
        return self.from_hidden(apply_linear(self.c_fc, x), layer)

    def from_hidden(self, before: Tensor, layer: LayerInputs) -> Tensor:
        """From the hidden layer (B, L, d_mlp) before its activation."""
        name = f"{layer.name}.mlp.post_act"
        activating(name, before)
        if self.config.activation_type == "relu":
            watched(name, before, None)
        neurons = self._activated(before, layer.overwrite)
        neurons = layer.tap(name, self._sparsify(neurons, "mlp_neuron", name, layer.overwrite))
        return self.from_product(apply_linear(self.c_proj, neurons), layer)

    def from_product(self, product: Tensor, layer: LayerInputs) -> Tensor:
        """From the output projection's product (B, L, d_model), before its AbsTopK."""
        return self._sparsify(product, "mlp_out", f"{layer.name}.mlp.resid_delta", layer.overwrite)

    def _activated(self, x: Tensor, overwrite: bool) -> Tensor:
        if not overwrite:
            return self.activation(x)
        return torch.ops.aten.gelu_(x) if self.activation is F.gelu else x.relu_()


class Block(nn.Module):
    """A layer: attention then MLP, each reading the normed residual (B, L, d_model) and adding to it.

    Staged as :class:`Attention` is: each ``from_`` method gives the residual stream after the layer.
    """

    def __init__(self, config: CircuitGPTConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.ln_1 = norm(config, config.d_model, device)
        self.attn = Attention(config, device)
        self.ln_2 = norm(config, config.d_model, device)
        self.mlp = MLP(config, device)
        if config.d_pos_emb is not None:
            self.ln_p1 = norm(config, config.d_pos_emb, device)
            self.ln_p2 = norm(config, config.d_pos_emb, device)
        self._sparsify = _Sparsifier(config)

    def forward(self, x: Tensor, layer: LayerInputs) -> Tensor:
        x = layer.tap(f"{layer.name}.resid_in", x)
        read = self.ln_1(x)
        if layer.positions is not None:
            read = _beside(read, self.ln_p1(layer.positions))
        return self.from_attention(layer.wanted(x), self.attn(read, layer), layer)

    def from_attention(self, x: Tensor, delta: Tensor, layer: LayerInputs) -> Tensor:
        """From the residual before attention and what attention adds to it."""
        delta = layer.tap(f"{layer.name}.attn.resid_delta", delta)
        return self.from_middle(self._joined(x, delta, "resid_post_attn", layer), layer)

    def from_middle(self, x: Tensor, layer: LayerInputs) -> Tensor:
        """From the residual between attention and MLP."""
        x = layer.tap(f"{layer.name}.resid_mid", x)
        read = self.ln_2(x)
        if layer.positions is not None:
            read = _beside(read, self.ln_p2(layer.wanted(layer.positions)))
        return self.from_mlp(x, self.mlp(read, layer), layer)

    def from_mlp(self, x: Tensor, delta: Tensor, layer: LayerInputs) -> Tensor:
        """From the residual before the MLP and what the MLP adds to it."""
        delta = layer.tap(f"{layer.name}.mlp.resid_delta", delta)
        return self._joined(x, delta, "resid_post_mlp", layer)

    def _joined(self, x: Tensor, delta: Tensor, location: str, layer: LayerInputs) -> Tensor:
        x = delta.add_(x) if layer.overwrite and delta.numel() >= x.numel() else x + delta
        name = f"{layer.name}.{location}"
        if self.config.residual_activation_type == "relu":
            watched(name, x, None)
            x = x.relu_() if layer.overwrite else x.relu()
        return self._sparsify(x, location, name, layer.overwrite)


def _beside(read: Tensor, positions: Tensor) -> Tensor:
    """The normed residual with the normed positions as its last channels."""
    return torch.cat([read, positions.expand(*read.shape[:-1], -1)], dim=-1)


def _some_outputs(layer: nn.Linear, x: Tensor, outputs: slice) -> Tensor:
    """Some outputs of a linear layer, by its non-zeros if these are few; nothing is differentiated."""
    part, bias = Linear(layer, outputs), None if layer.bias is None else layer.bias[outputs]
    if x.dtype != layer.weight.dtype or part.density() >= FORWARD_BELOW:
        return F.linear(x, layer.weight[outputs], bias)
    return part.sparse().forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)
