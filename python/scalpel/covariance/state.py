"""The interface that StreamingCovariance needs of an exact state and of a sketch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .eigen import Spectrum


class Total(NamedTuple):
    """Sums over the whole spectrum.

    Attributes:
        values: Σ λ_i.
        squares: Σ (λ_i / Σλ)²; None where it is not known.
    """

    values: float
    squares: float | None


class State(ABC):
    """A state of the rows seen so far. Arguments are checked before they arrive here; every result is float64."""

    method: ClassVar[str | None]

    def __init__(self, dim: int, center: bool) -> None:
        self.dim = dim
        self.center = center

    @abstractmethod
    def empty(self) -> Self:
        """Make a new state of the same kind."""

    def kind(self) -> tuple[Any, ...]:
        """Return what two states must share to be merged."""
        return self.method, self.dim, self.center

    @property
    def device(self) -> torch.device:
        """The device on which rows are read and results are."""
        return torch.device("cpu")

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows seen so far."""

    @abstractmethod
    def update(self, rows: Tensor) -> int:
        """Add rows (n, dim) whose last stride is 1, unless one of them is not finite.

        Returns:
            -1, or the index of the first row that is not finite; then no row was added.
        """

    @abstractmethod
    def fold(self) -> None:
        """Make waiting rows join."""

    @abstractmethod
    def merge(self, other: State) -> None:
        """Add the rows of another state of the same kind."""

    @abstractmethod
    def subtract(self, other: State) -> None:
        """Remove the rows of another state of the same kind."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean (dim,), in memory of its own."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Compute the covariance (dim, dim)."""

    @abstractmethod
    def total(self) -> Total:
        """Compute sums over the spectrum without computing the spectrum."""

    @abstractmethod
    def spectrum(self, k: int | None) -> Spectrum:
        """Compute the k leading eigenvalues and eigenvectors, or all that are known if k is None."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what a file needs; no row of the input is in it."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill a new state with the ``tensors`` of a state of the same kind."""
