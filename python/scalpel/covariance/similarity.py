"""How similar two representations of the same rows are."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from .rows import rows_of


class _Block(NamedTuple):
    """The unbiased HSIC of a block: of x with y, of x with itself, and of y with itself."""

    xy: float
    xx: float
    yy: float


class DebiasedCKA:
    """Compare two representations x (n, p) and y (n, q) of the same n rows by debiased linear CKA, in blocks.

    CKA, centered kernel alignment, is HSIC₁(K, L) / √(HSIC₁(K, K) · HSIC₁(L, L)), where K = x xᵀ and L = y yᵀ without
    their diagonals, with the unbiased estimator

        HSIC₁(K, L) = [tr(KL) + (1ᵀK1)(1ᵀL1) / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3))

    of Song et al. 2012 ("Feature selection via dependence maximization", eq. 5), averaged over blocks (Nguyen, Raghu &
    Kornblith 2021, arXiv 2010.15327, eq. 3), so that it does not depend on the size of a block. Without the correction,
    two independent representations with more columns than rows score near 1 (Kornblith et al. 2019). The value is 1 for
    y = s·xR + c with R orthogonal, near 0 for independent representations, and can be below 0 by chance.

    Memory is three numbers per block. All computation is in float64.

    Example:
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> cka = scalpel.covariance.DebiasedCKA().update(x, 2 * x + 1)
        >>> round(cka.value, 6)
        1.0
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._scales = (1.0, 1.0)  # powers of two that divide x and y, so that products stay in float64's range

    def update(self, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Self:
        """Add a block of rows, in time n²(p + q).

        Args:
            x: The first representation, (..., p), of at least 4 rows.
            y: The second representation of the same rows, (..., q).

        Returns:
            This object.

        Raises:
            ValueError: If there are fewer than 4 rows, the numbers of rows differ, or a value is not finite.

        Example:
            >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
            >>> scalpel.covariance.DebiasedCKA().update(x, x).update(x, -x).blocks
            2
        """
        rows = [rows_of(side, side.shape[-1] if side.ndim else 1).double() for side in (x, y)]
        n = len(rows[0])
        if len(rows[1]) != n:
            raise ValueError(f"x has {n} rows and y has {len(rows[1])}; they must be the same rows")
        if n < 4:
            raise ValueError(f"a block has {n} rows; the unbiased estimate needs at least 4")
        for name, side in zip("xy", rows, strict=True):
            if not bool(side.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite")
        # HSIC does not depend on the means, and without them no digits are lost.
        rows = [side - side.mean(dim=0) for side in rows]
        if not self._blocks:
            self._scales = (_scale(rows[0]), _scale(rows[1]))
        K, L = (_inner(side / scale) for side, scale in zip(rows, self._scales, strict=True))
        self._blocks.append(_Block(_hsic(K, L), _hsic(K, K), _hsic(L, L)))
        return self

    def merge(self, other: DebiasedCKA) -> Self:
        """Add the blocks of another comparison.

        Args:
            other: A comparison of the same two representations on other rows.

        Returns:
            This object.

        Example:
            >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
            >>> cka = scalpel.covariance.DebiasedCKA().update(x, x)
            >>> cka.merge(scalpel.covariance.DebiasedCKA().update(x, x)).blocks
            2
        """
        if not self._blocks:
            self._scales = other._scales
        x, y = ((theirs / ours) ** 2 for theirs, ours in zip(other._scales, self._scales, strict=True))
        self._blocks += [_Block(xy * x * y, xx * x * x, yy * y * y) for xy, xx, yy in other._blocks]
        return self

    @property
    def blocks(self) -> int:
        """The number of blocks seen so far."""
        return len(self._blocks)

    @property
    def value(self) -> float:
        """The similarity over all blocks; NaN where a representation does not vary.

        Raises:
            ValueError: If there are no blocks.
        """
        if not self._blocks:
            raise ValueError("there are no rows yet; call update first")
        return _ratio(self._blocks)

    def interval(self) -> tuple[float, float]:
        """Compute a 95 % interval by leaving out one block at a time; see `leave_one_out`.

        Returns:
            The lower and the upper end of the interval.

        Raises:
            ValueError: If there are fewer than two blocks.

        Example:
            >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
            >>> low, high = scalpel.covariance.DebiasedCKA().update(x, x).update(x, -x).interval()
            >>> round(low, 6), round(high, 6)
            (1.0, 1.0)
        """
        g = len(self._blocks)
        if g < 2:
            raise ValueError(f"there are {g} blocks; leaving one out needs at least two")
        left_out = np.array([_ratio(self._blocks[:i] + self._blocks[i + 1 :]) for i in range(g)])
        half = float(stdtrit(g - 1, 0.975)) * math.sqrt((g - 1) * float(left_out.var()))
        return self.value - half, self.value + half


def _inner(rows: Tensor) -> Tensor:
    return (rows @ rows.T).fill_diagonal_(0.0)


def _hsic(K: Tensor, L: Tensor) -> float:
    n = len(K)
    sums = K.sum(dim=0), L.sum(dim=0)
    estimate = (K * L).sum() + sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums[0] @ sums[1])
    return float(estimate) / (n * (n - 3))


def _ratio(blocks: list[_Block]) -> float:
    xy, xx, yy = (sum(column) for column in zip(*blocks, strict=True))
    return xy / (math.sqrt(xx) * math.sqrt(yy)) if xx > 0 and yy > 0 else math.nan


def _scale(rows: Tensor) -> float:
    largest = float(rows.abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
