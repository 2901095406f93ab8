"""The products of one layer of a dense decoder with T tangents (T, B, tokens, width), forward and back.

``hook(name, tangent)`` is called at every hook, and the product goes on with what it returns. None stands for a tangent
of zero, such as before the source, and for a cotangent of zero, such as after the target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...hooks.names import PATTERN
from ...models.decoders.decoder import Decoder, DecoderLayer, Dense
from ..pattern import Pattern
from .primal import DensePrimal, Places, heads_of, parts_of
from .rules import DenseNorm, rotate

Hook = Callable[[str, Tensor | None], Tensor | None]


class Buffers:
    """Named memory for intermediate values, which all layers share.

    Without it, each layer would wait for fresh pages of memory longer than for its arithmetic.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of this shape, which holds arbitrary numbers until the caller writes to it."""
        size = int(torch.Size(shape).numel())
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size or kept.device != device:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


class DenseLayer:
    """The rules of layer ``i`` at its primal, for tangents of the tokens ``part``.

    ``pattern``: the weights of the layer's attention at chosen queries, where they are the target. ``unseen``: nobody
    looks at hooks within the layer, so cotangents there may stay in the dtype of the products.
    """

    def __init__(
        self,
        decoder: Decoder,
        i: int,
        layer: DecoderLayer,
        primal: DensePrimal,
        places: Places,
        part: slice,
        buffers: Buffers,
        pattern: Pattern | None = None,
        unseen: bool = False,
    ) -> None:
        self.config = decoder.config
        self.i = i
        self.layer = layer
        self.primal = primal
        self.places = places.rows(part)
        self.part = part
        self.buffers = buffers
        self.pattern = pattern
        self.unseen = unseen
        self._kept_slopes: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    # ---- forward -------------------------------------------------------------------------------

    def push(self, x: Tensor | None, hook: Hook, watched: set[str]) -> Tensor | None:
        """Return the tangent of the residual stream after the layer, given the tangent ``x`` before it.

        ``x`` is overwritten. ``hook`` may not be called at a ``resid_delta`` that is not in ``watched``: its tangent is
        then added to the residual stream in the same step as it is computed.
        """
        prefix, layer, primal = f"{self.i}.", self.layer, self.primal
        x = hook(f"{prefix}resid_in", x)
        normed = hook(f"{prefix}attn.act_in", None if x is None else self._normed(primal.norm1, x))
        y = hook(f"{prefix}attn.y", self._attended(normed, hook))
        after = self._joined(x, layer.out, y, f"{prefix}attn.resid_delta", hook, watched)
        if self.config.parallel:
            return self._mlp(x, after, hook, watched)
        after = hook(f"{prefix}resid_mid", after)
        return self._mlp(after, after, hook, watched)

    def _mlp(self, middle: Tensor | None, after: Tensor | None, hook: Hook, watched: set[str]) -> Tensor | None:
        prefix, layer, primal = f"{self.i}.", self.layer, self.primal
        normed = hook(f"{prefix}mlp.act_in", None if middle is None else self._normed(primal.norm2, middle))
        neurons = None
        if normed is not None:
            neurons = self._product(layer.up[0], normed, "neurons").mul_(primal.slope[:, self.part])
            if primal.opened is not None:
                gated = self._product(layer.up[1], normed, "beside")
                neurons.addcmul_(gated, primal.opened[:, self.part])
        neurons = hook(f"{prefix}mlp.post_act", neurons)
        return self._joined(after, layer.down, neurons, f"{prefix}mlp.resid_delta", hook, watched)

    def _normed(self, norm: DenseNorm, x: Tensor) -> Tensor:
        out = self.buffers("read", tuple(x.shape), x.dtype, x.device)
        return norm.rows(self.part).jvp(x, out)

    def _attended(self, normed: Tensor | None, hook: Hook) -> Tensor | None:
        heads: list[Tensor | None] = [None, None, None]
        if normed is not None:
            parts = [self._product(dense, normed, f"qkv{number}") for number, dense in enumerate(self.layer.qkv)]
            heads = list(heads_of(self.config, self.layer, parts))
        for number, name in ((1, "k"), (0, "q"), (2, "v")):
            heads[number] = self._hooked(f"{self.i}.attn.{name}", heads[number], hook)
        q, k, v = heads
        present = next((part for part in heads if part is not None), None)
        if present is None:
            return None
        q = self._turned(q, self.primal.q_norm, 1)
        k = self._turned(k, self.primal.k_norm, 1)
        if self.pattern is not None:
            moved = None if q is None and k is None else self.pattern.jvp(q, k, self.part.start)
            hook(f"{self.i}.{PATTERN}", moved)
        shape = (*present.shape[:3], self.config.heads, self.config.head_dim)
        y = self.buffers("y", shape, present.dtype, present.device)
        return self.primal.attention.jvp(q, k, v, y, self.part.start).flatten(-2)

    def _turned(self, x: Tensor | None, norm: DenseNorm | None, way: int) -> Tensor | None:
        """Carry q or k through the norm of its heads and the rotation, or back through both where ``way`` is -1."""
        if x is None:
            return None
        if norm is not None and way > 0:
            x = norm.rows(self.part).jvp(x, x)
        if self.places.cosine is not None and self.places.sine is not None:
            x = rotate(x, self.places.cosine, way * self.places.sine)
        return norm.rows(self.part).vjp(x) if norm is not None and way < 0 else x

    def _hooked(self, name: str, heads: Tensor | None, hook: Hook) -> Tensor | None:
        """Call the hook of q, k or v, whose value has the heads side by side."""
        flat = hook(name, None if heads is None else heads.flatten(-2))
        return None if flat is None else flat.unflatten(-1, (-1, self.config.head_dim))

    def _joined(
        self, x: Tensor | None, dense: Dense, t: Tensor | None, name: str, hook: Hook, watched: set[str]
    ) -> Tensor | None:
        """Add W t, with W the matrix of ``dense``, to ``x``. The product W t is the tangent at the hook ``name``."""
        if name not in watched and t is not None and x is not None and not self._kept_apart(name):
            return self._add_product(x, dense, t)
        delta = hook(name, None if t is None else self._product(dense, t, name.partition(".")[2]))
        if x is None or delta is None:
            return x if delta is None else delta.clone()
        return x + delta if self._kept_apart(name) else x.add_(delta)

    def _kept_apart(self, name: str) -> bool:
        """Whether the residual stream before the sum is still needed after it."""
        return self.config.parallel and name.endswith("attn.resid_delta")

    # ---- backward ------------------------------------------------------------------------------

    def pull(self, x: Tensor | None, hook: Hook) -> Tensor | None:
        """Return the cotangent of the residual stream before the layer, given the cotangent ``x`` after it.

        ``x`` is overwritten, and is what is returned where a cotangent is given; values at hooks within the layer are
        in buffers, and hold until the next layer's turn.
        """
        prefix, layer = f"{self.i}.", self.layer
        delta_out = hook(f"{prefix}mlp.resid_delta", x)
        neurons = hook(f"{prefix}mlp.post_act", self._back([(layer.down, delta_out)], "neurons", self.unseen))
        parts: list[tuple[Dense, Tensor | None]] = []
        if neurons is not None:
            slope, opened = self._slopes(neurons.dtype)
            if opened is not None:
                beside = self.buffers("beside", tuple(neurons.shape), neurons.dtype, neurons.device)
                parts.append((layer.up[1], torch.mul(neurons, opened, out=beside)))
            parts.append((layer.up[0], neurons.mul_(slope)))
        from_mlp = hook(f"{prefix}mlp.act_in", self._back(parts, "read", self.unseen))
        delta = x
        if not self.config.parallel:
            x = delta = hook(f"{prefix}resid_mid", self._unnormed("norm2", from_mlp, x))
        delta_out = hook(f"{prefix}attn.resid_delta", delta)
        y = hook(f"{prefix}attn.y", self._back([(layer.out, delta_out)], "y"))
        if self.config.parallel:  # not before, since the cotangent of attention's output is that after the layer
            x = self._unnormed("norm2", from_mlp, x)
        normed = hook(f"{prefix}attn.act_in", self._back(self._attended_back(y, hook), "read", self.unseen))
        return hook(f"{prefix}resid_in", self._unnormed("norm1", normed, x))

    def _unnormed(self, name: str, normed: Tensor | None, x: Tensor | None) -> Tensor | None:
        """Add to ``x`` what ``normed``, the cotangent after the norm ``name``, gives before it; None is zero."""
        if normed is None:
            return x
        norm: DenseNorm = getattr(self.primal, name)
        if x is not None and normed.dtype != x.dtype:
            normed = self.buffers("wide", tuple(normed.shape), x.dtype, x.device).copy_(normed)
        return norm.rows(self.part).add_vjp(normed, torch.zeros_like(normed) if x is None else x)

    def _slopes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The slope of the neurons and the open gates, in the dtype of their cotangents, which all pieces share."""
        if dtype not in self._kept_slopes:
            slope, opened = self.primal.slope[:, self.part], self.primal.opened
            self._kept_slopes[dtype] = slope.to(dtype), None if opened is None else opened[:, self.part].to(dtype)
        return self._kept_slopes[dtype]

    def _attended_back(self, y: Tensor | None, hook: Hook) -> list[tuple[Dense, Tensor | None]]:
        heads: list[Tensor | None] = [None, None, None]
        weights = None if self.pattern is None else hook(f"{self.i}.{PATTERN}", None)
        if self.pattern is not None and weights is not None:
            q, k = (of_all[:, :, self.part.start :] for of_all in self.pattern.vjp(weights, self.part.stop))
            heads = [self._turned(q, self.primal.q_norm, -1), self._turned(k, self.primal.k_norm, -1), None]
        if y is not None:
            u = y.unflatten(-1, (self.config.heads, -1))
            shapes = [(*u.shape[:3], count, u.shape[-1]) for count in (self.config.heads, *[self.config.kv_heads] * 2)]
            out = [self.buffers(f"qkv{number}", shape, u.dtype, u.device) for number, shape in enumerate(shapes)]
            q, k, v = self.primal.attention.vjp(u, self.part.start, out)
            heads = [self._turned(q, self.primal.q_norm, -1), self._turned(k, self.primal.k_norm, -1), v]
        for number, name in ((2, "v"), (0, "q"), (1, "k")):
            heads[number] = self._hooked(f"{self.i}.attn.{name}", heads[number], hook)
        present = next((part for part in heads if part is not None), None)
        if present is None:
            return []
        if len(self.layer.qkv) == 3:
            flat = [None if part is None else part.flatten(-2) for part in heads]
            return list(zip(self.layer.qkv, flat, strict=True))
        filled = [torch.zeros_like(present) if part is None else part for part in heads]
        return list(zip(self.layer.qkv, parts_of(self.layer, filled), strict=True))

    # ---- products ------------------------------------------------------------------------------

    def _product(self, dense: Dense, t: Tensor, name: str) -> Tensor:
        """Compute W t, with W the matrix of ``dense``, in the buffer ``name``."""
        weight = self._matrix(dense, t.dtype)
        dtype = weight.dtype
        out = self.buffers(name, (*t.shape[:-1], weight.shape[0]), dtype, t.device)
        torch.mm(self._rows(t, dtype), weight.T, out=out.view(-1, out.shape[-1]))
        return out if dtype == t.dtype else self.buffers(name, tuple(out.shape), t.dtype, t.device).copy_(out)

    def _add_product(self, x: Tensor, dense: Dense, t: Tensor) -> Tensor:
        """Add W t to ``x`` in place, with W the matrix of ``dense``."""
        weight = self._matrix(dense, x.dtype)
        if weight.dtype != x.dtype:
            return x.add_(self._product(dense, t, "delta"))
        rows = x.view(-1, x.shape[-1])
        torch.addmm(rows, self._rows(t, t.dtype), weight.T, out=rows)
        return x

    def _matrix(self, dense: Dense, dtype: torch.dtype) -> Tensor:
        """The matrix of ``dense``, of its own dtype, or in ``dtype`` where that makes its products faster.

        A CPU without instructions for bfloat16 takes up to a hundred times as long for a product in it.
        """
        weight = dense.weight
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or _multiplies_bfloat16():
            return weight
        return self.buffers("weight", tuple(weight.shape), dtype, weight.device).copy_(weight)

    def _rows(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The tangents of all tokens as rows of one matrix, in the dtype ``dtype``."""
        rows = t.reshape(-1, t.shape[-1])
        return rows if rows.dtype == dtype else self.buffers("rows", tuple(rows.shape), dtype, rows.device).copy_(rows)

    def _back(self, parts: list[tuple[Dense, Tensor | None]], name: str, kept: bool = False) -> Tensor | None:
        """Compute the sum of Wᵀ u over pairs of a matrix W and a cotangent u, in the buffer ``name``.

        None where every cotangent is None. ``kept``: the sum may have the dtype of the matrices.
        """
        total: Tensor | None = None
        for dense, u in parts:
            if u is None:
                continue
            weight = self._matrix(dense, u.dtype)
            shape = (*u.shape[:-1], weight.shape[1])
            rows = self._rows(u, weight.dtype)
            first = total is None
            if total is None:
                total = self.buffers(name, shape, weight.dtype if kept else u.dtype, u.device)
            if weight.dtype == total.dtype:
                into = total.view(-1, shape[-1])
                torch.mm(rows, weight, out=into) if first else torch.addmm(into, rows, weight, out=into)
            else:
                narrow = self.buffers("narrow", shape, weight.dtype, u.device)
                torch.mm(rows, weight, out=narrow.view(-1, shape[-1]))
                total.copy_(narrow) if first else total.add_(narrow)
        return total


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has a fast product of bfloat16 matrices."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
