"""Eigenvectors of a covariance: all of them, the leading ones by block iteration, or those of few rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-5  # the largest ‖Cv − λv‖ / λ₁ that block iteration may return
RELATIVE = 1e-2  # the largest ‖Cv − λv‖ / λ, so that a value far below λ₁ is not noise
_MARGIN = 0.9  # the fraction of these limits that float32 has to reach before float64 verifies
_SPENT = 1e-6  # the fraction of an image below which what is left of it is rounding
_NOISE = 5e-7  # the fraction of λ₁ below which residuals of float32 products do not fall
_SMALL = 256  # the number of dimensions below which LAPACK is as fast
_SHARE = 6  # iteration is not faster, either, for more than one in so many directions
_EXTRA = 4  # directions beyond the requested ones, which make the last of those converge
_FRESH = 8  # random directions, for what is new and orthogonal to the previous answer
_LEAST, _DEPTH, _ROUNDS = 3, 6, 6  # least and most products that span one Krylov space, and the number of spaces


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a covariance, in float64.

    Attributes:
        values: The eigenvalues (k,), in descending order.
        vectors: The eigenvectors (k, dim), orthonormal rows.
    """

    values: Tensor
    vectors: Tensor


class Eigen(NamedTuple):
    """Eigenvalues of a covariance and their eigenvectors.

    Attributes:
        values: The eigenvalues (k,), in descending order.
        vectors: The eigenvectors (k, dim), one per row.
    """

    values: Tensor
    vectors: Tensor


def by_lapack(covariance: Tensor) -> Spectrum:
    """Compute all eigenvalues and eigenvectors, in float64."""
    values, columns = torch.linalg.eigh(covariance)
    return Spectrum(values.flip(0).clamp_min(0), fix_signs(columns.T.flip(0)))


def by_rows(rows: Tensor, count: int, k: int | None) -> Spectrum:
    """Compute the spectrum of Σ x xᵀ / count over the rows x (n, dim), n < dim, from the rows' singular values.

    The singular values are the square roots of the Gram matrix's eigenvalues, without its rounding errors. Where more
    than n eigenvectors are requested, and where values are zero, the basis is completed arbitrarily.
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
    """Extend orthonormal rows to k orthonormal rows; the signs of the given rows may change."""
    more = k - len(vectors)
    if more <= 0:
        return vectors
    drawn = torch.randn(
        more, vectors.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    Q = torch.linalg.qr(torch.cat([vectors, drawn.to(vectors.device)]).T).Q.T
    return torch.cat([vectors, Q[len(vectors) :]])


def fix_signs(vectors: Tensor) -> Tensor:
    """Multiply each row by ±1 so that its entry of largest magnitude (the first among equals) is positive."""
    peaks = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(peaks < 0, -vectors, vectors).contiguous()


class Leading:
    """The leading eigenvectors by block iteration, started from those of the previous call.

    Each round spans the Krylov space of the block, [V, CV, …], and takes the best directions in it (Rayleigh–Ritz;
    Golub & Underwood 1977, "The block Lanczos method"). Its products are float32. The vectors that are returned are
    orthonormal in float64, their values are Rayleigh quotients in float64, and ‖Cv − λv‖ ≤ min(TOLERANCE·λ₁,
    RELATIVE·λ) has been verified in float64.

    Small residuals show that these are eigenvectors, but not that they are the leading ones: a direction that has
    appeared since the previous answer may be orthogonal to all of it. For that, every block has _FRESH random
    directions, and at least _LEAST products amplify them. That makes it likely to find such a direction, but not
    certain: tests/unit/covariance/test_eigen.py tries directions from a twentieth above the last requested value.
    """

    def __init__(self) -> None:
        self._vectors: Tensor | None = None
        self._depth = _LEAST  # the depth from which computing the residual has been worth its cost
        self._calls = 0

    def start_from(self, vectors: Tensor) -> None:
        """Start the block of the next call with these rows, the leading one first."""
        self._vectors = vectors

    def find(self, C: Tensor, product: Callable[[Tensor], Tensor], k: int) -> Spectrum | None:
        """Find the k leading eigenvectors.

        Args:
            C: The covariance (dim, dim), in float32.
            product: A function that returns R C in float64 for rows R.
            k: How many eigenvectors to find.

        Returns:
            The spectrum, or None if the iteration did not converge.
        """
        V = self._first_block(len(C), k, C.device)
        goal, before = _MARGIN, math.inf
        for left in reversed(range(_ROUNDS)):
            V, residual, depth, reachable = _ritz(C, V, k, goal, self._depth)
            if not reachable or (residual > goal and residual * (residual / before) ** left > goal):
                return None  # at this pace, the remaining rounds would not reach the goal
            before = residual
            if residual > goal:
                continue
            self._depth = max(_LEAST, depth - int(math.log10(goal / max(residual, 1e-2 * goal))))
            spectrum = _checked(product, V[:, :k].T.double())
            if spectrum is not None:
                self._vectors = V.T
                return spectrum
            goal /= 2
        return None

    def _first_block(self, dim: int, k: int, device: torch.device) -> Tensor:
        self._calls += 1
        generator = torch.Generator().manual_seed(self._calls)
        block = torch.randn(dim, k + _EXTRA + _FRESH, generator=generator, dtype=torch.float32, device="cpu").to(device)
        if self._vectors is not None:
            known = self._vectors[: k + _EXTRA].T.float()
            block[:, : known.shape[1]] = known
        return torch.linalg.qr(block).Q


def worth_iterating(dim: int, k: int) -> bool:
    """Whether block iteration is faster than LAPACK for k of dim eigenvectors."""
    return dim >= _SMALL and k * _SHARE <= dim


class _Ritz(NamedTuple):
    """The best block of V's width in the span of V, CV, …, C^depth V.

    Attributes:
        block: The block (dim, width).
        residual: The largest residual of its first k columns, relative to what is allowed.
        depth: The depth of the Krylov space.
        reachable: Whether float32 products can reach the allowed residual.
    """

    block: Tensor
    residual: float
    depth: int
    reachable: bool


def _ritz(C: Tensor, V: Tensor, k: int, goal: float, look_from: int) -> _Ritz:
    """Extend the Krylov space until the residual is at most ``goal``, up to a depth of _DEPTH.

    The residual is computed from the depth ``look_from`` on, because computing it costs as much as a product.
    """
    dim, width = V.shape
    deepest = max(0, min(_DEPTH, dim // width - 1))
    S, CS = V.new_empty(dim, width * (deepest + 1)), V.new_empty(dim, width * (deepest + 1))
    H = V.new_zeros(S.shape[1], S.shape[1], dtype=torch.float64)
    fresh = V
    for depth in range(deepest + 1):
        start, stop = depth * width, (depth + 1) * width
        if depth:
            fresh = _orthogonal(fresh, S[:, :start])
        S[:, start:stop] = fresh
        CS[:, start:stop] = image = C @ fresh
        H[:stop, start:stop] = (S[:, :stop].T @ image).double()
        fresh = image
        if depth < min(look_from, deepest):
            continue
        upper = H[:stop, :stop].triu()
        values, turn = torch.linalg.eigh(upper + upper.triu(1).T)
        values, turn = values.flip(0), turn.flip(1)[:, :width].float()
        apart = CS[:, :stop] @ turn[:, :k] - S[:, :stop] @ (turn[:, :k] * values[:k].float())
        allowed = _largest_residuals(values[:k])
        residual = float((torch.linalg.vector_norm(apart, dim=0) / allowed).max())
        reachable = bool(allowed[-1] > _NOISE * values[0])
        if residual <= goal or depth == deepest:
            break
    return _Ritz(torch.linalg.qr(S[:, :stop] @ turn).Q, residual, depth, reachable)


def _orthogonal(images: Tensor, S: Tensor) -> Tensor:
    """Return what the images add to the orthonormal columns S.

    A column that adds only rounding errors, such as the image of an eigenvector, is replaced by a random one:
    normalized, it would be noise that lies in S.
    """
    fresh = images - S @ (S.T @ images)
    spent = torch.linalg.vector_norm(fresh, dim=0) <= _SPENT * torch.linalg.vector_norm(images, dim=0)
    if bool(spent.any()):
        generator = torch.Generator().manual_seed(S.shape[1])
        drawn = torch.randn(len(fresh), int(spent.sum()), generator=generator, dtype=fresh.dtype, device="cpu")
        fresh[:, spent] = drawn.to(fresh.device)
    fresh = torch.linalg.qr(fresh).Q
    return torch.linalg.qr(fresh - S @ (S.T @ fresh)).Q  # one pass is not accurate enough in float32


def _largest_residuals(values: Tensor) -> Tensor:
    """Compute the largest residual that each of the leading values may have."""
    return (RELATIVE * values).clamp(min=torch.finfo(torch.float64).tiny, max=TOLERANCE * float(values[0]))


def _checked(product: Callable[[Tensor], Tensor], R: Tensor) -> Spectrum | None:
    """Orthonormalize R (k, dim) and rotate it to its Ritz vectors; None if a residual is too large."""
    R = torch.linalg.qr(R.T).Q.T
    W = product(R)
    H = R @ W.T
    values, turn = torch.linalg.eigh((H + H.T) / 2)
    values, turn = values.flip(0), turn.flip(1).T
    R, W = turn @ R, turn @ W
    residual = torch.linalg.vector_norm(W - values[:, None] * R, dim=1)
    return Spectrum(values.clamp_min(0), fix_signs(R)) if bool((residual <= _largest_residuals(values)).all()) else None
