"""Seeing the weights of attention while a model of transformers runs.

They are no module's value: the attention function makes them, and a fused one never writes them out. So calls of
PyTorch's functions are watched while an attention module runs, in this thread alone, and nothing about the model or its
config is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .modules import before_and_after

__all__ = ["showing_weights"]

Meet = Callable[[Tensor, str], Tensor]


@contextmanager
def showing_weights(model: nn.Module, names: Sequence[str], meet: Meet, replace: bool) -> Iterator[None]:
    """Call ``meet(weights, name)`` with the attention weights of the modules ``names`` that run inside the context.

    The weights are (B, queries, heads * keys), those of a query's heads side by side, in the dtype that the softmax is
    computed in: float32 in a model of half precision. A module shows them if it calls
    ``scaled_dot_product_attention``, as with the implementation ``"sdpa"``, or ``softmax``, as with ``"eager"``.

    Args:
        model: The model.
        names: Paths of attention modules.
        meet: Gets the weights, and returns those to go on with.
        replace: Whether the model goes on with what ``meet`` returns. Otherwise it computes what it always does, with
            its fused function, and the weights are computed beside.
    """
    mode = _Watching(meet, replace)

    def enter(name: str) -> Callable[[], None]:
        return lambda: mode.inside.append(name)

    with before_and_after(model, {name: (enter(name), mode.inside.pop) for name in names}), mode:
        yield


class _Watching(TorchFunctionMode):
    """A mode in which the attention weights of the modules that run are shown to ``meet``."""

    def __init__(self, meet: Meet, replace: bool) -> None:
        super().__init__()
        self.meet, self.replace = meet, replace
        self.inside: list[str] = []  # the attention modules that run now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.inside or func not in (F.scaled_dot_product_attention, F.softmax):
            return func(*args, **kwargs)
        if func is F.softmax:
            return self._softmax(func, args, kwargs)
        if self.replace:
            scores, values = _scores(*args, **kwargs)
            return self._shown(scores, _softmax(scores)).to(values.dtype) @ values
        with torch.no_grad():
            scores, _ = _scores(*args, **kwargs)
            self._shown(scores, _softmax(scores))
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        weights = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        if weights.dim() != 4:
            return weights
        shown = self._shown(scores, weights)
        return shown if self.replace else weights

    def _shown(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Show the weights (B, heads, queries, keys), and give those to go on with.

        At keys that a query may not read these are what they were, without a gradient.
        """
        flat = weights.transpose(1, 2).flatten(2)
        met = self.meet(flat, self.inside[-1]).unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        return torch.where(_readable(scores), met, weights.detach())


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scores (B, heads, queries, keys), and the values of each head, that the arguments of PyTorch's function mean.

    Scores of half precision are computed in float32, as the fused function computes them. Its dropout is left out,
    because a model that is looked at is in evaluation mode.
    """
    if query.dtype in (torch.bfloat16, torch.float16):
        query, key = query.float(), key.float()
    if key.shape[-3] != query.shape[-3]:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores, attn_mask = scores + attn_mask, _readable(attn_mask)
    return scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf), value


def _readable(scores: Tensor) -> Tensor:
    """Where a query may read a key: a mask adds -inf, or the least number of its dtype, to the other scores."""
    return scores > torch.finfo(scores.dtype).min / 2


def _softmax(scores: Tensor) -> Tensor:
    """The weights, with zeros for a query that may read no key, as PyTorch's function has them."""
    return scores.softmax(-1).masked_fill(~_readable(scores), 0.0)
