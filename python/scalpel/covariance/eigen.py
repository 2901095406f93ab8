"""Eigenvectors of a covariance: all of them, the leading ones by block iteration, those of few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-5  # ‖Cv − λv‖ / λ₁ of what block iteration may return
_MARGIN = 0.5  # of the tolerance: what the iteration itself aims at, in float32
_SMALL = 256  # dimensions below which LAPACK is as fast
_SHARE = 6  # nor is iteration faster when more than one direction in so many is asked for
_EXTRA = 16  # directions beyond those asked for: they are what makes the last of these converge
_DEPTH, _ROUNDS = 3, 8  # products that span one Krylov space, and how many such spaces


class Spectrum(NamedTuple):
    """Eigenvalues (k,), descending, float64, and eigenvectors (k, dim), orthonormal rows."""

    values: Tensor
    vectors: Tensor


def by_lapack(covariance: Tensor) -> Spectrum:
    """All of them, in float64."""
    values, columns = torch.linalg.eigh(covariance)
    return Spectrum(values.flip(0).clamp_min(0), fix_signs(columns.T.flip(0)))


def by_rows(rows: Tensor, count: int, k: int | None) -> Spectrum:
    """Of Σ x xᵀ / count over the rows x (n, dim), n < dim, from the singular values of the rows: the roots of what
    their Gram matrix has, without its rounding.

    Where more than n eigenvectors are asked for, and where values are zero, the basis is completed by any others.
    """
    dim = rows.shape[1]
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    known = S[:1] * (dim * torch.finfo(torch.float64).eps) < S
    values, vectors = S[known].square() / count, Vh[known]
    k = dim if k is None else k
    if k > len(values):
        vectors = complete(vectors, k)
        values = torch.cat([values, values.new_zeros(k - len(values))])
    return Spectrum(values[:k], fix_signs(vectors[:k]))


def complete(vectors: Tensor, k: int) -> Tensor:
    """k orthonormal rows that begin with the given ones."""
    dim = vectors.shape[1]
    if len(vectors) == 0:
        return torch.eye(dim, dtype=vectors.dtype)[:k]
    Q = torch.linalg.qr(vectors.T, mode="complete").Q.T
    return torch.cat([vectors, Q[len(vectors) : k]])


def fix_signs(vectors: Tensor) -> Tensor:
    """Each row times ±1 so that its entry of largest magnitude (the first among equals) is positive."""
    fixed = vectors.numpy().copy()
    peaks = np.abs(fixed).argmax(axis=1)
    fixed[fixed[np.arange(len(fixed)), peaks] < 0] *= -1
    return torch.from_numpy(fixed)


class Leading:
    """The leading eigenvectors by block iteration, begun from those of the last call.

    Each round spans the Krylov space of the block, [V, CV, …], and takes the best directions in it (Rayleigh–Ritz;
    Golub & Underwood 1977, "The block Lanczos method"). Its products are float32. What is returned is orthonormal in
    float64, its values are Rayleigh quotients in float64, and ‖Cv − λv‖ ≤ TOLERANCE·λ₁ was computed in float64.
    """

    def __init__(self) -> None:
        self._vectors: Tensor | None = None

    def start_from(self, vectors: Tensor) -> None:
        """The block of the next call begins with these rows, the leading first."""
        self._vectors = vectors

    def find(self, matrix: Callable[[], Tensor], product: Callable[[Tensor], Tensor], k: int) -> Spectrum | None:
        """``matrix()``: C in float32. ``product(V)``: C V in float64. None where this is no faster than LAPACK, or
        did not converge.
        """
        C = matrix()
        dim = len(C)
        if not bool(C.isfinite().all()) or float(C.abs().max()) == 0.0:
            return None  # beyond float32's range, or nothing to iterate on
        V = self._first_block(dim, k + _EXTRA)
        for _ in range(_ROUNDS):
            V, largest, residual = _ritz(C, V, k)
            if residual <= _MARGIN * TOLERANCE * largest:
                break
        found = _checked(product, V[:, :k].double())
        if found is not None:
            self._vectors = V.T
        return found

    def _first_block(self, dim: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(dim, width, generator=generator)
        if self._vectors is not None:
            known = self._vectors[:width].T.float()
            block[:, : known.shape[1]] = known
        return torch.linalg.qr(block).Q


def worth_iterating(dim: int, k: int) -> bool:
    """Whether LAPACK takes longer for k of dim eigenvectors."""
    return dim >= _SMALL and k * _SHARE <= dim


def _ritz(C: Tensor, V: Tensor, k: int) -> tuple[Tensor, float, float]:
    """The best block of V's width in the span of V, CV, …; its largest value, the largest residual of its first k."""
    width = V.shape[1]
    basis, images = [V], [C @ V]
    for _ in range(_DEPTH):
        known = torch.cat(basis, dim=1)
        fresh = images[-1] - known @ (known.T @ images[-1])
        fresh = torch.linalg.qr(fresh).Q
        fresh = torch.linalg.qr(fresh - known @ (known.T @ fresh)).Q
        basis.append(fresh)
        images.append(C @ fresh)
    S, CS = torch.cat(basis, dim=1), torch.cat(images, dim=1)
    H = (S.T @ CS).double()
    values, turn = torch.linalg.eigh((H + H.T) / 2)
    values, turn = values.flip(0)[:width], turn.flip(1)[:, :width].float()
    V = S @ turn
    residual = torch.linalg.vector_norm((CS @ turn - V * values.float())[:, :k], dim=0)
    return V, float(values[0]), float(residual.max())


def _checked(product: Callable[[Tensor], Tensor], V: Tensor) -> Spectrum | None:
    """V (dim, k) made orthonormal and turned to its Ritz vectors; None where a residual is too large."""
    V = torch.linalg.qr(V).Q
    W = product(V)
    H = V.T @ W
    values, turn = torch.linalg.eigh((H + H.T) / 2)
    values, turn = values.flip(0), turn.flip(1)
    V, W = V @ turn, W @ turn
    residual = torch.linalg.vector_norm(W - V * values, dim=0).max()
    if not bool(residual <= TOLERANCE * values[0]):
        return None
    return Spectrum(values.clamp_min(0), fix_signs(V.T.contiguous()))
