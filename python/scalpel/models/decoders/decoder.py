"""What the Jacobian engine needs to know of a dense decoder: its config, and the weights of one layer at a time.

Each family has a file of its own (gpt2, gpt_neox, llama) with the constants and functions that :class:`Family` lists.
Weights come from anything that returns tensors by name: a module's parameters, or a folder of safetensors. Every
matrix has the shape (out, in), even if its file stores (in, out): it is then a view, never a copy.
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
    """Tensors by their names in transformers."""

    def __call__(self, name: str) -> Tensor:
        """Return a tensor, or raise KeyError if there is none of that name."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Return the rows of a table at ``index``, (*index.shape, width)."""

    def __contains__(self, name: object) -> bool:
        """Tell whether the model has a tensor of that name; those that its file holds besides don't count."""


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): channels c and c + pairs turn together."""

    inverse: Tensor  # (pairs,) float32, radians per token
    scaling: float  # a factor of cosine and sine, which YaRN uses

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, rounded as transformers rounds them.

        Args:
            positions: (B or 1, L).
            dtype: The dtype of the result; angles are computed in float32.

        Returns:
            Two tensors, each (B or 1, L, 1, pairs).
        """
        angle = (positions[..., None].float() * self.inverse.to(positions.device))[:, :, None]
        return (angle.cos() * self.scaling).to(dtype), (angle.sin() * self.scaling).to(dtype)


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder, and the options in which the families differ."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    rms: bool  # whether norms are RMSNorm, otherwise LayerNorm
    eps: float
    activation: str  # its name in transformers
    rotary: Rotary | None = None
    parallel: bool = False  # whether attention and MLP read the same residual stream
    windows: tuple[int | None, ...] = ()  # for each layer, how many keys a query sees, including its own; None for all
    scales: tuple[float, ...] = ()  # for each layer, the factor of the attention scores

    def window(self, i: int) -> int | None:
        """Return how many keys a query of layer ``i`` sees, including its own, or None for all."""
        return self.windows[i] if self.windows else None

    def scale(self, i: int) -> float:
        """Return the factor of the attention scores in layer ``i``."""
        return self.scales[i] if self.scales else float(self.head_dim**-0.5)


@dataclass(frozen=True)
class NormWeight:
    """The weights of an RMSNorm or a LayerNorm."""

    gain: Tensor  # (width,)
    bias: Tensor | None  # (width,)


@dataclass(frozen=True)
class Dense:
    """A linear layer, y = W x + b."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out). The product is in the weight's dtype, and the result in that of ``x``."""
        y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer."""

    norm1: NormWeight
    norm2: NormWeight
    qkv: tuple[Dense, ...]  # one matrix for each of q, k and v, or one for all three
    out: Dense
    up: tuple[Dense, ...]  # one matrix, or the gate's and that of the values which the gate multiplies
    down: Dense
    by_head: bool = False  # whether one matrix for all three is ordered by head: q, k, v of head 0 first
    q_norm: Tensor | None = None  # (head_dim,), the gain of an RMSNorm of each head of q
    k_norm: Tensor | None = None  # (head_dim,), the same for k


class Family(Protocol):
    """The constants and functions that a family's file defines."""

    ARCHITECTURES: tuple[str, ...]  # model classes, by their names in a config's "architectures"
    HEADLESS: dict[str, str]  # from a class without an output matrix to the class that adds one
    PATHS: dict[str, str]  # from our hook's name to a module's path, with {i} for the layer
    PREFIX: str  # begins the names of all tensors but the output matrix; files of the model without a head lack it
    ALSO_NAMED: dict[str, str]  # from another name of a tensor, which files may use, to the class's own
    PASSED_OVER: dict[str, str]  # from a pattern of tensors that files may hold besides to why they may be ignored

    @staticmethod
    def read(config: Any, architecture: str) -> DecoderConfig | None:
        """Read transformers' config, or return None if it asks for something that the engine has no rule for."""

    @staticmethod
    def layer(get: Weights, i: int) -> DecoderLayer:
        """Return the weights of layer ``i``."""

    @staticmethod
    def embed(get: Weights, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed ids (B, L) at positions (B or 1, L), as (B, L, width)."""

    @staticmethod
    def final(get: Weights) -> tuple[NormWeight, Dense]:
        """Return the norm after the last layer, and the output matrix."""


@dataclass(frozen=True)
class Decoder:
    """A decoder whose layers can be read one at a time."""

    family: Family
    config: DecoderConfig
    weights: Weights
    headless: bool = False  # whether the model ends with its last norm; the embedding then stands for the output matrix

    def layer(self, i: int) -> DecoderLayer:
        """Return the weights of layer ``i``."""
        return self.family.layer(self.weights, i)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed ids (B, L) at positions (B or 1, L), as (B, L, width)."""
        return self.family.embed(self.weights, ids, positions)

    def final(self) -> tuple[NormWeight, Dense]:
        """Return the norm after the last layer, and the output matrix."""
        return self.family.final(self.weights)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function between the matrices of the MLP."""
        from transformers.activations import ACT2FN

        function: Callable[[Tensor], Tensor] = ACT2FN[self.config.activation]
        return function


def dense_at(get: Weights, name: str) -> Dense:
    """Return the linear layer of that name, with its bias if it has one."""
    return Dense(get(f"{name}.weight"), get(f"{name}.bias") if f"{name}.bias" in get else None)


def norm_at(get: Weights, name: str) -> NormWeight:
    """Return the norm of that name, with its bias if it has one."""
    return NormWeight(get(f"{name}.weight"), get(f"{name}.bias") if f"{name}.bias" in get else None)


def _expect(tensor: Tensor | None, name: str, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; by the config it should be {' or '.join(map(str, shapes))}"
        )


def check_layer(config: DecoderConfig, layer: DecoderLayer, i: int) -> None:
    """Check that a layer's weights have the shapes that the config says.

    Raises:
        ValueError: If one has another.
    """
    width, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    owner = f"layer {i}'s"
    for norm in (layer.norm1, layer.norm2):
        _expect(norm.gain, f"{owner} norm", (width,))
        _expect(norm.bias, f"{owner} norm's bias", (width,))
    sizes = (q, kv, kv) if len(layer.qkv) == 3 else (q + 2 * kv,)
    for dense, size in zip(layer.qkv, sizes, strict=True):
        _expect(dense.weight, f"{owner} matrix of q, k or v", (size, width))
        _expect(dense.bias, f"{owner} bias of q, k or v", (size,))
    neurons = layer.down.weight.shape[1]
    pairs = [(layer.out, "attention output", (width, q)), (layer.down, "MLP output", (width, neurons))]
    pairs += [(up, "MLP input", (neurons, width)) for up in layer.up]
    for dense, name, shape in pairs:
        _expect(dense.weight, f"{owner} {name}", shape)
        _expect(dense.bias, f"{owner} {name}'s bias", shape[:1])
    for gain in (layer.q_norm, layer.k_norm):
        _expect(gain, f"{owner} norm of heads", (config.head_dim,))


def check_head(config: DecoderConfig, norm: NormWeight, head: Dense) -> None:
    """Check that the final norm and the output matrix have the shapes that the config says.

    Raises:
        ValueError: If one has another.
    """
    _expect(norm.gain, "the final norm", (config.width,))
    _expect(head.weight, "the output matrix", (config.vocab_size, config.width))


def rotary_of(kind: Any, config: Any) -> Rotary | None:
    """Read the angles from transformers' own class of rotary embeddings.

    Args:
        kind: The family's class.
        config: transformers' config.

    Returns:
        The angles, or None if they depend on the length of the text.
    """
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return None
    with torch.device("cpu"):  # otherwise they would be on torch's default device
        embedding = kind(config)
    return Rotary(embedding.inv_freq.detach().float(), float(embedding.attention_scaling))
