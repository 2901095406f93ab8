"""Causal softmax attention of a dense decoder: the primal, and products for T tangents at once.

With weights P, scores S and d the tangents (Dao et al. 2022, "FlashAttention", appendix B):
    dy_i = sum_j P_ij dS_ij v_j - (sum_j P_ij dS_ij) y_i + sum_j P_ij dv_j,  dS_ij = scale (dq_i k_j + q_i dk_j)
and backward, with u the cotangent of y:
    A_ij = scale P_ij (u_i v_j - u_i y_i),  dq_i = sum_j A_ij k_j,  dk_j = sum_i A_ij q_i,  dv_j = sum_i P_ij u_i.
Queries come in tiles, whose weights are computed again from the row's log-sum-exp and shared by all tangents: no
array of length x length is kept, and beside the tangents only one tile of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_NUMBERS = 1 << 21  # of scores at a time, all tangents together: small enough for a last-level cache


@dataclass(frozen=True)
class Mask:
    """Which keys a query may read: those up to itself, in its window, that are no padding."""

    real: Tensor | None  # (B, L) bool
    window: int | None

    def at(self, b: int, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """(queries, keys) bool."""
        i = torch.arange(queries.start, queries.stop, device=device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=device)
        allowed = j <= i
        if self.window is not None:
            allowed = allowed & (i - j < self.window)
        return allowed if self.real is None else allowed & self.real[b, keys]

    def keys_of(self, queries: slice) -> slice:
        """Those that some query of a tile may read."""
        first = 0 if self.window is None else max(0, queries.start - self.window + 1)
        return slice(first, queries.stop)


@dataclass(frozen=True)
class _Tile:
    """Some queries of the heads that share one head of k and v, in one row of the batch."""

    b: int
    kv_head: int
    heads: slice
    queries: slice
    keys: slice


class DenseAttention:
    """The primal: q (B, L, heads, d), k and v (B, L, kv_heads, d), after rotation; y as q."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> None:
        self.q, self.k, self.v = q, k, v
        self.mask = mask
        self.scale = scale
        self.group = q.shape[2] // k.shape[2]
        self.y = torch.empty_like(q)
        self._log_sum = q.new_empty(q.shape[0], q.shape[1], q.shape[2])
        for tile in self._tiles(1, slice(0, q.shape[1])):
            scores = self._scores(tile)
            log_sum = torch.logsumexp(scores, -1)
            log_sum.masked_fill_(log_sum == -torch.inf, 0)  # a padding query that may read nothing: weights 0
            self._log_sum[tile.b, tile.queries, tile.heads] = log_sum
            weights = scores.sub_(log_sum[..., None]).exp_()
            self.y[tile.b, tile.queries, tile.heads] = weights @ self.v[tile.b, tile.keys, tile.kv_head]

    def jvp(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, out: Tensor, first: int) -> Tensor:
        """Tangents of y, written to ``out`` (T, B, L - first, heads, d).

        Those of q (as out), k and v (T, B, L - first, kv_heads, d), None where they are zero, are of the
        tokens from ``first`` on; earlier ones are zero.
        """
        count, length = out.shape[0], self.q.shape[1]
        for tile in self._tiles(count, slice(first, length)):
            here = slice(tile.queries.start - first, tile.queries.stop - first)
            moved_keys = slice(max(tile.keys.start, first), tile.keys.stop)
            there = slice(moved_keys.start - first, moved_keys.stop - first)
            late = moved_keys.start - tile.keys.start
            q, weights = self._weights(tile)  # (n, g, d), (n, g, keys)
            k, v = self.k[tile.b, tile.keys, tile.kv_head], self.v[tile.b, tile.keys, tile.kv_head]
            rows, keys = q.shape[0] * q.shape[1], k.shape[0]
            move = None  # (T, rows, keys): tangents of the scores, then times the weights
            if dq is not None:
                move = (dq[:, tile.b, here, tile.heads].reshape(count * rows, -1) @ k.T).view(count, rows, keys)
            if dk is not None:
                part = dk[:, tile.b, there, tile.kv_head].transpose(1, 2)  # (T, d, moved keys)
                flat = q.reshape(rows, -1).expand(count, -1, -1)
                if move is None:
                    move = q.new_zeros(count, rows, keys)
                late_move = move[:, :, late:]
                torch.baddbmm(late_move, flat, part, out=late_move)
            y = None
            if move is not None:
                move.mul_(weights.view(rows, keys).mul(self.scale))
                y = (move.view(-1, keys) @ v).view(count, rows, -1)
                drift = move.sum(-1, keepdim=True)
                y.addcmul_(drift, self.y[tile.b, tile.queries, tile.heads].reshape(rows, -1), value=-1)
            if dv is not None:
                part = dv[:, tile.b, there, tile.kv_head]  # (T, moved keys, d)
                of_late = weights.view(rows, keys)[:, late:].expand(count, -1, -1)
                y = torch.bmm(of_late, part) if y is None else torch.baddbmm(y, of_late, part, out=y)
            into = out[:, tile.b, here, tile.heads]
            into.copy_(y.view(into.shape)) if y is not None else into.zero_()
        return out

    def vjp(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of q, k and v from that of y (T, B, stop, heads, d), which is zero from token ``stop`` on."""
        count, batch, stop = u.shape[:3]
        dq = torch.empty_like(u)
        dk = u.new_zeros(count, batch, stop, *self.k.shape[2:])
        dv = torch.zeros_like(dk)
        for tile in self._tiles(count, slice(0, stop)):
            q, weights = self._weights(tile)
            k, v = self.k[tile.b, tile.keys, tile.kv_head], self.v[tile.b, tile.keys, tile.kv_head]
            rows, keys = q.shape[0] * q.shape[1], k.shape[0]
            y = self.y[tile.b, tile.queries, tile.heads].reshape(rows, -1)
            into = dq[:, tile.b, tile.queries, tile.heads]
            part = u[:, tile.b, tile.queries, tile.heads].reshape(count, rows, -1)
            share = weights.view(rows, keys)
            back = (part.reshape(count * rows, -1) @ v.T).view(count, rows, keys)
            back.sub_((part * y).sum(-1, keepdim=True)).mul_(share.mul(self.scale))
            into.copy_((back.view(-1, keys) @ k).view(into.shape))
            flat = q.reshape(rows, -1)
            dk[:, tile.b, tile.keys, tile.kv_head] += back.transpose(1, 2) @ flat
            dv[:, tile.b, tile.keys, tile.kv_head] += share.T @ part
        return dq, dk, dv

    def _tiles(self, count: int, queries: slice) -> Iterator[_Tile]:
        for start in self._starts(count, queries):
            for b in range(self.q.shape[0]):
                for kv_head in range(self.k.shape[2]):
                    heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
                    yield _Tile(b, kv_head, heads, start, self.mask.keys_of(start))

    def _starts(self, count: int, queries: slice) -> Iterator[slice]:
        start = queries.start
        while start < queries.stop:
            # The keys of a tile are about as many as the tokens up to it.
            keys = max(1, start if self.mask.window is None else min(start, self.mask.window))
            size = max(16, int(_TILE_NUMBERS / (count * self.group * max(keys, 256))))
            stop = min(queries.stop, start + size)
            yield slice(start, stop)
            start = stop

    def _scores(self, tile: _Tile) -> Tensor:
        """(queries, heads of the group, keys), -inf where a key may not be read."""
        q = self.q[tile.b, tile.queries, tile.heads]
        scores = (q.reshape(-1, q.shape[-1]) @ self.k[tile.b, tile.keys, tile.kv_head].T).mul_(self.scale)
        allowed = self.mask.at(tile.b, tile.queries, tile.keys, self.q.device)
        return scores.view(*q.shape[:2], -1).masked_fill_(~allowed[:, None], -torch.inf)

    def _weights(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        log_sum = self._log_sum[tile.b, tile.queries, tile.heads]
        return self.q[tile.b, tile.queries, tile.heads], self._scores(tile).sub_(log_sum[..., None]).exp_()
