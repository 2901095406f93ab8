"""The names under which users of scikit-learn look for a state's results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch


class ScikitNames:
    """`partial_fit` and the attributes of scikit-learn's IncrementalPCA for a StreamingCovariance."""

    if TYPE_CHECKING:
        dim: Any
        rank: Any
        mean: Any
        count: Any
        eigh: Any
        explained_variance_ratio: Any
        update: Any

    def partial_fit(self, X: torch.Tensor | np.ndarray, y: object = None) -> Self:
        """Add rows to the state: `update` under the name that scikit-learn's estimators give it.

        Args:
            X: Rows of shape (..., dim), as for `update`.
            y: Ignored; scikit-learn's pipelines pass it.

        Returns:
            This state.

        Example:
            >>> scalpel.StreamingCovariance(dim=2).partial_fit(np.eye(2)).n_samples_seen_
            2
        """
        self.update(X)
        return self

    @property
    def components_(self) -> torch.Tensor:
        """The eigenvectors, `eigh().vectors`: (dim, dim), or (rank, dim) of a sketch."""
        return self.eigh().vectors

    @property
    def explained_variance_(self) -> torch.Tensor:
        """The eigenvalues, `eigh().values`; they are divided by the count, scikit-learn's by the count minus one."""
        return self.eigh().values

    @property
    def explained_variance_ratio_(self) -> torch.Tensor:
        """The share of the variance along each of `components_`; see `explained_variance_ratio`."""
        return self.explained_variance_ratio(self.rank or self.dim)

    @property
    def mean_(self) -> torch.Tensor:
        """The mean of the rows, (dim,); see `mean`."""
        return self.mean

    @property
    def n_samples_seen_(self) -> int:
        """The number of rows seen so far; see `count`."""
        return self.count
