"""Causal attention with a sink: weights and outputs, and which keys a query may read."""

import math
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ...hooks.scope import Scope

_fused_training: ContextVar[tuple[bool, ...]] = ContextVar("fused_training", default=())


def fused_training() -> Scope[bool]:
    """Within this context, attention is trained through torch's fused kernel, about three times as fast on a CPU.

    The kernel has a first derivative in reverse mode and no other, and its rounding differs from that of the weights
    written out. The context can be entered again.
    """
    return Scope(_fused_training, True)


def attend(q: Tensor, k: Tensor, v: Tensor, n_head: int, allowed: Tensor, sink_logit: Tensor | None) -> Tensor:
    """Compute the outputs (B, L, width) of all heads side by side, from q, k and v of that shape.

    ``allowed``: bool (L, L) or (B, 1, L, L); ``sink_logit``: (n_head,) or None. There may be fewer queries than keys;
    ``allowed`` then has a row for each query. Where nothing is differentiated, torch's fused kernels are used. They
    hold no (L, L) weights, and their rounding differs.
    """
    if _differentiated():
        if _fused_training.get():
            return _attend_with_sink_key(q, k, v, n_head, allowed, sink_logit)
        return _joined(attention_weights(q, k, n_head, allowed, sink_logit) @ _heads(v, n_head))
    bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
    # the fused kernels need a batch dimension on the mask
    bias = bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]
    queries, keys, values = _heads(q, n_head), _heads(k, n_head), _heads(v, n_head)
    if sink_logit is None:
        return _joined(F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias))
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        # The kernel behind the call above also gives the log-sum-exp of each row, from which the sink's share follows.
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, attn_mask=bias)
        return _joined(y * torch.sigmoid(log_sum - sink_logit.to(q.dtype)[:, None])[..., None])
    # The sink is one more key, whose value is zero.
    bias = bias.expand(-1, n_head, -1, -1)
    column = sink_logit.to(q.dtype).view(-1, 1, 1).expand(*bias.shape[:-1], 1)
    keys, values = F.pad(keys, (0, 0, 1, 0)), F.pad(values, (0, 0, 1, 0))
    mask = torch.cat([column, bias], dim=-1)
    return _joined(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask))


def attend_showing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_head: int,
    allowed: Tensor,
    sink_logit: Tensor | None,
    show: Callable[[Tensor], Tensor],
) -> Tensor:
    """:func:`attend` through weights that are written out, for those who want to see or to replace them.

    ``show`` gets the weights (B, queries, n_head * keys), those of a query's heads side by side, and returns the
    weights to go on with. What it puts at keys that the query may not read has no effect, and no gradient.
    """
    weights = _heads(show(_joined(attention_weights(q, k, n_head, allowed, sink_logit))), n_head)
    return _joined(weights.masked_fill(~allowed, 0.0) @ _heads(v, n_head))


def _attend_with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, n_head: int, allowed: Tensor, sink_logit: Tensor | None
) -> Tensor:
    """:func:`attend` with the sink as one more key: each query ends in a 1, and that key has its logit there."""
    queries, keys, values = _heads(q, n_head), _heads(k, n_head), _heads(v, n_head)
    scale = 1 / math.sqrt(queries.shape[-1])
    bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
    bias = bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]
    if sink_logit is None:
        return _joined(F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale))
    logit = sink_logit.to(q.dtype).view(1, -1, 1, 1) / scale
    sink = F.pad(logit, (queries.shape[-1], 0)).expand(len(queries), -1, -1, -1)
    queries = torch.cat([queries, queries.new_ones(*queries.shape[:-1], 1)], -1)
    keys, values = torch.cat([sink, F.pad(keys, (0, 1))], -2), F.pad(values, (0, 1, 1, 0))
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=F.pad(bias, (1, 0)), scale=scale)
    return _joined(y[..., :-1])


def attention_weights(q: Tensor, k: Tensor, n_head: int, allowed: Tensor, sink_logit: Tensor | None) -> Tensor:
    """Compute the weights of real keys (B, n_head, queries, keys).

    Each row sums to 1, or to less where there is a sink.
    """
    scores = _heads(q, n_head) @ _heads(k, n_head).transpose(-2, -1) / math.sqrt(q.shape[-1] // n_head)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink_logit is None:
        return scores.softmax(-1)
    sink = sink_logit.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([sink, scores], dim=-1).softmax(-1)[..., 1:]


def allowed_keys(input_ids: Tensor, attention_mask: Tensor | None, past: int = 0) -> Tensor:
    """Determine which keys each query may read: bool (L, K) or (B, 1, L, K), where K = past + L.

    The queries are the tokens ``input_ids`` (B, L), which follow ``past`` tokens whose keys are kept. The mask counts
    all of them, (B, K) or (B, L, K). A query that may read no key reads itself, so that the row of a padding token
    stays finite; no real query reads it.
    """
    batch, length = input_ids.shape
    keys = past + length
    causal = torch.ones(length, keys, dtype=torch.bool, device=input_ids.device).tril(past)
    if attention_mask is None:
        return causal
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is {type(attention_mask).__name__}; it must be a tensor")
    if attention_mask.shape not in ((batch, keys), (batch, length, keys)):
        after = f", since {past} tokens came before these {length}" if past else ""
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {(batch, keys)} "
            f"or {(batch, length, keys)}{after}"
        )
    itself = causal & torch.ones_like(causal).triu(past)
    mask = attention_mask.to(input_ids.device).bool()
    allowed = causal & (mask[:, None, :] if mask.dim() == 2 else mask)
    return (allowed | (~allowed.any(-1, keepdim=True) & itself))[:, None]


def _heads(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(-3, -2)


def _joined(y: Tensor) -> Tensor:
    return y.transpose(-3, -2).flatten(-2)


def _differentiated() -> bool:
    """Whether a derivative may be asked for, in reverse or forward mode; the fused kernel has no forward derivative."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0
