"""Alternating sweeps over a chain of operators: the leading singular values of its product.

A block V of directions goes forward through J_1, …, J_D and back through J_Dᵀ, …, J_1ᵀ, with a QR factorisation after
every layer: orthogonal iteration on Pᵀ P (Golub and Van Loan, "Matrix Computations", 7.3 and 8.6) in which no direction
drowns in a longer one. The triangular factors are multiplied by :mod:`.graded`.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ..operator import Jacobian
from ..svd import NotFinite
from .graded import GradedProduct
from .spectra import padded

_OVERSAMPLE = 8  # directions beyond T: they hasten the T-th, and hold a cluster together (Halko et al. 2011, section 4)
_PATIENCE = 50  # sweeps without the residual falling to half before it counts as stuck
ROUNDING = 64  # a singular value of a layer below this times eps times its largest is zero


@dataclass
class SweptProduct:
    """The leading singular values of a chain's product, as :class:`Sweeps` gives them.

    ``logs``: (T,), their logarithms. The shapes of ``right`` and ``residual`` are those of ``Lyapunov``.
    """

    chain: list[Jacobian]
    logs: Tensor
    right: Tensor
    residual: Tensor
    sweeps: int
    converged: bool


class Sweeps:
    """The T leading singular values of a chain of operators, and their right vectors."""

    def __init__(self, chain: list[Jacobian], T: int, seed: int) -> None:
        self.chain = chain
        self.T = T
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.n = chain[0].shape[1]
        self.width = min(T + _OVERSAMPLE, self.n, chain[-1].shape[0])

    def solve(self, goal: float, most: int, start: Tensor | None = None) -> SweptProduct:
        V = self._filled(self._krylov() if start is None else start)
        best, stuck = math.inf, 0
        for sweep in range(1, most + 1):
            U, _ = swept(self.chain, V)
            after, logs = swept([J.T for J in reversed(self.chain)], U)
            kept = after[:, : self.T]
            outside = kept - V @ (V.T @ kept)
            # the Frobenius norm of the first i columns: no less than the sine of the largest angle
            angles = torch.linalg.vector_norm(outside, dim=0).square().cumsum(0).sqrt()
            residual = torch.zeros(self.T, dtype=torch.float64, device="cpu")
            residual[: len(angles)] = angles.cpu()
            worst = float(residual.max())
            stuck = 0 if worst < best / 2 else stuck + 1
            best = min(best, worst)
            if worst <= goal or stuck >= _PATIENCE or sweep == most:
                break
            V = self._filled(after)
        first = self.chain[0]
        right = torch.zeros(self.T, self.n, dtype=first.dtype, device=first.device)
        right[: kept.shape[1]] = kept.T.to(first.dtype)
        shaped = right.reshape(self.T, *first.source_shape)
        return SweptProduct(self.chain, padded(logs, self.T), shaped, residual, sweep, worst <= goal)

    def _krylov(self) -> Tensor:
        """Where to start: the leading vectors of the product as one operator. They need not be right, only near."""
        whole = reduce(lambda first, second: second @ first, self.chain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                return whole.svd(self.T, seed=self.seed)[2].T.double()
            except NotFinite:  # the product leaves the dtype's range; the sweeps, which scale, do not
                return torch.zeros(self.n, 0, dtype=torch.float64, device=whole.device)

    def _filled(self, V: Tensor) -> Tensor:
        """V with random columns beside its own up to the block's width, orthonormal."""
        missing = self.width - V.shape[1]
        fresh = torch.randn(self.n, max(0, missing), generator=self.generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(torch.cat([V[:, : self.width], fresh.to(V.device)], dim=1))[0]


def _factors(chain: list[Jacobian], V: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """For each operator of the chain: Q and R of the block that leaves it, and what of R is rounding."""
    for J in chain:
        W = J.jvp(V.T.reshape(-1, *J.source_shape).to(J.dtype)).double().reshape(V.shape[1], J.shape[0]).T
        if not bool(W.isfinite().all()):
            raise ValueError(
                f"products with {J} hold NaN or infinity, so it has no singular values: the primal sits where a "
                "function has no derivative, or is too large for the dtype"
            )
        V, R = torch.linalg.qr(W)
        yield V, R, ROUNDING * float(torch.finfo(J.dtype).eps) * float(torch.linalg.matrix_norm(R, 2))


def swept(chain: list[Jacobian], V: Tensor) -> tuple[Tensor, np.ndarray]:
    """Sweep the orthonormal block V (n, p) through the chain once.

    Gives the left singular vectors (m, r) of the chain's product with V and the logarithms (r,) of its singular values,
    descending; r ≤ p is the rank.
    """
    if V.shape[1] == 0:
        return V.new_zeros(chain[-1].shape[0], 0), np.zeros(0)
    product = GradedProduct(V.shape[1])
    for Q, R, floor in _factors(chain, V):
        product.extend(R.cpu().numpy(), floor)
        V = Q
    left, logs = product.svd()
    return V @ torch.from_numpy(left).to(V.device), logs


def frame_growth(chain: list[Jacobian], T: int, seed: int = 0) -> Tensor:
    """(D, T): log |R_ii| after each operator, in one forward sweep of a random frame; see ``Lyapunov``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(chain[0].shape[1], T, generator=generator, dtype=torch.float64, device="cpu")
    rows = []
    for _, R, floor in _factors(chain, torch.linalg.qr(drawn.to(chain[0].device))[0]):
        size = R.diagonal().abs().cpu()
        rows.append(torch.where(size > floor, size, 0.0).log())
    return torch.stack(rows)


def tail_energy(chain: list[Jacobian], Vh: Tensor, probes: int, generator: torch.Generator) -> list[float]:
    """Σ_{i>T} σ_i² / σ_1² of a chain's product with right vectors Vh (T, n), and its standard error."""
    V = torch.linalg.qr(Vh.double().T)[0]
    n = V.shape[0]
    signs = (
        torch.randint(0, 2, (n, probes), generator=generator, dtype=torch.float64, device="cpu").to(V.device) * 2 - 1
    )
    block = torch.cat([V[:, :1], signs - V @ (V.T @ signs)], dim=1)  # the first column measures σ_1
    for J in chain:
        tangents = block.T.reshape(-1, *J.source_shape).to(J.dtype)
        block = J.jvp(tangents).double().reshape(len(tangents), -1).T
        size = float(block.abs().max())
        block = block / size if size > 0 else block  # only ratios of its columns are asked for
    energies = block.square().sum(dim=0).cpu()
    if not energies[0] > 0:
        return [0.0, 0.0]
    ratios = energies[1:] / energies[0]
    error = float(ratios.std()) / math.sqrt(probes) if probes > 1 else math.inf
    return [float(ratios.mean()), error]
