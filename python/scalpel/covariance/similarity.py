"""How alike two representations of the same rows are."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from .rows import rows_of


class _Block(NamedTuple):
    """The unbiased HSIC of a block: of x with y, of x with itself, of y with itself."""

    xy: float
    xx: float
    yy: float


class DebiasedCKA:
    """Debiased linear centered kernel alignment of x (n, p) and y (n, q), the same n rows seen twice, in blocks.

    CKA = HSIC₁(K, L) / √(HSIC₁(K, K) · HSIC₁(L, L)), K = x xᵀ and L = y yᵀ without their diagonals, with the unbiased
    estimator

        HSIC₁(K, L) = [tr(KL) + (1ᵀK1)(1ᵀL1) / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3))

    of Song et al. 2012 ("Feature selection via dependence maximization", eq. 5), averaged over blocks (Nguyen, Raghu &
    Kornblith 2021, arXiv 2010.15327, eq. 3), so that it doesn't depend on the size of a block. Without the correction,
    two independent representations of more columns than rows come out near 1 (Kornblith et al. 2019). It is 1 for
    y = s·xR + c with R orthogonal, near 0 for independent ones, and can be below 0 by chance.

    Memory: three numbers a block. Everything is float64.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._scales = (1.0, 1.0)  # powers of two that x and y are divided by, so that nothing leaves float64's range

    def update(self, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Self:
        """Adds a block of at least 4 rows: x (..., p) and y (..., q), row by row the same. Time n²(p + q).

        ValueError for fewer rows, for different numbers of them, or for values that are not finite.
        """
        rows = [rows_of(each, each.shape[-1] if each.ndim else 1).double() for each in (x, y)]
        n = len(rows[0])
        if len(rows[1]) != n:
            raise ValueError(f"x has {n} rows and y {len(rows[1])}; row by row they must be the same")
        if n < 4:
            raise ValueError(f"a block has {n} rows; the unbiased estimate takes 4 or more")
        for name, each in zip("xy", rows, strict=True):
            if not bool(each.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite")
        # centring changes no HSIC, and keeps the digits where means are large
        rows = [each - each.mean(dim=0) for each in rows]
        if not self._blocks:
            self._scales = (_scale(rows[0]), _scale(rows[1]))
        K, L = (_inner(each / scale) for each, scale in zip(rows, self._scales, strict=True))
        self._blocks.append(_Block(_hsic(K, L), _hsic(K, K), _hsic(L, L)))
        return self

    def merge(self, other: DebiasedCKA) -> Self:
        """Adds the blocks of `other`; returns self."""
        if not self._blocks:
            self._scales = other._scales
        x, y = ((theirs / ours) ** 2 for theirs, ours in zip(other._scales, self._scales, strict=True))
        self._blocks += [_Block(xy * x * y, xx * x * x, yy * y * y) for xy, xx, yy in other._blocks]
        return self

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._blocks)

    @property
    def value(self) -> float:
        """NaN where a representation doesn't vary. ValueError without blocks."""
        if not self._blocks:
            raise ValueError("there are no rows yet: update it first")
        return _ratio(self._blocks)

    def interval(self) -> tuple[float, float]:
        """95 %, by leaving one block out; see `intervals.leave_one_out`. ValueError of fewer than two blocks."""
        g = len(self._blocks)
        if g < 2:
            raise ValueError(f"there are {g} blocks; leaving one out takes two or more")
        left_out = np.array([_ratio(self._blocks[:i] + self._blocks[i + 1 :]) for i in range(g)])
        half = float(stdtrit(g - 1, 0.975)) * math.sqrt((g - 1) * float(left_out.var()))
        return self.value - half, self.value + half


def _inner(rows: Tensor) -> Tensor:
    return (rows @ rows.T).fill_diagonal_(0.0)


def _hsic(K: Tensor, L: Tensor) -> float:
    n = len(K)
    sums = K.sum(dim=0), L.sum(dim=0)
    found = (K * L).sum() + sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums[0] @ sums[1])
    return float(found) / (n * (n - 3))


def _ratio(blocks: list[_Block]) -> float:
    xy, xx, yy = (sum(column) for column in zip(*blocks, strict=True))
    return xy / (math.sqrt(xx) * math.sqrt(yy)) if xx > 0 and yy > 0 else math.nan


def _scale(rows: Tensor) -> float:
    largest = float(rows.abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
