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
        mixed = torch.randn(
            max(0, most - known) + _PROBES, len(rows), generator=generator, dtype=rows.dtype, device="cpu"
        )
        found = torch.linalg.qr(_taken_to(rows, known, mixed @ rows)).Q.T @ rows
        squares, turn = by_gram(found)
        kept = int((squares[:most] > 0).sum())
        return (turn[:kept].to(rows.dtype) @ found).double(), 0.0


def _taken_to(rows: Tensor, known: int, probes: Tensor) -> Tensor:
    """Where the rows take the known directions, at length 1, and what probes add to these: (n, width).

    The known directions are the first rows, and orthogonal: they take each other to nothing, and only a diagonal.
    """
    lengths = torch.linalg.vector_norm(rows[:known], dim=1)
    some = lengths > 0
    unit = rows[:known][some] / lengths[some, None]
    for _ in range(2):  # once is not enough in float32
        probes = probes - (probes @ unit.T) @ unit
    probes = torch.linalg.qr(probes.T).Q.T
    taken = rows.new_zeros(len(rows), len(unit) + len(probes))
    taken[:known][some, torch.arange(len(unit), device=rows.device)] = lengths[some]
    taken[:known, len(unit) :] = rows[:known] @ probes.T
    torch.mm(rows[known:], torch.cat([unit, probes]).T, out=taken[known:])
    return taken
