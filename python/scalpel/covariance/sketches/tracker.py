"""The tracker: a sketch with the smaller error in practice, and without a proven bound."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .sketch import Sketch, by_gram

_PROBES = 16  # random combinations of rows, in addition to the known directions


class Tracker(Sketch):
    """The leading directions, followed from block to block.

    The known directions and the new rows form one matrix M. Its range is approximated by the images of the known
    directions and of a few random combinations Y of its rows, Q = orth(M Yᵀ), and the longest 2·rank directions of QᵀM
    are kept (the range finder of Halko, Martinsson & Tropp 2011, "Finding structure with randomness", section 4,
    started from the known directions). Nothing is shrunk, unlike in Frequent Directions. If the rows come in an
    adversarial order, a direction that grows slowly may be missed, and no bound says by how much. Products have the
    precision of the rows, at least float32.
    """

    method: ClassVar[str | None] = "tracker"

    def _compressed(self, rows: Tensor, known: int, seed: int) -> tuple[Tensor, float]:
        most = self.most
        if len(rows) <= 2 * most + _PROBES:
            squares, turn = by_gram(rows)
            kept = int((squares[:most] > 0).sum())
            return turn[:kept] @ rows.double(), 0.0
        # Seeded by the number of rows so far, so that a resumed sketch draws the same numbers as an uninterrupted one.
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randn(
            max(0, most - known) + _PROBES, len(rows), generator=generator, dtype=rows.dtype, device="cpu"
        )
        projected = torch.linalg.qr(_taken_to(rows, known, mixed @ rows)).Q.T @ rows
        squares, turn = by_gram(projected)
        kept = int((squares[:most] > 0).sum())
        return (turn[:kept].to(rows.dtype) @ projected).double(), 0.0


def _taken_to(rows: Tensor, known: int, probes: Tensor) -> Tensor:
    """Multiply the rows by the known directions, at length 1, and by what the probes add to these: (n, width).

    The known directions are the first rows and orthogonal, so their products with each other are a diagonal.
    """
    lengths = torch.linalg.vector_norm(rows[:known], dim=1)
    some = lengths > 0
    unit = rows[:known][some] / lengths[some, None]
    for _ in range(2):  # one pass is not accurate enough in float32
        probes = probes - (probes @ unit.T) @ unit
    probes = torch.linalg.qr(probes.T).Q.T
    taken = rows.new_zeros(len(rows), len(unit) + len(probes))
    taken[:known][some, torch.arange(len(unit), device=rows.device)] = lengths[some]
    taken[:known, len(unit) :] = rows[:known] @ probes.T
    torch.mm(rows[known:], torch.cat([unit, probes]).T, out=taken[known:])
    return taken
