"""Numbers that sum a state's spectrum up, as methods; their formulas are in measures.py."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from . import measures
from .exact import Exact
from .on_device import OnDevice
from .state import State


class Summaries:
    """What a StreamingCovariance says of its spectrum."""

    if TYPE_CHECKING:
        dim: Any
        rank: Any
        dtype: Any
        _state: State
        _reading: Any
        _directions: Any

    def explained_variance_ratio(self, k: int) -> torch.Tensor:
        """(k,): λ_i / Σ_j λ_j of the k largest eigenvalues, each in [0, 1]; zeros if nothing varies.

        Its sum is what the best projection on k directions keeps (Eckart–Young). The total is exact for a sketch, too.
        Raises as `eigh`.
        """
        k = self._directions(k)
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.explained(state.spectrum(k).values, state.total().values).to(self.dtype)

    def eigenvalues(self) -> torch.Tensor:
        """(dim,), descending, at least 0: all, without their vectors. ValueError of a sketch, and without rows."""
        with self._reading():
            return self._exact("eigenvalues", "eigh()").eigenvalues().to(self.dtype)

    def effective_rank(self, of: measures.Of = "eigen") -> float:
        """exp(-Σ p_i ln p_i), in [1, dim]; 0 if nothing varies.

        of="eigen": p_i = λ_i / Σ_j λ_j, the eigenvalues of the covariance.
        of="singular": p_i = √λ_i / Σ_j √λ_j, the singular values of the data matrix, as Roy & Vetterli 2007
        ("The effective rank: a measure of effective dimensionality") define it.

        A sketch doesn't know the whole spectrum: ValueError, see `effective_rank_bounds`. RuntimeWarning while there
        are fewer rows than dimensions: it can't exceed the number of rows then.
        """
        if of not in ("eigen", "singular"):
            raise ValueError(f"of is {of!r}; allowed: 'eigen', 'singular'")
        with self._reading() as state:
            exact = self._exact("effective_rank", "effective_rank_bounds()")
            self._warn_if_few(state)
            return measures.effective_rank(exact.eigenvalues(), of)

    def effective_rank_bounds(self, k: int | None = None) -> tuple[float, float]:
        """The least and the most that `effective_rank()` can be, from the k leading eigenvalues and their exact total.

        For a sketch, they hold as far as its leading eigenvalues do. k: by default rank, or min(dim, 32). Raises as
        `eigh`.
        """
        k = (self.rank or min(self.dim, 32)) if k is None else self._directions(k)
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.effective_rank_bounds(state.spectrum(k).values, state.total().values, self.dim)

    def participation_ratio(self) -> float:
        """(Σ λ_i)² / Σ λ_i², in [1, dim]; 0 if nothing varies (Gao et al. 2017, "A theory of multineuronal
        dimensionality, dynamics and measurement", eq. 5). Needs no eigenvalues: tr(C)² / ‖C‖².

        ValueError of a sketch; RuntimeWarning as `effective_rank`."""
        with self._reading() as state:
            self._exact("participation_ratio", "stable_rank()")
            self._warn_if_few(state)
            total = state.total()
            assert total.squares is not None
            return measures.participation_ratio(total.squares)

    def stable_rank(self) -> float:
        """Σ λ_i / λ_1, in [1, dim]; 0 if nothing varies. It is ‖X‖_F² / ‖X‖₂² of the data matrix (Rudelson &
        Vershynin 2007, "Sampling from large matrices", section 1). RuntimeWarning as `effective_rank`."""
        with self._reading() as state:
            self._warn_if_few(state)
            return measures.stable_rank(float(state.spectrum(1).values[0]), state.total().values)

    def _exact(self, name: str, instead: str) -> Exact | OnDevice:
        if not isinstance(self._state, Exact | OnDevice):
            raise ValueError(f"{name} needs the whole spectrum, and a sketch has {self.rank} of it: {instead} is known")
        return self._state

    def _warn_if_few(self, state: State) -> None:
        if state.count < state.dim:
            warnings.warn(
                f"{state.count} rows in {state.dim} dimensions: no rank exceeds the number of rows, so it is too small",
                RuntimeWarning,
                stacklevel=3,
            )
