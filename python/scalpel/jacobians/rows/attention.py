"""Causal softmax attention of a dense decoder: the primal, and products for T tangents at once.

With weights P, scores S and d the tangents (Dao et al. 2022, "FlashAttention", appendix B):
    dy_i = sum_j P_ij dS_ij v_j - (sum_j P_ij dS_ij) y_i + sum_j P_ij dv_j,  dS_ij = scale (dq_i k_j + q_i dk_j)
and backward, with u the cotangent of y:
    A_ij = scale P_ij (u_i v_j - u_i y_i),  dq_i = sum_j A_ij k_j,  dk_j = sum_i A_ij q_i,  dv_j = sum_i P_ij u_i.
Queries are processed in tiles. A tile's weights are recomputed from the log-sum-exp of each query and serve all
tangents, so no array of length x length is kept: apart from the tangents, only the scores of one tile are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hooks.positions import Selected
from ..pattern import Pattern

_TILE_NUMBERS = 1 << 21  # scores in memory at a time, over all tangents: few enough for a last-level cache


@dataclass(frozen=True)
class Mask:
    """Which keys a query may read: the tokens up to its own, within its window, that are not padding."""

    real: Tensor | None  # (B, L) bool, False at padding; None where there is no padding
    window: int | None  # how many of the latest tokens a query reads; None for all of them

    def at(self, text: int, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """Whether each query of one text of the batch may read each key, (queries, keys) bool."""
        query_positions = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key_positions = torch.arange(keys.start, keys.stop, device=device)
        allowed = key_positions <= query_positions
        if self.window is not None:
            allowed = allowed & (query_positions - key_positions < self.window)
        return allowed if self.real is None else allowed & self.real[text, keys]

    def of_queries(self, chosen: Selected, length: int, device: torch.device) -> Tensor:
        """Whether each of the ``chosen`` queries may read each key of its text, (1 or B, queries, L) bool."""
        keys = torch.arange(length, device=device)
        queries = keys if chosen is None else torch.tensor(chosen, device=device, dtype=torch.int64)
        behind = queries[:, None] - keys
        allowed = (behind >= 0) if self.window is None else (behind >= 0) & (behind < self.window)
        return allowed[None] if self.real is None else allowed & self.real[:, None, :]

    def keys_of(self, queries: slice) -> slice:
        """The range of keys that holds all that the ``queries`` of a tile may read."""
        first = 0 if self.window is None else max(0, queries.start - self.window + 1)
        return slice(first, queries.stop)


@dataclass(frozen=True)
class _Tile:
    """Some queries of the heads that share one head of k and v, in one text of the batch."""

    text: int
    kv_head: int
    heads: slice
    queries: slice
    keys: slice


class DenseAttention:
    """Attention at one input, and its products with tangents and cotangents.

    ``q`` is (B, L, heads, d), ``k`` and ``v`` are (B, L, kv_heads, d), all after the rotation of their positions. The
    output ``y`` has the shape of ``q``.
    """

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
            log_sum.masked_fill_(log_sum == -torch.inf, 0)  # a padding query that may read no key has weights 0
            self._log_sum[tile.text, tile.queries, tile.heads] = log_sum
            weights = scores.sub_(log_sum[..., None]).exp_()
            self.y[tile.text, tile.queries, tile.heads] = weights @ self.v[tile.text, tile.keys, tile.kv_head]

    def pattern(self, chosen: Selected) -> Pattern:
        """The weights of the ``chosen`` queries, written out."""
        allowed = self.mask.of_queries(chosen, self.q.shape[1], self.q.device)
        return Pattern.at(self.q, self.k, chosen, allowed, self.scale)

    def jvp(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, out: Tensor, first: int) -> Tensor:
        """Write the tangents of y to ``out`` (T, B, L - first, heads, d) and return it.

        The tangents of q, shaped as ``out``, and of k and v, (T, B, L - first, kv_heads, d), begin at token ``first``;
        those of earlier tokens are zero. None stands for a tangent that is zero at all tokens.
        """
        count, length = out.shape[0], self.q.shape[1]
        for tile in self._tiles(count, slice(first, length)):
            local_queries = slice(tile.queries.start - first, tile.queries.stop - first)
            moved_keys = slice(max(tile.keys.start, first), tile.keys.stop)
            local_keys = slice(moved_keys.start - first, moved_keys.stop - first)
            still = moved_keys.start - tile.keys.start  # keys at the head of the tile whose tangents are zero
            q, weights = self._weights(tile)  # (n, g, d), (n, g, keys)
            k, v = self.k[tile.text, tile.keys, tile.kv_head], self.v[tile.text, tile.keys, tile.kv_head]
            rows, keys = q.shape[0] * q.shape[1], k.shape[0]
            dscores = None  # (T, rows, keys): the tangents of the scores, later multiplied by the weights
            if dq is not None:
                dq_tile = dq[:, tile.text, local_queries, tile.heads].reshape(count * rows, -1)
                dscores = (dq_tile @ k.T).view(count, rows, keys)
            if dk is not None:
                dk_tile = dk[:, tile.text, local_keys, tile.kv_head].transpose(1, 2)  # (T, d, moved keys)
                flat_q = q.reshape(rows, -1).expand(count, -1, -1)
                if dscores is None:
                    dscores = q.new_zeros(count, rows, keys)
                moved_dscores = dscores[:, :, still:]
                torch.baddbmm(moved_dscores, flat_q, dk_tile, out=moved_dscores)
            dy = None
            if dscores is not None:
                dscores.mul_(weights.view(rows, keys).mul(self.scale))
                dy = (dscores.view(-1, keys) @ v).view(count, rows, -1)
                mean_dscore = dscores.sum(-1, keepdim=True)
                dy.addcmul_(mean_dscore, self.y[tile.text, tile.queries, tile.heads].reshape(rows, -1), value=-1)
            if dv is not None:
                dv_tile = dv[:, tile.text, local_keys, tile.kv_head]  # (T, moved keys, d)
                shares = weights.view(rows, keys)[:, still:].expand(count, -1, -1)
                dy = torch.bmm(shares, dv_tile) if dy is None else torch.baddbmm(dy, shares, dv_tile, out=dy)
            out_tile = out[:, tile.text, local_queries, tile.heads]
            out_tile.copy_(dy.view(out_tile.shape)) if dy is not None else out_tile.zero_()
        return out

    def vjp(self, u: Tensor, first: int = 0, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cotangents of q, k and v at tokens ``first`` … stop - 1, given that of y there.

        ``u`` is (T, B, stop - first, heads, d), and the cotangent of y is zero from token ``stop`` on. What it is
        before ``first`` doesn't matter: those queries read no key from ``first`` on. The cotangents of keys and values
        before ``first`` are left out, though the queries read them. ``out``: memory for the three results, which may
        hold anything.
        """
        count, batch, tokens = u.shape[:3]
        queries = slice(first, first + tokens)
        of_keys = (count, batch, tokens, *self.k.shape[2:])
        dq, dk, dv = out or (torch.empty_like(u), u.new_empty(of_keys), u.new_empty(of_keys))
        several = next(self._query_ranges(count, queries)).stop < queries.stop
        if several:
            dk.zero_()
            dv.zero_()
        for tile in self._tiles(count, queries):
            local_queries = slice(tile.queries.start - first, tile.queries.stop - first)
            wanted_keys = slice(max(tile.keys.start, first), tile.keys.stop)
            local_keys = slice(wanted_keys.start - first, wanted_keys.stop - first)
            before = wanted_keys.start - tile.keys.start  # keys at the head of the tile that come before ``first``
            q, weights = self._weights(tile)
            k, v = self.k[tile.text, tile.keys, tile.kv_head], self.v[tile.text, tile.keys, tile.kv_head]
            rows, keys = q.shape[0] * q.shape[1], k.shape[0]
            y = self.y[tile.text, tile.queries, tile.heads].reshape(rows, -1)
            dq_tile = dq[:, tile.text, local_queries, tile.heads]
            flat_u = u[:, tile.text, local_queries, tile.heads].reshape(count * rows, -1)
            u_tile = flat_u.view(count, rows, -1)
            flat_weights = weights.view(rows, keys)
            dscores = (flat_u @ v.T).view(count, rows, keys)
            dscores.sub_(torch.einsum("trd,rd->tr", u_tile, y)[..., None]).mul_(flat_weights.mul(self.scale))
            dq_tile.copy_((dscores.view(-1, keys) @ k).view(dq_tile.shape))
            flat_q = q.reshape(rows, -1)
            for whole, part in (
                (dk, dscores[:, :, before:].transpose(1, 2) @ flat_q),
                (dv, flat_weights[:, before:].T @ u_tile),
            ):
                place = whole[:, tile.text, local_keys, tile.kv_head]
                place.add_(part) if several else place.copy_(part)
        return dq, dk, dv

    def _tiles(self, count: int, queries: slice) -> Iterator[_Tile]:
        """Cover the ``queries`` of all texts and heads with tiles that leave room for ``count`` tangents."""
        for tile_queries in self._query_ranges(count, queries):
            for text in range(self.q.shape[0]):
                for kv_head in range(self.k.shape[2]):
                    heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
                    yield _Tile(text, kv_head, heads, tile_queries, self.mask.keys_of(tile_queries))

    def _query_ranges(self, count: int, queries: slice) -> Iterator[slice]:
        start = queries.start
        while start < queries.stop:
            # A tile has about as many keys as there are tokens before it, or as its window holds.
            keys = max(1, start if self.mask.window is None else min(start, self.mask.window))
            size = max(16, int(_TILE_NUMBERS / (count * self.group * max(keys, 256))))
            stop = min(queries.stop, start + size)
            yield slice(start, stop)
            start = stop

    def _scores(self, tile: _Tile) -> Tensor:
        """The scores of a tile, (queries, heads of the group, keys); -inf where a query may not read a key."""
        q = self.q[tile.text, tile.queries, tile.heads]
        scores = (q.reshape(-1, q.shape[-1]) @ self.k[tile.text, tile.keys, tile.kv_head].T).mul_(self.scale)
        allowed = self.mask.at(tile.text, tile.queries, tile.keys, self.q.device)
        return scores.view(*q.shape[:2], -1).masked_fill_(~allowed[:, None], -torch.inf)

    def _weights(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The queries of a tile, (queries, heads of the group, d), and their weights, shaped as the scores."""
        log_sum = self._log_sum[tile.text, tile.queries, tile.heads]
        return self.q[tile.text, tile.queries, tile.heads], self._scores(tile).sub_(log_sum[..., None]).exp_()
