"""Slow, obvious twins of the native ops, for tests and for readers.

Tensors or arrays in, numpy arrays out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Moments", "keep_topk", "moments", "topk_indices", "topk_mask", "topk_order"]


def _numpy(x: Any) -> np.ndarray:
    """x in float64, in which every allowed dtype is exact."""
    if isinstance(x, torch.Tensor):
        x = x.detach().to(torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def topk_order(x: Any, by: str = "magnitude") -> np.ndarray:
    """The places of each row, the first to be kept first. x (..., width) → int64 (..., width)."""
    rows = _numpy(x)
    result = np.empty(rows.shape, dtype=np.int64)
    for place in np.ndindex(rows.shape[:-1]):
        values = [abs(v) if by == "magnitude" else v for v in rows[place].tolist()]
        # NaN first, then larger before smaller, then lower index before higher.
        result[place] = sorted(
            range(len(values)),
            key=lambda i, v=values: (0, 0.0, i) if math.isnan(v[i]) else (1, -v[i], i),  # type: ignore[misc]
        )
    return result


def topk_indices(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """The twin of `scalpel.topk_indices`: sort each row, keep k. x (..., width) → int64 (..., k)."""
    return np.sort(topk_order(x, by)[..., :k], axis=-1)


def topk_mask(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """The twin of `scalpel.topk_mask`. x (..., width) → bool (..., width)."""
    mask = np.zeros(tuple(x.shape), dtype=np.bool_)
    np.put_along_axis(mask, topk_indices(x, k, by), True, axis=-1)
    return mask


def keep_topk(x: Any, k: int, by: str = "magnitude") -> np.ndarray:
    """The twin of `scalpel.keep_topk`. x (..., width) → float64 (..., width)."""
    return np.where(topk_mask(x, k, by), _numpy(x), 0.0)


class Moments(NamedTuple):
    """The number of rows, mean (dim,) and covariance (dim, dim)."""

    rows: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(x: Any, center: bool = True) -> Moments:
    """The twin of `scalpel.StreamingCovariance`, in two passes over all rows, in long double.

    x: (..., dim).
    """
    values = _numpy(x)
    rows = values.reshape(-1, values.shape[-1]).astype(np.longdouble)
    mean = rows.mean(axis=0)
    deviations = rows - mean if center else rows
    covariance = deviations.T @ deviations / len(rows)
    return Moments(len(rows), mean.astype(np.float64), covariance.astype(np.float64))
