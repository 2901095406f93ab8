"""The tracker: a sketch without a bound, and with a smaller error in practice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .sketch import Sketch, by_gram

_PROBES = 16  # random combinations of rows, beside the directions that are known


class Tracker(Sketch):
    """The leading directions, followed from block to block.

    The known directions and the new rows are one matrix M. Its range is looked for where M takes the known directions
    and a few random combinations of its rows, Q = orth(M Yᵀ), and of QᵀM the longest 2·rank directions are kept (the
    range finder of Halko, Martinsson & Tropp 2011, "Finding structure with randomness", section 4, begun from what is
    known). Nothing is shrunk as in Frequent Directions: of rows in an order chosen against it, it may miss a direction
    that grows slowly, and no bound says by how much. Products have the precision of the rows, at least float32.
    """

    method: ClassVar[str | None] = "tracker"

    def _compressed(self, rows: Tensor, known: int, seed: int) -> tuple[Tensor, float]:
        most = self.most
        if len(rows) <= 2 * most + _PROBES:
            squares, turn = by_gram(rows)
            kept = int((squares[:most] > 0).sum())
            return turn[:kept] @ rows.double(), 0.0
        # Seeded by how many rows there were, so that a resumed sketch draws what an uninterrupted one does.
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randn(max(0, most - known) + _PROBES, len(rows), generator=generator, dtype=rows.dtype)
        Y = _with_probes(rows[:known], mixed @ rows)
        found = torch.linalg.qr(rows @ Y.T).Q.T @ rows
        squares, turn = by_gram(found)
        kept = int((squares[:most] > 0).sum())
        return (turn[:kept].to(rows.dtype) @ found).double(), 0.0


def _with_probes(known: Tensor, probes: Tensor) -> Tensor:
    """The known directions at length 1 (they are orthogonal), and what probes add to them, orthonormal."""
    lengths = torch.linalg.vector_norm(known, dim=1, keepdim=True)
    unit = known[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    for _ in range(2):  # once is not enough in float32
        probes = probes - (probes @ unit.T) @ unit
    return torch.cat([unit, torch.linalg.qr(probes.T).Q.T])
