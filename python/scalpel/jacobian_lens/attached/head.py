"""From a residual stream after the last layer to logits: a model's own last norm and output matrix.

The last norm and the output matrix run in their own dtype, as they do in the model. What the model does to its logits
afterwards, c tanh(x / c) in Gemma or a factor in Granite and Cohere, is done here in float32, so that logits that are
capped stay apart where bfloat16 would make ties of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...models.circuitgpt.model import CircuitGPT
from .blocks import Blocks

__all__ = ["CircuitHead", "DecoderHead", "GivenHead", "Head", "head_of"]


class Head(Protocol):
    """The last stage of a model.

    Attributes:
        device: Where it computes.
        dtype: The dtype of a model's own residual stream.
        vocabulary: How many logits there are; None until it is known.
    """

    device: torch.device
    dtype: torch.dtype
    vocabulary: int | None

    def logits(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Compute logits (rows, vocab), float32 or float64, of rows of the residual stream after the last layer.

        Args:
            x: (rows, width), in any dtype.
            ids: (rows,), the tokens at the same places, which a table of bigrams reads; None where there are none.
        """

    def rows(self, tokens: list[int]) -> Tensor:
        """Return the rows of the output matrix for tokens, (tokens, width)."""

    def gain(self) -> Tensor:
        """Return the factor (width,) by which the last norm multiplies each channel."""


class DecoderHead:
    """The last norm and the output matrix of a language model of transformers."""

    def __init__(self, norm: nn.Module, head: nn.Module, config: Any) -> None:
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"the output matrix is a {type(head).__name__} without a weight of its own: merge adapters first, or "
                "give unembed= to attach, a function from the residual stream to logits"
            )
        self._norm, self._head, self._weight = norm, head, weight
        self.vocabulary: int | None = len(weight)
        self.device = weight.device
        gains = next(iter(norm.parameters()), weight)
        self.dtype = gains.dtype
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._cap = getattr(text, "final_logit_softcapping", None)
        self._factor = float(getattr(text, "logit_scale", None) or 1) / float(
            getattr(text, "logits_scaling", None) or 1
        )

    def logits(self, x: Tensor, ids: Tensor | None) -> Tensor:
        raw = self._head(self._norm(x.to(self.device, self.dtype)).to(self._weight.dtype))
        logits: Tensor = raw if raw.dtype == torch.float64 else raw.float()
        if self._factor != 1:
            logits = logits * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def rows(self, tokens: list[int]) -> Tensor:
        return self._weight.detach()[tokens] * self._factor

    def gain(self) -> Tensor:
        return _gain(self._norm, self._weight.shape[1], self.dtype, self.device)


class CircuitHead:
    """The last stage of a CircuitGPT: norm, output matrix, the logits' biases, and the table of bigrams if it has one.

    Biases and bigrams are part of what the model makes of its last residual stream, so they belong to a readout too.
    """

    def __init__(self, core: CircuitGPT) -> None:
        self._core = core
        self.vocabulary: int | None = core.config.vocab_size
        self.device, self.dtype = core.device, core.dtype

    def logits(self, x: Tensor, ids: Tensor | None) -> Tensor:
        if ids is None:
            raise ValueError("the logits of a CircuitGPT need the ids of the tokens, which its table of bigrams reads")
        raw = self._core.unembed(x.to(self.device, self.dtype), ids.to(self.device))
        return raw if raw.dtype == torch.float64 else raw.float()

    def rows(self, tokens: list[int]) -> Tensor:
        return self._core.lm_head.weight.detach()[tokens]

    def gain(self) -> Tensor:
        return _gain(self._core.transformer.ln_f, self._core.config.d_model, self.dtype, self.device)


class GivenHead:
    """A function of the user's from residual streams (rows, width) to logits (rows, vocab)."""

    def __init__(self, unembed: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self._unembed = unembed
        self.vocabulary: int | None = None
        self.device, self.dtype = device, dtype

    def logits(self, x: Tensor, ids: Tensor | None) -> Tensor:
        raw = self._unembed(x.to(self.device, self.dtype))
        if not isinstance(raw, Tensor) or raw.dim() != 2 or len(raw) != len(x):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"unembed gave {shape} for residual streams {tuple(x.shape)}; it must be (rows, vocab)")
        return raw if raw.dtype == torch.float64 else raw.float()

    def rows(self, tokens: list[int]) -> Tensor:
        weight = getattr(self._unembed, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                "the vector of a token is a row of the output matrix, and unembed has no attribute weight (vocab, "
                "width): give it one, or give vectors in place of tokens"
            )
        return weight.detach()[tokens]

    def gain(self) -> Tensor:
        raise ValueError("norm_gain=True needs a model whose last norm is known; unembed= doesn't say")


def head_of(model: Any, blocks: Blocks | None, unembed: Callable[[Tensor], Tensor] | None) -> Head:
    """Find the last stage of a model that :func:`scalpel.hooks.standing.as_analysed` gave.

    Raises:
        ValueError: It is not known, and ``unembed`` isn't given.
    """
    if unembed is not None:
        parameter = next(iter(model.parameters()), None)
        if parameter is None:
            return GivenHead(unembed, torch.device("cpu"), torch.float32)
        return GivenHead(unembed, parameter.device, parameter.dtype)
    if isinstance(model, CircuitGPT):
        return CircuitHead(model)
    if blocks is None or blocks.norm is None or blocks.head is None:
        what = (
            "has no output matrix"
            if blocks is not None and blocks.norm is not None
            else "is of no kind whose last norm and head are known"
        )
        raise ValueError(
            f"this {type(model).__name__} {what}, so residual streams can't be read as tokens: load it with a head for "
            "language modelling, or give unembed= to attach, a function from the residual stream to logits"
        )
    return DecoderHead(model.get_submodule(blocks.norm), blocks.head, blocks.model.config)


def _gain(norm: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gain of a norm, from what it does to a row and to its negative, whatever its class calls its weight.

    The row has mean 0, so that a LayerNorm leaves its direction, and is large, so that the norm's epsilon is nothing.
    """
    row = torch.ones(width, dtype=torch.float64, device=device)
    row[1::2] = -1
    if width % 2:
        row[-1] = 0
        row = row + torch.linspace(0.5, -0.5, width, dtype=torch.float64, device=device)
    row *= 1000
    with torch.no_grad():
        up, down = (norm(sign * row.to(dtype)[None])[0].double() for sign in (1, -1))
    given = row.to(dtype).double()
    return (up - down) / 2 / given * given.square().mean().sqrt()
