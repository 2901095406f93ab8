"""Frequent Directions: a sketch with a proven bound."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .sketch import Sketch, by_gram


class FrequentDirections(Sketch):
    """Ghashami, Liberty, Phillips & Woodruff 2016 (arXiv 1501.01711), with the robust estimate of Huang, Sun & Wang
    2017 (arXiv 1705.05067, "Robust Frequent Directions").

    Whenever more than m = 2·rank rows are there, all squared lengths are shrunk by that of the (m + 1)-th, δ. With
    S = Σ (x − mean)(x − mean)ᵀ, B the directions and Δ = Σ δ:

        0 ⪯ S − BᵀB ⪯ Δ·I,   Δ ≤ (Σ_{i>k} λ_i(S)) / (m + 1 − k)  for every k ≤ m,

    and BᵀB + Δ/2·I, which is what eigenvalues and ``covariance()`` are of, is within Δ/2 in the spectral norm.
    All in float64.
    """

    method: ClassVar[str | None] = "frequent_directions"
    always_wide: ClassVar[bool] = True

    @property
    def added(self) -> float:
        self.fold()
        return self._kept.shrunk / 2

    def _block_rows(self) -> int:
        return max(1, self.most)

    def _compressed(self, rows: Tensor, known: int, seed: int) -> tuple[Tensor, float]:
        rows = rows.double()
        squares, turn = by_gram(rows)
        most = self.most
        dropped = float(squares[most]) if len(squares) > most else 0.0
        kept = int((squares[:most] > 0).sum())
        scale = ((squares[:kept] - dropped).clamp_min(0) / squares[:kept]).sqrt()
        return (scale[:, None] * turn[:kept]) @ rows, dropped
