"""Eigenvectors of a covariance: all of them, the leading ones by block iteration, those of few rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-5  # ‖Cv − λv‖ / λ₁ of what block iteration may return
RELATIVE = 1e-2  # and ‖Cv − λv‖ / λ: a value far below λ₁ is not noise
_MARGIN = 0.9  # of these: what float32 has to reach, before float64 looks
_SPENT = 1e-6  # of an image: what is left of it is rounding
_NOISE = 5e-7  # of λ₁: residuals that float32 products don't reach
_SMALL = 256  # dimensions below which LAPACK is as fast
_SHARE = 6  # nor is iteration faster when more than one direction in so many is asked for
_EXTRA = 4  # directions beyond those asked for: they are what makes the last of these converge
_FRESH = 8  # random ones, for what is new and orthogonal to the last answer
_LEAST, _DEPTH, _ROUNDS = 3, 6, 6  # products that span one Krylov space, and how many such spaces


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
    """k orthonormal rows that begin with the given ones, up to their signs."""
    more = k - len(vectors)
    if more <= 0:
        return vectors
    drawn = torch.randn(
        more, vectors.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    Q = torch.linalg.qr(torch.cat([vectors, drawn.to(vectors.device)]).T).Q.T
    return torch.cat([vectors, Q[len(vectors) :]])


def fix_signs(vectors: Tensor) -> Tensor:
    """Each row times ±1 so that its entry of largest magnitude (the first among equals) is positive."""
    peaks = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(peaks < 0, -vectors, vectors).contiguous()


class Leading:
    """The leading eigenvectors by block iteration, begun from those of the last call.

    Each round spans the Krylov space of the block, [V, CV, …], and takes the best directions in it (Rayleigh–Ritz;
    Golub & Underwood 1977, "The block Lanczos method"). Its products are float32. What is returned is orthonormal in
    float64, its values are Rayleigh quotients in float64, and ‖Cv − λv‖ ≤ min(TOLERANCE·λ₁, RELATIVE·λ) was computed in
    float64.

    Small residuals say that these are eigenvectors, and not that they are the leading ones: a direction that has come
    since the last answer may be orthogonal to all of it. Every block has _FRESH random directions for that, and _LEAST
    products to bring it out. That is likely to find them, not certain: tests/unit/covariance/test_eigen.py
    tries directions from a twentieth above the last value asked for.
    """

    def __init__(self) -> None:
        self._vectors: Tensor | None = None
        self._depth = _LEAST  # from which a look has been worth it
        self._calls = 0

    def start_from(self, vectors: Tensor) -> None:
        """The block of the next call begins with these rows, the leading first."""
        self._vectors = vectors

    def find(self, C: Tensor, product: Callable[[Tensor], Tensor], k: int) -> Spectrum | None:
        """``C`` (dim, dim): the covariance in float32. ``product(R)``: R C in float64 for rows R. None where it did not
        converge.
        """
        V = self._first_block(len(C), k, C.device)
        goal, before = _MARGIN, math.inf
        for left in reversed(range(_ROUNDS)):
            V, residual, depth, reachable = _ritz(C, V, k, goal, self._depth)
            if not reachable or (residual > goal and residual * (residual / before) ** left > goal):
                return None  # nor would the rounds that are left get there, at this pace
            before = residual
            if residual > goal:
                continue
            self._depth = max(_LEAST, depth - int(math.log10(goal / max(residual, 1e-2 * goal))))
            found = _checked(product, V[:, :k].T.double())
            if found is not None:
                self._vectors = V.T
                return found
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
    """Whether LAPACK takes longer for k of dim eigenvectors."""
    return dim >= _SMALL and k * _SHARE <= dim


class _Ritz(NamedTuple):
    """The best block of V's width in the span of V, CV, …, C^depth V; the largest residual of its first k over what
    it may be; and whether float32 reaches that."""

    block: Tensor
    residual: float
    depth: int
    reachable: bool


def _ritz(C: Tensor, V: Tensor, k: int, goal: float, look_from: int) -> _Ritz:
    """As deep as it takes for the residual to be ``goal``, and to _DEPTH at most; it is looked at from ``look_from``
    on, since a look costs as much as a product."""
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
        may_be = _may_be(values[:k])
        residual = float((torch.linalg.vector_norm(apart, dim=0) / may_be).max())
        reachable = bool(may_be[-1] > _NOISE * values[0])
        if residual <= goal or depth == deepest:
            break
    return _Ritz(torch.linalg.qr(S[:, :stop] @ turn).Q, residual, depth, reachable)


def _orthogonal(images: Tensor, S: Tensor) -> Tensor:
    """What images add to the orthonormal columns S. A column that adds nothing beyond rounding, as the image of an
    eigenvector, is replaced at random: made unit, it would be noise that lies in S."""
    fresh = images - S @ (S.T @ images)
    spent = torch.linalg.vector_norm(fresh, dim=0) <= _SPENT * torch.linalg.vector_norm(images, dim=0)
    if bool(spent.any()):
        generator = torch.Generator().manual_seed(S.shape[1])
        drawn = torch.randn(len(fresh), int(spent.sum()), generator=generator, dtype=fresh.dtype, device="cpu")
        fresh[:, spent] = drawn.to(fresh.device)
    fresh = torch.linalg.qr(fresh).Q
    return torch.linalg.qr(fresh - S @ (S.T @ fresh)).Q  # once is not enough in float32


def _may_be(values: Tensor) -> Tensor:
    """The largest residual of each of the leading values."""
    return (RELATIVE * values).clamp(min=torch.finfo(torch.float64).tiny, max=TOLERANCE * float(values[0]))


def _checked(product: Callable[[Tensor], Tensor], R: Tensor) -> Spectrum | None:
    """R (k, dim) made orthonormal and turned to its Ritz vectors; None where a residual is too large."""
    R = torch.linalg.qr(R.T).Q.T
    W = product(R)
    H = R @ W.T
    values, turn = torch.linalg.eigh((H + H.T) / 2)
    values, turn = values.flip(0), turn.flip(1).T
    R, W = turn @ R, turn @ W
    residual = torch.linalg.vector_norm(W - values[:, None] * R, dim=1)
    return Spectrum(values.clamp_min(0), fix_signs(R)) if bool((residual <= _may_be(values)).all()) else None
