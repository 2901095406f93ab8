"""The weights of softmax attention as a target: their values at chosen queries, and products with tangents.

With weights P, scores S and d the tangents:
    dP_ij = P_ij (dS_ij - sum_k P_ik dS_ik),  dS_ij = scale (dq_i k_j + q_i dk_j)
and backward, with u the cotangent of P:
    A_ij = scale P_ij (u_ij - sum_k P_ik u_ik),  dq_i = sum_j A_ij k_j,  dk_j = sum_i A_ij q_i.
A sink is one more key, whose score is fixed and whose weight is left out: the sums run over the other keys, and a row
of P adds up to less than 1. Only the chosen queries are computed, so the largest array has the size of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hooks.positions import Selected, read_at

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern:
    """The weights of chosen queries at one input.

    Attributes:
        q: (B, queries, kv_heads, heads of the group, d), of the chosen queries alone.
        k: (B, L, kv_heads, d).
        weights: (B, queries, kv_heads, heads of the group, L); zero at keys that a query may not read.
        queries: The chosen tokens, in the order given.
        scale: The factor of the scores.
    """

    q: Tensor
    k: Tensor
    weights: Tensor
    queries: Sequence[int]
    scale: float

    @classmethod
    def at(
        cls, q: Tensor, k: Tensor, chosen: Selected, allowed: Tensor, scale: float, sink: Tensor | None = None
    ) -> Pattern:
        """Compute the weights of the queries ``chosen``; None stands for all.

        Args:
            q: (B, L, heads, d), with the heads that share a head of k side by side.
            k: (B, L, kv_heads, d).
            chosen: The queries.
            allowed: (1 or B, chosen queries, L) bool: the keys that each of them may read. A query without any has
                weights of zero.
            scale: The factor of the scores.
            sink: (heads,) the logit of one more key, whose weight is left out; None for none.
        """
        q = read_at(q, chosen).unflatten(-2, (k.shape[2], -1))
        reads = allowed[:, :, None, None, :]
        scores = torch.einsum("bnhgd,blhd->bnhgl", q, k).mul_(scale).masked_fill_(~reads, -torch.inf)
        if sink is None:
            weights = scores.softmax(-1).masked_fill_(~reads, 0.0)
        else:
            column = sink.to(scores.dtype).view(k.shape[2], -1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([column, scores], -1).softmax(-1)[..., 1:]
        queries = range(k.shape[1]) if chosen is None else chosen
        return cls(q, k, weights, queries, scale)

    @property
    def value(self) -> Tensor:
        """The weights as a hook records them: (B, queries, heads * L), those of a query's heads side by side."""
        return self.weights.flatten(-3)

    def jvp(self, dq: Tensor | None, dk: Tensor | None, first: int = 0) -> Tensor:
        """Carry tangents to the weights of the chosen queries, (T, B, queries, heads * L).

        The tangents of q, (T, B, L - first, heads, d), and of k, (T, B, L - first, kv_heads, d), begin at token
        ``first``; those of earlier tokens are zero. None stands for zero at all tokens; one of them must be given.
        """
        moved = None
        if dq is not None:
            late = [place for place, query in enumerate(self.queries) if query >= first]
            rows = dq[:, :, [self.queries[place] - first for place in late]].unflatten(-2, (self.k.shape[2], -1))
            products = torch.einsum("tbnhgd,blhd->tbnhgl", rows, self.k)
            if len(late) == len(self.queries):
                moved = products
            else:
                moved = products.new_zeros(len(dq), *self.weights.shape)
                moved[:, :, late] = products
        if dk is not None:
            products = torch.einsum("bnhgd,tblhd->tbnhgl", self.q, dk)
            if moved is None and not first:
                moved = products
            else:
                if moved is None:
                    moved = products.new_zeros(len(dk), *self.weights.shape)
                moved[..., first:] += products
        assert moved is not None
        return self._through_softmax(moved).flatten(-3)

    def vjp(self, u: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Carry cotangents of the weights, (T, B, queries, heads * L), back to q and k.

        Returns those of q, (T, B, stop, heads, d), and of k, (T, B, stop, kv_heads, d). No query is chosen from token
        ``stop`` on, so those of later tokens are zero.
        """
        scores = self._through_softmax(u.unflatten(-1, self.weights.shape[-3:]).clone())
        rows = torch.einsum("tbnhgl,blhd->tbnhgd", scores, self.k).flatten(-3, -2)
        dq = rows.new_zeros(*rows.shape[:2], stop, *rows.shape[3:])
        dq[:, :, list(self.queries)] = rows
        return dq, torch.einsum("tbnhgl,bnhgd->tblhd", scores[..., :stop], self.q)

    def _through_softmax(self, scores: Tensor) -> Tensor:
        """Multiply ``scores`` by the derivative of softmax, which is symmetric, and by the scale, in place."""
        mean = (scores * self.weights).sum(-1, keepdim=True)
        return scores.sub_(mean).mul_(self.weights * self.scale)
