"""Slow, obvious twins of the native ops, for tests and for readers.

They take tensors or arrays and return numpy arrays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Moments", "keep_topk", "moments", "topk_indices", "topk_mask", "topk_order"]


def _numpy(x: Any) -> np.ndarray:
    """Convert x to float64, in which every allowed dtype is exact."""
    if isinstance(x, torch.Tensor):
        x = x.detach().to(torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def topk_order(x: Any, by: str = "magnitude") -> np.ndarray:
    """Rank the entries of each row, by sorting each row in Python.

    Args:
        x: Rows of shape (..., width), a tensor or an array.
        by: "magnitude" ranks by |x|, "value" ranks by x.

    Returns:
        The indices of each row, int64 (..., width), the first to be kept first.

    Example:
        >>> scalpel.reference.topk_order(torch.tensor([0.5, -3.0, 2.0]))
        array([1, 2, 0])
    """
    rows = _numpy(x)
    result = np.empty(rows.shape, dtype=np.int64)
    for row in np.ndindex(rows.shape[:-1]):
        values = [abs(v) if by == "magnitude" else v for v in rows[row].tolist()]
        # NaN first, then larger before smaller, then lower index before higher.
        result[row] = sorted(
            range(len(values)),
            key=lambda i, v=values: (0, 0.0, i) if math.isnan(v[i]) else (1, -v[i], i),  # type: ignore[misc]
        )
    return result


def topk_indices(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """Find the k largest entries of each row: the twin of `scalpel.topk_indices`.

    Args:
        x: Rows of shape (..., width), a tensor or an array.
        k: How many indices to return for each row.
        by: "magnitude" ranks by |x|, "value" ranks by x.

    Returns:
        The indices, int64 (..., k), ascending in each row.

    Example:
        >>> scalpel.reference.topk_indices(torch.tensor([0.5, -3.0, 2.0]), k=2)
        array([1, 2])
    """
    return np.sort(topk_order(x, by)[..., :k], axis=-1)


def topk_mask(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """Mark the k largest entries of each row: the twin of `scalpel.topk_mask`.

    Args:
        x: Rows of shape (..., width), a tensor or an array.
        k: How many entries of each row to keep.
        by: "magnitude" ranks by |x|, "value" ranks by x.

    Returns:
        A bool array (..., width).

    Example:
        >>> scalpel.reference.topk_mask(torch.tensor([0.5, -3.0, 2.0]), k=2)
        array([False,  True,  True])
    """
    mask = np.zeros(tuple(x.shape), dtype=np.bool_)
    np.put_along_axis(mask, topk_indices(x, k, by), True, axis=-1)
    return mask


def keep_topk(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """Keep the k largest entries of each row: the twin of `scalpel.keep_topk`.

    Args:
        x: Rows of shape (..., width), a tensor or an array.
        k: How many entries of each row to keep.
        by: "magnitude" ranks by |x|, "value" ranks by x.

    Returns:
        A float64 array (..., width), 0 where an entry is not kept.

    Example:
        >>> scalpel.reference.keep_topk(torch.tensor([0.5, -3.0, 2.0]), k=2)
        array([ 0., -3.,  2.])
    """
    return np.where(topk_mask(x, k, by), _numpy(x), 0.0)


class Moments(NamedTuple):
    """The number, mean and covariance of some rows.

    Attributes:
        rows: The number of rows.
        mean: Their mean, (dim,).
        covariance: Their covariance, (dim, dim).
    """

    rows: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(x: Any, center: bool = True) -> Moments:
    """Compute mean and covariance in two passes over all rows: the twin of `scalpel.StreamingCovariance`.

    Sums are accumulated in long double.

    Args:
        x: Rows of shape (..., dim), a tensor or an array.
        center: True for the covariance, False for the second moment E[x xᵀ].

    Returns:
        The moments, divided by the number of rows.

    Example:
        >>> scalpel.reference.moments(torch.tensor([[1.0], [3.0]]))
        Moments(rows=2, mean=array([2.]), covariance=array([[1.]]))
    """
    values = _numpy(x)
    rows = values.reshape(-1, values.shape[-1]).astype(np.longdouble)
    mean = rows.mean(axis=0)
    deviations = rows - mean if center else rows
    covariance = deviations.T @ deviations / len(rows)
    return Moments(len(rows), mean.astype(np.float64), covariance.astype(np.float64))
