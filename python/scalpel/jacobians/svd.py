"""The largest singular triples of an operator, by block Golub–Kahan bidiagonalisation with thick restarts.

J V = U B holds to rounding throughout, with orthonormal U and V. Also Jᵀ U = V Bᵀ + N S Eᵀ, where N is the next block
of V. U and V carry the singular triples of the small matrix B back to J, with a residual of ‖S p‖, where p are the last
rows of a left singular vector of B. The residual bounds the error of the singular value and costs nothing to compute. A
restart keeps the leading triples and N. (Golub, Luk and Overton 1981, ACM TOMS 7(2); Baglama and Reichel 2005, SIAM J.
Sci. Comput. 27(1).)
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from .._integers import integer
from .linear_map import LinearMap

# vectors beyond k in a block, which speed up the k-th value and resolve clusters (Halko et al. 2011, section 4)
_OVERSAMPLE = 8
_BLOCKS = 8  # blocks kept before a restart
_STEPS = 200  # block products in each direction after which the iteration stops unconverged
_SMALL = 256  # rows or columns up to which the dense decomposition is as fast


def truncated_svd(J: LinearMap, k: Any, *, seed: int, tol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k largest singular triples of J, as :meth:`Jacobian.svd` describes."""
    m, n = J.shape
    k = _checked_k(k, min(m, n))
    work = torch.promote_types(J.dtype, torch.float32)
    width = k + _OVERSAMPLE
    if k == 0:
        no_values = torch.zeros(0, dtype=work, device=J.device)
        return no_values.new_zeros(m, 0), no_values, no_values.new_zeros(0, n)
    if is_small((m, n), k):
        U, S, Vh = torch.linalg.svd(finite(J.to_dense().to(work)), full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    return _Bidiagonalisation(J, k, width, work, seed).solve(tol)


def is_small(shape: tuple[int, ...], k: int) -> bool:
    """Whether k triples of a map of this shape are best taken from the decomposition of its matrix."""
    return min(shape) <= max(_SMALL, (_BLOCKS + 1) * (k + _OVERSAMPLE))


def _checked_k(k: Any, most: int) -> int:
    """Return k as an int from 0 to ``most``, or raise an error that says what is wrong with it."""
    k = integer(k)
    if not 0 <= k <= most:
        raise ValueError(f"k is {k}; this Jacobian has {most} singular values: 0 <= k <= {most}")
    return k


class NotFinite(ValueError):
    """Products with a Jacobian hold NaN or infinity."""


def finite(products: Tensor) -> Tensor:
    """Return the products, or raise NotFinite where they hold NaN or infinity."""
    if not bool(products.isfinite().all()):
        raise NotFinite(
            "products with this Jacobian hold NaN or infinity, so it has no singular values: the primal sits "
            "where a function has no derivative, or is too large for the dtype"
        )
    return products


class _Bidiagonalisation:
    """The iteration for the k largest singular triples of J, in blocks of ``width`` vectors of the dtype ``work``."""

    def __init__(self, J: LinearMap, k: int, width: int, work: torch.dtype, seed: int) -> None:
        self.J = J
        self.k = k
        self.width = width
        self.work = work
        self.eps = float(torch.finfo(J.dtype).eps)
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = 0.0  # the norm of the longest product so far, which decides what counts as zero

    def solve(self, tol: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (m, k), S (k,) and Vh (k, n); a warning says where a residual did not meet ``tol``."""
        m, n = self.J.shape
        k, width = self.k, self.width
        goal = (1e-9 if self.eps < 1e-12 else 3e-5) if tol is None else tol
        V = torch.linalg.qr(self._random(n, width))[0]
        U = V.new_zeros(m, 0)
        B = V.new_zeros(0, 0, dtype=torch.float64)
        for step in range(_STEPS):
            new_left, overlap, R = self._extend(self._product(self.J, V[:, -width:]), U)
            B = torch.cat([torch.cat([B, B.new_zeros(width, B.shape[1])]), torch.cat([overlap, R])], dim=1)
            U = torch.cat([U, new_left], dim=1)
            next_right, _, S = self._extend(self._product(self.J.T, new_left), V)
            left, sigma, right = torch.linalg.svd(B)
            residual = torch.linalg.vector_norm(S @ left[-width:, :k], dim=0)
            # no residual can fall below the rounding of J's own products
            converged = bool((residual <= (goal * sigma[:k]).clamp(min=30 * self.eps * float(sigma[0]))).all())
            if converged or step == _STEPS - 1:
                break
            if U.shape[1] >= _BLOCKS * width:
                U, V = U @ self._working(left[:, :width]), V @ self._working(right[:width].T)
                B = torch.diag(sigma[:width])
            V = torch.cat([V, next_right], dim=1)
        if not converged:
            warnings.warn(
                f"svd({k}) stopped after {_STEPS} block products with a residual of "
                f"{float(residual.max()):.2e} against a largest value of {float(sigma[0]):.2e}: each is "
                "within its residual of a true one. Ask for another k, or give a larger tol",
                RuntimeWarning,
                stacklevel=4,
            )
        return U @ self._working(left[:, :k]), self._working(sigma[:k]), self._working(right[:k]) @ V.T

    def _working(self, small: Tensor) -> Tensor:
        """A small float64 tensor in the dtype of the blocks."""
        return small.to(self.work)

    def _random(self, rows: int, columns: int) -> Tensor:
        random = torch.randn(rows, columns, generator=self.generator, dtype=torch.float64, device="cpu")
        return random.to(self.J.device, self.work)

    def _product(self, J: LinearMap, block: Tensor) -> Tensor:
        """Multiply J by a block; an error where the product is not finite."""
        product = finite((J @ block.to(J.dtype)).to(self.work))
        self.scale = max(self.scale, float(torch.linalg.vector_norm(product, dim=0).max()))
        return product

    def _extend(self, W: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find Q, C and R with W = basis C + Q R, where [basis, Q] is orthonormal.

        Where W adds fewer directions than it has columns, the remaining columns of Q are random, and their rows of R
        are zero.
        """
        C = basis.T @ W
        W = W - basis @ C
        # a second projection removes what rounding left of the first; two are enough (Parlett 1998)
        correction = basis.T @ W
        W = W - basis @ correction
        Q, R = torch.linalg.qr(W)
        rotation, sizes, right = torch.linalg.svd(R.double())
        negligible = sizes <= 10 * self.eps * self.scale
        Q = torch.where(negligible.to(Q.device), self._random(*Q.shape), Q @ self._working(rotation))
        R = torch.where(negligible, 0.0, sizes)[:, None] * right
        for _ in range(2):
            Q, triangle = torch.linalg.qr(Q - basis @ (basis.T @ Q))
            R = triangle.double() @ R
        return Q, (C + correction).double(), R
