"""The tracker: a sketch without a bound, and with a smaller error in practice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .sketch import Sketch, by_gram

_PROBES = 16  # random directions of the new rows, beside the directions that are known
_ROUNDS = 2


class Tracker(Sketch):
    """The leading directions, followed from block to block by block power iteration.

    The known directions and the new rows are one matrix M; its leading right singular vectors are looked for from the
    known directions and a few random combinations of rows, ``Y ← orth(M Mᵀ Y)`` (Halko, Martinsson & Tropp 2011,
    "Finding structure with randomness", algorithm 4.4), and M's projection on them is what is kept. Nothing is
    subtracted as in Frequent Directions: on rows that come in an order chosen against it, it may miss a direction that
    grows slowly, and no bound says by how much. Products have the precision of the rows, at least float32.
    """

    method: ClassVar[str | None] = "tracker"

    def _compressed(self, parts: list[Tensor], count: int) -> tuple[Tensor, float]:
        dtype = torch.float64 if all(part.dtype == torch.float64 for part in parts) else torch.float32
        rows = torch.cat([part.to(dtype) for part in parts])
        most = self.most
        if len(rows) <= 2 * most + _PROBES:
            squares, turn = by_gram(rows)
            kept = int((squares[:most] > 0).sum())
            return turn[:kept] @ rows.double(), 0.0
        known = parts[0][:most].to(dtype) if len(parts) > 1 else rows[:0]
        # Seeded by what came before, so that a resumed sketch draws what an uninterrupted one does.
        generator = torch.Generator().manual_seed(count)
        mixed = torch.randn(most + _PROBES - len(known), len(rows), generator=generator, dtype=dtype)
        Q = _orthonormal(torch.cat([known, mixed @ rows]))
        for _ in range(_ROUNDS - 1):
            Q = _orthonormal((rows @ Q.T).T @ rows)
        projected = rows @ Q.T
        squares, turn = by_gram(projected.T)  # M Qᵀ has M's singular values; its right vectors turn Q
        return (squares[:most].sqrt()[:, None] * turn[:most]) @ Q.double(), 0.0


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T
