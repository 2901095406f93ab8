"""The names that scikit-learn's users look for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch


class ScikitNames:
    """`partial_fit` and the attributes of IncrementalPCA, of a StreamingCovariance."""

    if TYPE_CHECKING:
        dim: Any
        rank: Any
        mean: Any
        count: Any
        eigh: Any
        explained_variance_ratio: Any
        update: Any

    def partial_fit(self, X: torch.Tensor | np.ndarray, y: object = None) -> Self:
        """`update`, by the name that scikit-learn's estimators have for it; y is ignored."""
        self.update(X)
        return self

    @property
    def components_(self) -> torch.Tensor:
        """`eigh().vectors`: (dim, dim), of a sketch (rank, dim)."""
        return self.eigh().vectors

    @property
    def explained_variance_(self) -> torch.Tensor:
        """`eigh().values`, divided by the count; scikit-learn divides by the count less one."""
        return self.eigh().values

    @property
    def explained_variance_ratio_(self) -> torch.Tensor:
        """`explained_variance_ratio` of all eigenvalues, of a sketch `rank` of them."""
        return self.explained_variance_ratio(self.rank or self.dim)

    @property
    def mean_(self) -> torch.Tensor:
        """`mean`."""
        return self.mean

    @property
    def n_samples_seen_(self) -> int:
        """`count`."""
        return self.count
