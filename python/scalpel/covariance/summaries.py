"""Numbers that summarize a state's spectrum, as methods; their formulas are in measures.py."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from . import measures
from .exact import Exact
from .on_device import OnDevice
from .state import State


class Summaries:
    """The methods of a StreamingCovariance that summarize its spectrum."""

    if TYPE_CHECKING:
        dim: Any
        rank: Any
        dtype: Any
        _state: State
        _reading: Any
        _directions: Any

    def explained_variance_ratio(self, k: int) -> torch.Tensor:
        """Compute the share of the total variance along each leading eigenvector.

        The sum of the k shares is what the best projection on k directions keeps (Eckart–Young). The total is exact,
        even for a sketch.

        Args:
            k: How many eigenvalues to consider.

        Returns:
            λ_i / Σ_j λ_j of the k largest eigenvalues, (k,), each in [0, 1]; zeros if nothing varies.

        Raises:
            ValueError: If k is out of range, or the state has no rows.

        Example:
            >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> scalpel.StreamingCovariance(dim=2).update(rows).explained_variance_ratio(2)
            tensor([0.9000, 0.1000], dtype=torch.float64)
        """
        k = self._directions(k)
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.explained(state.spectrum(k).values, state.total().values).to(self.dtype)

    def eigenvalues(self) -> torch.Tensor:
        """Compute all eigenvalues without their eigenvectors.

        Returns:
            The eigenvalues (dim,), in descending order and at least 0.

        Raises:
            ValueError: If the state is a sketch, or has no rows.

        Example:
            >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> scalpel.StreamingCovariance(dim=2).update(rows).eigenvalues()
            tensor([4.5000, 0.5000], dtype=torch.float64)
        """
        with self._reading():
            return self._exact("eigenvalues", "eigh()").eigenvalues().to(self.dtype)

    def effective_rank(self, of: measures.Of = "eigen") -> float:
        """Compute the exponential of the spectrum's entropy, exp(-Σ p_i ln p_i).

        While there are fewer rows than dimensions, the result cannot exceed the number of rows, and a RuntimeWarning
        says so.

        Args:
            of: "eigen" takes p_i = λ_i / Σ_j λ_j, from the eigenvalues of the covariance. "singular" takes
                p_i = √λ_i / Σ_j √λ_j, from the singular values of the data matrix, as Roy & Vetterli 2007 ("The
                effective
                rank: a measure of effective dimensionality") define it.

        Returns:
            A number in [1, dim], or 0 if nothing varies.

        Raises:
            ValueError: If of is neither, the state has no rows, or the state is a sketch, which does not know the whole
                spectrum; `effective_rank_bounds` works for both kinds.

        Example:
            >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> round(scalpel.StreamingCovariance(dim=2).update(rows).effective_rank(), 6)
            2.0
        """
        if of not in ("eigen", "singular"):
            raise ValueError(f"of is {of!r}; allowed: 'eigen', 'singular'")
        with self._reading() as state:
            exact = self._exact("effective_rank", "effective_rank_bounds()")
            self._warn_if_few(state)
            return measures.effective_rank(exact.eigenvalues(), of)

    def effective_rank_bounds(self, k: int | None = None) -> tuple[float, float]:
        """Bound `effective_rank()` from the k leading eigenvalues and the exact total variance.

        For a sketch, the bounds are as reliable as its leading eigenvalues.

        Args:
            k: How many leading eigenvalues to use; None means rank for a sketch, else min(dim, 32).

        Returns:
            The smallest and the largest value that `effective_rank()` can have.

        Raises:
            ValueError: If k is out of range, or the state has no rows.

        Example:
            >>> rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
            >>> low, high = scalpel.StreamingCovariance(dim=3, center=False).update(rows).effective_rank_bounds(k=1)
            >>> round(low, 3), round(high, 3)
            (1.607, 1.822)
        """
        k = (self.rank or min(self.dim, 32)) if k is None else self._directions(k)
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.effective_rank_bounds(state.spectrum(k).values, state.total().values, self.dim)

    def participation_ratio(self) -> float:
        """Compute (Σ λ_i)² / Σ λ_i², the participation ratio of the spectrum.

        Defined by Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement", eq. 5. It is
        computed as tr(C)² / ‖C‖², without eigenvalues. A RuntimeWarning is given while there are fewer rows than
        dimensions.

        Returns:
            A number in [1, dim], or 0 if nothing varies.

        Raises:
            ValueError: If the state is a sketch, or has no rows.

        Example:
            >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> scalpel.StreamingCovariance(dim=2).update(rows).participation_ratio()
            2.0
        """
        with self._reading() as state:
            self._exact("participation_ratio", "stable_rank()")
            self._warn_if_few(state)
            total = state.total()
            assert total.squares is not None
            return measures.participation_ratio(total.squares)

    def stable_rank(self) -> float:
        """Compute Σ λ_i / λ_1, the stable rank of the data matrix X.

        It equals ‖X‖_F² / ‖X‖₂² (Rudelson & Vershynin 2007, "Sampling from large matrices", section 1). A
        RuntimeWarning is given while there are fewer rows than dimensions.

        Returns:
            A number in [1, dim], or 0 if nothing varies.

        Raises:
            ValueError: If the state has no rows.

        Example:
            >>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> scalpel.StreamingCovariance(dim=2).update(rows).stable_rank()
            1.25
        """
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.stable_rank(float(state.spectrum(1).values[0]), state.total().values)

    def _exact(self, name: str, instead: str) -> Exact | OnDevice:
        if not isinstance(self._state, Exact | OnDevice):
            raise ValueError(
                f"{name} needs the whole spectrum, of which a sketch knows {self.rank} values; use {instead}"
            )
        return self._state

    def _warn_if_few(self, state: State) -> None:
        if state.count < state.dim:
            warnings.warn(
                f"{state.count} rows in {state.dim} dimensions: no rank exceeds the number of rows, so it is too small",
                RuntimeWarning,
                stacklevel=3,
            )
