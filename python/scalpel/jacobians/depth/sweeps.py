"""The leading singular values of the product of a chain of operators, by sweeps forward and back through the chain.

A block V of directions goes forward through J_1, …, J_D and back through J_Dᵀ, …, J_1ᵀ. This is orthogonal iteration on
Pᵀ P for the product P (Golub and Van Loan, "Matrix Computations", 7.3 and 8.6). A QR factorisation after every layer
keeps long directions from swamping short ones. :mod:`.graded` multiplies the triangular factors.
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

_OVERSAMPLE = 8  # directions beyond T, which speed up the T-th and resolve clusters (Halko et al. 2011, section 4)
_PATIENCE = 50  # sweeps in which the residual must halve, or it counts as stuck
ROUNDING = 64  # a layer's singular values up to ROUNDING · eps · its largest count as zero


@dataclass
class SweptProduct:
    """The leading singular values of a chain's product, as computed by :class:`Sweeps`.

    ``logs`` (T,) are their logarithms. ``right``, ``residual``, ``sweeps`` and ``converged`` are as in ``Lyapunov``.
    """

    chain: list[Jacobian]
    logs: Tensor
    right: Tensor
    residual: Tensor
    sweeps: int
    converged: bool


class Sweeps:
    """The computation of the T leading singular values of a chain's product, and of their right vectors."""

    def __init__(self, chain: list[Jacobian], T: int, seed: int) -> None:
        self.chain = chain
        self.T = T
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.n = chain[0].shape[1]
        self.width = min(T + _OVERSAMPLE, self.n, chain[-1].shape[0])

    def solve(self, goal: float, most: int, start: Tensor | None = None) -> SweptProduct:
        """Sweep until every residual is at most ``goal``, progress has stopped, or ``most`` sweeps are done.

        ``start``: (n, p), the directions of the first block; by default Krylov vectors of the product.
        """
        V = self._filled(self._krylov() if start is None else start)
        least_residual, sweeps_since_halved = math.inf, 0
        for sweep in range(1, most + 1):
            U, _ = swept(self.chain, V)
            swept_back, logs = swept([J.T for J in reversed(self.chain)], U)
            leading = swept_back[:, : self.T]
            outside = leading - V @ (V.T @ leading)
            # the Frobenius norm of the first i columns bounds the sine of the largest angle from above
            angles = torch.linalg.vector_norm(outside, dim=0).square().cumsum(0).sqrt()
            residual = torch.zeros(self.T, dtype=torch.float64, device="cpu")
            residual[: len(angles)] = angles.cpu()
            worst = float(residual.max())
            sweeps_since_halved = 0 if worst < least_residual / 2 else sweeps_since_halved + 1
            least_residual = min(least_residual, worst)
            if worst <= goal or sweeps_since_halved >= _PATIENCE or sweep == most:
                break
            V = self._filled(swept_back)
        operator = self.chain[0]
        right = torch.zeros(self.T, self.n, dtype=operator.dtype, device=operator.device)
        right[: leading.shape[1]] = leading.T.to(operator.dtype)
        shaped = right.reshape(self.T, *operator.source_shape)
        return SweptProduct(self.chain, padded(logs, self.T), shaped, residual, sweep, worst <= goal)

    def _krylov(self) -> Tensor:
        """Approximate the leading right singular vectors of the product, taken as one operator, as a start.

        They need not be accurate, since the sweeps improve them.
        """
        whole = reduce(lambda first, second: second @ first, self.chain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                return whole.svd(self.T, seed=self.seed)[2].T.double()
            except NotFinite:  # the product leaves the dtype's range, which the sweeps avoid by scaling
                return torch.zeros(self.n, 0, dtype=torch.float64, device=whole.device)

    def _filled(self, V: Tensor) -> Tensor:
        """Extend V to the width of the block with random columns, and orthonormalise all columns."""
        missing = self.width - V.shape[1]
        random = torch.randn(self.n, max(0, missing), generator=self.generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(torch.cat([V[:, : self.width], random.to(V.device)], dim=1))[0]


def _factors(chain: list[Jacobian], V: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield, for each operator of the chain, the QR factors of its product with the block, and a bound on rounding.

    Entries of R up to that bound count as zero.
    """
    for J in chain:
        image = J.jvp(V.T.reshape(-1, *J.source_shape).to(J.dtype)).double().reshape(V.shape[1], J.shape[0]).T
        if not bool(image.isfinite().all()):
            raise ValueError(
                f"products with {J} hold NaN or infinity, so it has no singular values: the primal sits where a "
                "function has no derivative, or is too large for the dtype"
            )
        V, R = torch.linalg.qr(image)
        yield V, R, ROUNDING * float(torch.finfo(J.dtype).eps) * float(torch.linalg.matrix_norm(R, 2))


def swept(chain: list[Jacobian], V: Tensor) -> tuple[Tensor, np.ndarray]:
    """Sweep the orthonormal block V (n, p) through the chain once.

    Returns the left singular vectors (m, r) of the chain's product with V, and the logarithms (r,) of its singular
    values in descending order. The rank r is at most p.
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
    """Compute log |R_ii| after each operator, (D, T), in one forward sweep of a random orthonormal frame.

    ``Lyapunov.frame_growth`` says what it means.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(chain[0].shape[1], T, generator=generator, dtype=torch.float64, device="cpu")
    growth = []
    for _, R, floor in _factors(chain, torch.linalg.qr(random.to(chain[0].device))[0]):
        size = R.diagonal().abs().cpu()
        growth.append(torch.where(size > floor, size, 0.0).log())
    return torch.stack(growth)


def tail_energy(chain: list[Jacobian], Vh: Tensor, probes: int, generator: torch.Generator) -> list[float]:
    """Estimate Σ_{i>T} σ_i² / σ_1² of a chain's product, and the standard error of the estimate.

    ``Vh`` (T, n) are the leading right singular vectors of the product; random ±1 ``probes`` measure the rest.
    """
    V = torch.linalg.qr(Vh.double().T)[0]
    n = V.shape[0]
    signs = (
        torch.randint(0, 2, (n, probes), generator=generator, dtype=torch.float64, device="cpu").to(V.device) * 2 - 1
    )
    block = torch.cat([V[:, :1], signs - V @ (V.T @ signs)], dim=1)  # the first column measures σ_1
    for J in chain:
        tangents = block.T.reshape(-1, *J.source_shape).to(J.dtype)
        block = J.jvp(tangents).double().reshape(len(tangents), -1).T
        largest = float(block.abs().max())
        block = block / largest if largest > 0 else block  # rescaling is safe, since only ratios of columns are used
    energies = block.square().sum(dim=0).cpu()
    if not energies[0] > 0:
        return [0.0, 0.0]
    ratios = energies[1:] / energies[0]
    error = float(ratios.std()) / math.sqrt(probes) if probes > 1 else math.inf
    return [float(ratios.mean()), error]
