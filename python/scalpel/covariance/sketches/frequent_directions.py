"""Frequent Directions: a sketch with a proven error bound."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .sketch import Sketch, by_gram


class FrequentDirections(Sketch):
    """Frequent Directions with the robust estimate.

    The algorithm is that of Ghashami, Liberty, Phillips & Woodruff 2016 (arXiv 1501.01711), the estimate that of Huang,
    Sun & Wang 2017 (arXiv 1705.05067, "Robust Frequent Directions").

    Whenever there are more than m = 2·rank rows, all squared lengths are reduced by that of the (m + 1)-th row, δ. With
    S = Σ (x − mean)(x − mean)ᵀ, B the directions and Δ = Σ δ:

        0 ⪯ S − BᵀB ⪯ Δ·I,   Δ ≤ (Σ_{i>k} λ_i(S)) / (m + 1 − k)  for every k ≤ m.

    Eigenvalues and ``covariance()`` are those of BᵀB + Δ/2·I, which is within Δ/2 of S in the spectral norm. All
    computation is in float64.
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
