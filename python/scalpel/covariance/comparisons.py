"""Two states beside each other: the angles between their leading eigenspaces, and what one has and the other lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from . import measures
from .eigen import Eigen, fix_signs


class Comparisons:
    """The methods of a StreamingCovariance that compare it with another."""

    if TYPE_CHECKING:
        center: Any
        _dtype: Any
        _check_other: Any
        _directions: Any
        _reading: Any

    def principal_angles(self, other: Self, k: int) -> torch.Tensor:
        """Measure the angles between the leading eigenspaces of two states.

        Two random spaces of k directions in dim >> k dimensions have angles near π/2.

        Args:
            other: A state of the same dim.
            k: How many leading eigenvectors of each state span its space.

        Returns:
            The k principal angles (k,) in radians, in ascending order (Björck & Golub 1973).

        Raises:
            ValueError: If dim differs, k is out of range, or either state has no rows.

        Example:
            >>> first = scalpel.StreamingCovariance(dim=2).update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
            >>> second = scalpel.StreamingCovariance(dim=2).update(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
            >>> torch.rad2deg(first.principal_angles(second, k=1))
            tensor([45.0000], dtype=torch.float64)
        """
        self._check_other(other, "compare with", same_kind=False)
        k = self._directions(k)
        with self._reading() as mine, other._reading() as theirs:
            others = theirs.spectrum(k).vectors.to(mine.device)
            return measures.principal_angles(mine.spectrum(k).vectors, others).to(self._dtype)

    def contrast(self, other: Self, k: int, ridge: float = 1e-6) -> Eigen:
        """Find the k directions in which this state varies most compared with another.

        The directions solve A v = λ (B + ε·I) v, where A and B are the two covariances and ε = ridge · tr(B) / dim
        keeps the values finite for directions that `other` lacks. (Fukunaga 1990, "Introduction to statistical pattern
        recognition", section 2.3; for centered states a relative of contrastive PCA.) Needs memory for matrices of
        dim².

        Args:
            other: A state of the same dim and center.
            k: How many directions to return.
            ridge: What is added to B, relative to its average eigenvalue.

        Returns:
            The values (k,) in descending order, which say how many times as much variance this state has in a
            direction, and the directions (k, dim) of length 1, signed as those of `eigh`; they are not orthogonal.

        Raises:
            ValueError: If dim or center differ, k is out of range, ridge is not positive, or either state has no rows.

        Example:
            >>> wide = scalpel.StreamingCovariance(dim=2).update(torch.tensor([[1.0, 4.0], [-1.0, 4.0], [0.0, -8.0]]))
            >>> round_ = scalpel.StreamingCovariance(dim=2).update(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]]))
            >>> values, directions = wide.contrast(round_, k=1)
            >>> round(float(values[0]), 3), directions[0].round(decimals=3).tolist()
            (16.0, [0.0, 1.0])
        """
        self._check_other(other, "contrast with", same_kind=False)
        if self.center != other.center:
            raise ValueError(f"other has center={other.center}, this state has center={self.center}")
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}; it must be above 0")
        k = self._directions(k)
        with self._reading() as mine, other._reading() as theirs:
            against = theirs.covariance().to(mine.device)
            values, vectors = measures.contrast(mine.covariance(), against, k, ridge)
        return Eigen(values.to(self._dtype), fix_signs(vectors.to(self._dtype)))
