"""What an exact state and a sketch have in common: what StreamingCovariance asks of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .eigen import Spectrum


class Total(NamedTuple):
    """Σ λ_i over the whole spectrum, and Σ (λ_i / Σλ)²; None where that isn't known."""

    values: float
    squares: float | None


class State(ABC):
    """Rows so far. Arguments are checked before they come here; every result is float64."""

    method: ClassVar[str | None]

    def __init__(self, dim: int, center: bool) -> None:
        self.dim = dim
        self.center = center

    @abstractmethod
    def empty(self) -> Self:
        """A new state of this one's kind."""

    def kind(self) -> tuple[Any, ...]:
        """What two states must share to be merged."""
        return self.method, self.dim, self.center

    @property
    def device(self) -> torch.device:
        """Where the rows are read, and where results are."""
        return torch.device("cpu")

    @property
    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def update(self, rows: Tensor) -> int:
        """Adds rows (n, dim), last stride 1. -1, or the index of the first row that isn't finite."""

    @abstractmethod
    def fold(self) -> None:
        """Rows that wait join."""

    @abstractmethod
    def merge(self, other: State) -> None: ...

    @abstractmethod
    def subtract(self, other: State) -> None: ...

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """(dim,), not shared."""

    @abstractmethod
    def covariance(self) -> Tensor: ...

    @abstractmethod
    def total(self) -> Total: ...

    @abstractmethod
    def spectrum(self, k: int | None) -> Spectrum:
        """The k leading eigenvalues and eigenvectors; all that are known for None."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file needs, no row of the input among it."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """From ``tensors`` of an equal state; into a new one."""
