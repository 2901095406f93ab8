"""What the solvers need of an operator: its shape and products with it and its transpose."""

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["LinearMap"]


class LinearMap(Protocol):
    """A real linear map from n to m numbers that is known by its products alone, such as a Jacobian."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def T(self) -> "LinearMap":
        """The transpose."""

    def __matmul__(self, other: Any) -> Any:
        """The product with a vector (n,) or a block (n, T)."""

    def to_dense(self) -> Tensor:
        """The matrix (m, n)."""
