"""Dense decoders as the Jacobian engine reads them: what a family's config says, and one layer's weights at a time.

A family is a file of its own (gpt2, gpt_neox, llama) with the functions that :class:`Family` lists. Weights come
from anything that gives tensors by their names: a module's parameters, or a folder of safetensors. Every
matrix is (out, in), whatever its file holds; views, never copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "Dense", "Family", "NormWeight", "Rotary", "Weights"]


class Weights(Protocol):
    """Tensors by the names that transformers gives them."""

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name; KeyError where there is none."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Some rows of a table: (*index.shape, width)."""

    def __contains__(self, name: object) -> bool:
        """Whether the model's class, with its config, has a tensor of that name; a file's left-overs don't count."""


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): channel c turns with channel c + pairs."""

    inverse: Tensor  # (pairs,) float32, radians a token
    scaling: float  # of cosine and sine (YaRN)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B or 1, L, 1, pairs) at positions (B or 1, L), rounded as transformers rounds them."""
        angle = (positions[..., None].float() * self.inverse.to(positions.device))[:, :, None]
        return (angle.cos() * self.scaling).to(dtype), (angle.sin() * self.scaling).to(dtype)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and the switches in which the families differ."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    rms: bool  # RMSNorm; else LayerNorm
    eps: float
    activation: str  # as transformers names it
    rotary: Rotary | None = None
    parallel: bool = False  # attention and MLP read the same residual stream
    windows: tuple[int | None, ...] = ()  # a layer's: how many keys, its own included, a query may look back
    scales: tuple[float, ...] = ()  # a layer's: of the scores

    def window(self, i: int) -> int | None:
        return self.windows[i] if self.windows else None

    def scale(self, i: int) -> float:
        return self.scales[i] if self.scales else float(self.head_dim**-0.5)


@dataclass(frozen=True)
class NormWeight:
    gain: Tensor  # (width,)
    bias: Tensor | None


@dataclass(frozen=True)
class Dense:
    """y = W x + b."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) of x's dtype; the product itself is in that of the weight."""
        y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class DecoderLayer:
    norm1: NormWeight
    norm2: NormWeight
    qkv: tuple[Dense, ...]  # one for each of q, k and v, or one that gives all
    out: Dense
    up: tuple[Dense, ...]  # one, or the gate and what it multiplies
    down: Dense
    by_head: bool = False  # one matrix gives q, k, v of the first head, then of the second ...
    q_norm: Tensor | None = None  # (head_dim,) RMSNorm of each head
    k_norm: Tensor | None = None


class Family(Protocol):
    """What a family's file has."""

    ARCHITECTURES: tuple[str, ...]  # model classes, as a config's "architectures" names them
    PATHS: dict[str, str]  # our hook → module path, with {i} for the layer
    PREFIX: str  # of the names of all tensors but the output matrix; files of the bare model lack it
    ALSO_NAMED: dict[str, str]  # what files may call a tensor → the class's name
    PASSED_OVER: dict[str, str]  # a pattern of what files may hold beside the weights → why it may be left out

    @staticmethod
    def read(config: Any, architecture: str) -> DecoderConfig | None:
        """None where the config asks for what the engine has no rule for."""

    @staticmethod
    def layer(get: Weights, i: int) -> DecoderLayer: ...

    @staticmethod
    def embed(get: Weights, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B, L), positions (B or 1, L) → (B, L, width)."""

    @staticmethod
    def final(get: Weights) -> tuple[NormWeight, Dense]: ...


@dataclass(frozen=True)
class Decoder:
    """A decoder whose layers can be had one at a time."""

    family: Family
    config: DecoderConfig
    weights: Weights

    def layer(self, i: int) -> DecoderLayer:
        return self.family.layer(self.weights, i)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.family.embed(self.weights, ids, positions)

    def final(self) -> tuple[NormWeight, Dense]:
        """The norm after the last layer, and the output matrix."""
        return self.family.final(self.weights)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        from transformers.activations import ACT2FN

        found: Callable[[Tensor], Tensor] = ACT2FN[self.config.activation]
        return found


def dense_at(get: Weights, name: str) -> Dense:
    """The linear layer of that name; its bias where it has one."""
    return Dense(get(f"{name}.weight"), get(f"{name}.bias") if f"{name}.bias" in get else None)


def norm_at(get: Weights, name: str) -> NormWeight:
    """The norm of that name; its bias where it has one."""
    return NormWeight(get(f"{name}.weight"), get(f"{name}.bias") if f"{name}.bias" in get else None)


def _expect(tensor: Tensor | None, name: str, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; by the config it is {' or '.join(map(str, shapes))}")


def check_layer(config: DecoderConfig, layer: DecoderLayer, i: int) -> None:
    """ValueError where a layer's weights are not of the config's shapes."""
    width, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    at = f"layer {i}'s"
    for norm in (layer.norm1, layer.norm2):
        _expect(norm.gain, f"{at} norm", (width,))
        _expect(norm.bias, f"{at} norm's bias", (width,))
    sizes = (q, kv, kv) if len(layer.qkv) == 3 else (q + 2 * kv,)
    for dense, size in zip(layer.qkv, sizes, strict=True):
        _expect(dense.weight, f"{at} matrix of q, k or v", (size, width))
        _expect(dense.bias, f"{at} bias of q, k or v", (size,))
    neurons = layer.down.weight.shape[1]
    pairs = [(layer.out, "attention output", (width, q)), (layer.down, "MLP output", (width, neurons))]
    pairs += [(up, "MLP input", (neurons, width)) for up in layer.up]
    for dense, name, shape in pairs:
        _expect(dense.weight, f"{at} {name}", shape)
        _expect(dense.bias, f"{at} {name}'s bias", shape[:1])
    for gain in (layer.q_norm, layer.k_norm):
        _expect(gain, f"{at} norm of heads", (config.head_dim,))


def check_head(config: DecoderConfig, norm: NormWeight, head: Dense) -> None:
    """ValueError where the final norm or the output matrix is not of the config's shape."""
    _expect(norm.gain, "the final norm", (config.width,))
    _expect(head.weight, "the output matrix", (config.vocab_size, config.width))


def rotary_of(kind: Any, config: Any) -> Rotary | None:
    """From a family's own class of rotary embeddings; None where the angles depend on the text's length."""
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return None
    with torch.device("cpu"):  # transformers makes its tables on torch's default device
        made = kind(config)
    return Rotary(made.inv_freq.detach().float(), float(made.attention_scaling))
