"""Numbers that summarize a spectrum.

λ are the eigenvalues of a covariance, in descending order and at least 0; all of them unless stated otherwise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .eigen import fix_signs

Of = Literal["eigen", "singular"]


def explained(values: Tensor, total: float) -> Tensor:
    """Compute λ_i / Σ_j λ_j, or zeros if nothing varies.

    The sum of the first k is what the best projection on k directions keeps (Eckart & Young 1936).
    """
    return (values / total).clamp_max(1.0) if total > 0 else torch.zeros_like(values)


def effective_rank(values: Tensor, of: Of = "eigen") -> float:
    """Compute exp(−Σ p_i ln p_i), in [1, dim]; 0 if nothing varies.

    of="eigen" takes p_i = λ_i / Σ_j λ_j. of="singular" takes p_i = √λ_i / Σ_j √λ_j, from the singular values of the
    data matrix, as Roy & Vetterli 2007 ("The effective rank: a measure of effective dimensionality", eq. 4) define it.
    """
    weights = values.sqrt() if of == "singular" else values
    total = weights.sum()
    return math.exp(float(torch.special.entr(weights / total).sum())) if total > 0 else 0.0


def effective_rank_bounds(values: Tensor, total: float, dim: int) -> tuple[float, float]:
    """Bound ``effective_rank(of="eigen")`` where only the leading values and the total are known.

    The rest of ``total`` is spread over dim − k values, none of them above the last known one. The entropy is smallest
    if as many of them as possible have that size, and largest if all of them are equal.
    """
    if total <= 0:
        return 0.0, 0.0
    known = float(torch.special.entr(values / total).sum())
    rest, places, top = max(0.0, total - float(values.sum())), dim - len(values), float(values[-1])
    if rest <= 0 or places == 0 or top <= 0:
        return math.exp(known), math.exp(known)
    whole = min(places, int(rest / top))
    left = max(0.0, rest - whole * top)
    least = known + whole * _entropy(top / total) + _entropy(left / total)
    return math.exp(least), math.exp(max(least, known + places * _entropy(rest / places / total)))


def participation_ratio(squares: float) -> float:
    """Compute (Σ λ_i)² / Σ λ_i² from Σ (λ_i / Σλ)², in [1, dim]; 0 if nothing varies.

    Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement", eq. 5.
    """
    return 1 / squares if squares > 0 else 0.0


def stable_rank(largest: float, total: float) -> float:
    """Compute Σ λ_i / λ_1, in [1, dim]; 0 if nothing varies.

    It equals ‖X‖_F² / ‖X‖₂² of the data matrix (Rudelson & Vershynin 2007, "Sampling from large matrices", section 1).
    """
    return total / largest if largest > 0 else 0.0


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Compute the angles between the spans of the orthonormal rows A (k, dim) and B (l, dim).

    Cosines are used where an angle is large and sines where it is small, so that each is accurate (Björck & Golub 1973,
    "Numerical methods for computing angles between linear subspaces").

    Returns:
        min(k, l) angles in radians, in ascending order.
    """
    if len(A) < len(B):
        A, B = B, A
    cosines = torch.linalg.svdvals(B @ A.T).clamp_max(1.0)
    sines = torch.linalg.svdvals(B - (B @ A.T) @ A).clamp_max(1.0).flip(0)
    return torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())


def contrast(A: Tensor, B: Tensor, k: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve A v = λ (B + ridge·tr(B)/dim·I) v for the k largest λ and their v (k, dim) of length 1, in float64.

    Raises:
        ValueError: If B is zero, or the ridge is too small for it.
    """
    level = float(B.trace()) / len(B)
    if level <= 0:
        raise ValueError("nothing varies in other, so this state cannot be compared with it")
    kept_finite = ridge * level * torch.eye(len(B), dtype=B.dtype, device=B.device)
    lower, failed = torch.linalg.cholesky_ex(B + kept_finite)  # B = L Lᵀ
    if int(failed) or not math.isfinite(ridge):
        raise ValueError(f"ridge is {ridge}, with which other's covariance cannot be divided by; use 1e-12 to 1")
    half = torch.linalg.solve_triangular(lower, A, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)  # L⁻¹ A L⁻ᵀ has the same λ
    values, columns = torch.linalg.eigh((whitened + whitened.T) / 2)
    V = torch.linalg.solve_triangular(lower.T, columns.flip(1)[:, :k], upper=True).T
    V = V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
    return values.flip(0)[:k].clamp_min(0), fix_signs(V)


def _entropy(p: float) -> float:
    return -p * math.log(p) if p > 0 else 0.0
