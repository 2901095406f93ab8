"""One layer of a dense decoder on T tangents (T, B, tokens, width): forward, and the adjoint.

``hook(name, value)`` sees every hook's tangent, None where nothing has moved yet, and gives what goes on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.decoders.decoder import Decoder, DecoderLayer, Dense
from .primal import DensePrimal, Places, heads_of, parts_of
from .rules import DenseNorm, rotate

Hook = Callable[[str, Tensor | None], Tensor | None]


class Buffers:
    """Memory for intermediate values by name, used again by every layer: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = int(torch.Size(shape).numel())
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size or kept.device != device:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


class DenseLayer:
    """The rules of layer ``i`` at its primal. ``part``: the tokens that tangents have."""

    def __init__(
        self,
        decoder: Decoder,
        i: int,
        layer: DecoderLayer,
        primal: DensePrimal,
        places: Places,
        part: slice,
        buffers: Buffers,
    ) -> None:
        self.config = decoder.config
        self.i = i
        self.layer = layer
        self.primal = primal
        self.places = places.rows(part)
        self.part = part
        self.buffers = buffers

    # ---- forward -------------------------------------------------------------------------------

    def push(self, x: Tensor | None, hook: Hook, watched: set[str]) -> Tensor | None:
        """The tangent of the residual stream after the layer, from that before it, which is overwritten."""
        at, layer, primal = f"{self.i}.", self.layer, self.primal
        x = hook(f"{at}resid_in", x)
        read = hook(f"{at}attn.act_in", None if x is None else self._normed(primal.norm1, x))
        y = hook(f"{at}attn.y", self._attended(read, hook))
        after = self._joined(x, layer.out, y, f"{at}attn.resid_delta", hook, watched)
        if self.config.parallel:
            return self._mlp(x, after, hook, watched)
        after = hook(f"{at}resid_mid", after)
        return self._mlp(after, after, hook, watched)

    def _mlp(self, middle: Tensor | None, after: Tensor | None, hook: Hook, watched: set[str]) -> Tensor | None:
        at, layer, primal = f"{self.i}.", self.layer, self.primal
        read = hook(f"{at}mlp.act_in", None if middle is None else self._normed(primal.norm2, middle))
        neurons = None
        if read is not None:
            neurons = self._product(layer.up[0], read, "neurons").mul_(primal.slope[:, self.part])
            if primal.opened is not None:
                beside = self._product(layer.up[1], read, "beside")
                neurons.addcmul_(beside, primal.opened[:, self.part])
        neurons = hook(f"{at}mlp.post_act", neurons)
        return self._joined(after, layer.down, neurons, f"{at}mlp.resid_delta", hook, watched)

    def _normed(self, norm: DenseNorm, x: Tensor) -> Tensor:
        out = self.buffers("read", tuple(x.shape), x.dtype, x.device)
        return norm.rows(self.part).jvp(x, out)

    def _attended(self, read: Tensor | None, hook: Hook) -> Tensor | None:
        heads: list[Tensor | None] = [None, None, None]
        if read is not None:
            parts = [self._product(dense, read, f"qkv{n}") for n, dense in enumerate(self.layer.qkv)]
            heads = list(heads_of(self.config, self.layer, parts))
        for n, name in ((1, "k"), (0, "q"), (2, "v")):
            heads[n] = self._hooked(f"{self.i}.attn.{name}", heads[n], hook)
        q, k, v = heads
        present = next((part for part in heads if part is not None), None)
        if present is None:
            return None
        q = self._turned(q, self.primal.q_norm, 1)
        k = self._turned(k, self.primal.k_norm, 1)
        shape = (*present.shape[:3], self.config.heads, self.config.head_dim)
        y = self.buffers("y", shape, present.dtype, present.device)
        return self.primal.attention.jvp(q, k, v, y, self.part.start).flatten(-2)

    def _turned(self, x: Tensor | None, norm: DenseNorm | None, way: int) -> Tensor | None:
        """Through a head's norm and the rotation, or back through them (way -1)."""
        if x is None:
            return None
        if norm is not None and way > 0:
            x = norm.rows(self.part).jvp(x, x)
        if self.places.cosine is not None and self.places.sine is not None:
            x = rotate(x, self.places.cosine, way * self.places.sine)
        return norm.rows(self.part).vjp(x) if norm is not None and way < 0 else x

    def _hooked(self, name: str, heads: Tensor | None, hook: Hook) -> Tensor | None:
        """q, k or v as the hook sees them: the heads side by side."""
        flat = hook(name, None if heads is None else heads.flatten(-2))
        return None if flat is None else flat.unflatten(-1, (-1, self.config.head_dim))

    def _joined(
        self, x: Tensor | None, dense: Dense, t: Tensor | None, name: str, hook: Hook, watched: set[str]
    ) -> Tensor | None:
        """Add the product, which is the value of the hook ``name``, to x."""
        if name not in watched and t is not None and x is not None and not self._kept_apart(name):
            return self._add_product(x, dense, t)
        delta = hook(name, None if t is None else self._product(dense, t, name.partition(".")[2]))
        if x is None or delta is None:
            return x if delta is None else delta.clone()
        return x + delta if self._kept_apart(name) else x.add_(delta)

    def _kept_apart(self, name: str) -> bool:
        """Whether x is read again after the sum."""
        return self.config.parallel and name.endswith("attn.resid_delta")

    # ---- backward ------------------------------------------------------------------------------

    def pull(self, x: Tensor | None, hook: Hook) -> Tensor | None:
        """The cotangent of the residual stream before the layer, from that after it."""
        at, layer, primal = f"{self.i}.", self.layer, self.primal
        u = hook(f"{at}mlp.resid_delta", x)
        neurons = hook(f"{at}mlp.post_act", self._back([(layer.down, u)]))
        parts: list[tuple[Dense, Tensor | None]] = []
        if neurons is not None:
            parts.append((layer.up[0], neurons * primal.slope[:, self.part]))
            if primal.opened is not None:
                parts.append((layer.up[1], neurons * primal.opened[:, self.part]))
        read = hook(f"{at}mlp.act_in", self._back(parts))
        from_mlp = None if read is None else primal.norm2.rows(self.part).vjp(read)
        if self.config.parallel:
            delta, resid = x, _sum(x, from_mlp)
        else:
            delta = resid = hook(f"{at}resid_mid", _sum(x, from_mlp))
        u = hook(f"{at}attn.resid_delta", delta)
        y = hook(f"{at}attn.y", self._back([(layer.out, u)]))
        read = hook(f"{at}attn.act_in", self._back(self._attended_back(y, hook)))
        from_attention = None if read is None else primal.norm1.rows(self.part).vjp(read)
        return hook(f"{at}resid_in", _sum(resid, from_attention))

    def _attended_back(self, y: Tensor | None, hook: Hook) -> list[tuple[Dense, Tensor | None]]:
        heads: list[Tensor | None] = [None, None, None]
        if y is not None:
            q, k, v = self.primal.attention.vjp(y.unflatten(-1, (self.config.heads, -1)))
            heads = [self._turned(q, self.primal.q_norm, -1), self._turned(k, self.primal.k_norm, -1), v]
        for n, name in ((2, "v"), (0, "q"), (1, "k")):
            heads[n] = self._hooked(f"{self.i}.attn.{name}", heads[n], hook)
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
        """W t, in a buffer of that name."""
        kind = dense.weight.dtype
        out = self.buffers(name, (*t.shape[:-1], dense.weight.shape[0]), kind, t.device)
        torch.mm(self._rows(t, kind), dense.weight.T, out=out.view(-1, out.shape[-1]))
        return out if kind == t.dtype else self.buffers(name, tuple(out.shape), t.dtype, t.device).copy_(out)

    def _add_product(self, x: Tensor, dense: Dense, t: Tensor) -> Tensor:
        """Add W t to x in place."""
        if dense.weight.dtype != x.dtype:
            return x.add_(self._product(dense, t, "delta"))
        rows = x.view(-1, x.shape[-1])
        torch.addmm(rows, self._rows(t, t.dtype), dense.weight.T, out=rows)
        return x

    def _rows(self, t: Tensor, kind: torch.dtype) -> Tensor:
        rows = t.reshape(-1, t.shape[-1])
        return rows if rows.dtype == kind else self.buffers("rows", tuple(rows.shape), kind, rows.device).copy_(rows)

    def _back(self, parts: list[tuple[Dense, Tensor | None]]) -> Tensor | None:
        """The sum of transposed products; None where there is nothing to add."""
        total: Tensor | None = None
        for dense, u in parts:
            if u is not None:
                kind = dense.weight.dtype
                back = (u.reshape(-1, u.shape[-1]).to(kind) @ dense.weight).to(u.dtype)
                back = back.view(*u.shape[:-1], -1)
                total = back if total is None else total.add_(back)
        return total


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
