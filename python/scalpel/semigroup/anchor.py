"""The anchor of an iterated block: where x ↦ r Π(x)/‖Π(x)‖ comes to rest, and how fast.

A pre-norm block adds to the residual whatever the residual's norm is, so iterating the block itself has no fixed point:
the norm grows (:func:`norm_growth`). What can come to rest is the direction. Because of the norm in front of each
sublayer, what a block adds depends only on the direction (except for the norm's eps). A direction is therefore fixed
iff what the blocks add to it lies along it, whatever the radius r. How fast it is reached does depend on r, because a
longer residual turns less in a step.

A state is what Π maps: the residual of one position (1, width) or of a sequence (L, width), normalised as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs
from torch import Tensor
from torch.func import jvp

from ..hooks.running import ALONE
from ..models.circuitgpt.layers import LayerInputs
from ..models.circuitgpt.model import CircuitGPT

__all__ = ["Anchors", "NoDirection", "block_map", "find_anchors", "norm_growth", "spectral_radius"]

Map = Callable[[Tensor], Tensor]

SAME = 1e-4  # the largest 1 - |cos| at which two directions count as one
_DENSE = 512  # the number of dimensions up to which all eigenvalues are as fast to compute as one


class NoDirection(ValueError):
    """A state is zero or not finite, so it has no direction."""


@dataclass(frozen=True)
class Anchors:
    """Where the normalised iteration went from S starts, whose states have the shape (shape...,).

    Attributes:
        directions: The last point from each start, of norm 1, (S, shape...).
        period: int64 (S,): 1 if the direction is fixed, p if it returns after p steps, 0 if neither was seen.
        sign: int64 (S,): -1 if it returns as its opposite, else 1.
        steps: int64 (S,): the number of steps until the direction was fixed, or all steps made.
        turned: float64 (steps, S): how far each step turned the direction, ‖x' ∓ x‖/r; NaN after it was fixed.
        axis: The first principal direction of the last points, with arbitrary sign, (S, shape...). If there is an
            anchor, it is the anchor.
        concentration: float64 (S,): the axis's share of the energy of these points, 1 for an anchor.
    """

    directions: Tensor
    period: np.ndarray
    sign: np.ndarray
    steps: np.ndarray
    turned: np.ndarray
    axis: Tensor
    concentration: np.ndarray

    @property
    def settled(self) -> np.ndarray:
        """From which starts a fixed direction was reached, bool (S,)."""
        settled: np.ndarray = self.period == 1
        return settled

    @property
    def agreement(self) -> float:
        """The smallest |cos| between the axes of two starts: 1 if there is one direction up to its sign."""
        flat = self.axis.flatten(1)
        return float((flat @ flat.T).abs().min())

    @property
    def unique(self) -> bool:
        """Whether every start reached a fixed direction, the same one up to its sign."""
        return bool(self.settled.all()) and self.agreement >= 1 - SAME

    def part(self, starts: slice) -> "Anchors":
        """Select some of the starts."""
        return Anchors(
            self.directions[starts],
            self.period[starts],
            self.sign[starts],
            self.steps[starts],
            self.turned[:, starts],
            self.axis[starts],
            self.concentration[starts],
        )

    @property
    def found(self) -> list[int]:
        """The first start of each different direction that was reached."""
        kept: list[int] = []
        flat = self.directions.flatten(1)
        for i in np.flatnonzero(self.settled).tolist():
            if all(float((flat[i] @ flat[j]).abs()) < 1 - SAME for j in kept):
                kept.append(i)
        return kept


def block_map(model: CircuitGPT, layers: Sequence[int] | None = None) -> Map:
    """Build Π: (S, L, width) → (S, L, width), which applies the blocks ``layers`` one after the other (None: all).

    The L positions attend causally, and ablations and interventions that are active at the call count. Learned
    positions are added at the embedding, so they are not added again; concatenated positions are those from 0 to L - 1.

    Raises:
        ValueError: If there is no such layer.
    """
    count = model.config.n_layer
    chosen = list(range(count)) if layers is None else list(layers)
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"layers are {chosen}; they must be one or more of 0 to {count - 1}")

    def go(x: Tensor) -> Tensor:
        length = x.shape[-2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        concatenated = model.config.d_pos_emb is not None
        positions = model.transformer.wpe.weight[:length] if concatenated else None
        tap = model._composed_tap(None)
        for i in chosen:
            x = model.transformer.h[i](x, LayerInputs(str(i), tap, allowed, positions))
        return x

    return go


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.dim() - 1))


def _normalised(function: Map, radius: float | Tensor) -> Map:
    def go(x: Tensor) -> Tensor:
        moved = function(x)
        return moved * (radius / _norms(moved))

    return go


@torch.no_grad()
def find_anchors(
    function: Map,
    starts: Tensor,
    *,
    radius: float | Sequence[float] = 1.0,
    tol: float = 1e-8,
    steps: int = 300,
    longest: int = 16,
) -> Anchors:
    """Iterate x ↦ r Π(x)/‖Π(x)‖ from each start.

    A direction counts as fixed when a step turns it by at most ``tol``, and a cycle of up to ``longest`` steps as found
    when it returns that closely. float64 is advisable.

    Args:
        function: Π, which maps states (S, shape...) to states of the same shape.
        starts: The starts (S, shape...), of any norm except zero.
        radius: r, one for all starts or one for each.
        tol: The tolerance, relative to the radius.
        steps: The largest number of steps.
        longest: The longest cycle to look for.

    Returns:
        Where the iteration went.

    Raises:
        NoDirection: If a start or a value of Π is zero or not finite.
        ValueError: If a radius is not above 0, or steps or longest is below 1.
    """
    count = len(starts)
    radii = np.broadcast_to(np.asarray(radius, dtype=float), (count,))
    if not (radii > 0).all() or steps < 1 or longest < 1:
        raise ValueError(f"radius is {radius}, steps {steps}, longest {longest}; radius > 0 and the others 1 or more")
    scale = torch.from_numpy(radii.copy()).to(starts).reshape(-1, *[1] * (starts.dim() - 1))
    x = starts * (scale / _norms(starts))
    _check(x, "a start")
    step = _normalised(function, scale)
    needed = np.full(count, steps)
    open_, turned = np.ones(count, dtype=bool), np.full((steps, count), np.nan)
    for n in range(steps):
        after = step(x)
        _check(after, "a value of the map")
        size = _apart(after, x)[0] / radii
        turned[n, open_] = size[open_]
        x = after
        needed[open_ & (size <= tol)] = n + 1
        open_ &= size > tol
        if not open_.any():
            turned = turned[: n + 1]
            break
    tail = [x]
    for _ in range(longest):
        tail.append(step(tail[-1]))
    period, sign = np.where(open_, 0, 1), np.ones(count, dtype=np.int64)
    for p in range(longest, 0, -1):
        size, signs = _apart(tail[p], tail[0])
        back = (size / radii <= tol) & (open_ | (p == 1))
        period[back & open_] = p
        sign[back] = signs[back]
    points = torch.stack([point.flatten(1) for point in tail], dim=1)
    _, sizes, axes = torch.linalg.svd(points, full_matrices=False)
    share = (sizes[:, 0] ** 2 / (sizes**2).sum(dim=1)).double().cpu().numpy()
    shape = starts.shape[1:]
    last = tail[-1] / scale
    return Anchors(last, period, sign, needed, turned, axes[:, 0].reshape(count, *shape), share)


def spectral_radius(function: Map, direction: Tensor, *, radius: float = 1.0, seed: int = 0) -> float:
    """Compute the largest |eigenvalue| of the derivative of x ↦ r Π(x)/‖Π(x)‖ along the sphere, at a fixed direction.

    If it is below 1, nearby states come closer by that factor in each step. In up to 512 dimensions all eigenvalues are
    computed, else the largest by ARPACK (Lehoucq, Sorensen and Yang 1998), from products with tangents. A TopK keeps
    the support that it has there. In one dimension, where nothing turns, the result is 0. It is NaN if ARPACK does not
    converge.
    """
    shape, n = direction.shape, direction.numel()
    unit = direction.flatten() / torch.linalg.vector_norm(direction)
    step = _normalised(function, radius)
    if n < 2:
        return 0.0

    def product(block: Tensor) -> Tensor:
        """Map (T, n) → (T, n), both projected onto the sphere's tangents."""
        tangents = block - (block @ unit)[:, None] * unit
        at = (radius * unit).reshape(1, *shape).repeat(len(block), *[1] * len(shape))
        with torch.no_grad(), ALONE:
            moved = jvp(step, (at,), (tangents.reshape(-1, *shape),))[1].flatten(1)
        return moved - (moved @ unit)[:, None] * unit

    if n <= _DENSE:
        matrix = product(torch.eye(n, dtype=unit.dtype, device=unit.device))
        return float(torch.linalg.eigvals(matrix).abs().max())

    def apply(v: np.ndarray) -> np.ndarray:
        tangent = torch.from_numpy(np.ascontiguousarray(v).reshape(1, -1)).to(unit)
        moved: np.ndarray = product(tangent)[0].double().cpu().numpy()
        return moved

    start = np.random.default_rng(seed).standard_normal(n)
    try:
        values = eigs(LinearOperator((n, n), matvec=apply, dtype=np.float64), k=1, v0=start, tol=1e-6)[0]
    except ArpackNoConvergence as error:
        values = error.eigenvalues
    return float(np.abs(values).max()) if len(values) else float("nan")


@torch.no_grad()
def norm_growth(function: Map, starts: Tensor, steps: int) -> np.ndarray:
    """Compute ‖Πⁿ(x)‖ for n = 0 … ``steps`` without normalising: float64 (steps + 1, S)."""
    rows, x = [_norms(starts).flatten()], starts
    for _ in range(steps):
        x = function(x)
        rows.append(_norms(x).flatten())
    norms: np.ndarray = torch.stack(rows).double().cpu().numpy()
    return norms


def _apart(after: Tensor, before: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compute the distance up to sign, and the sign: -1 where ``after`` is closer to the opposite of ``before``."""
    plus, minus = _norms(after - before).flatten(), _norms(after + before).flatten()
    sign = torch.where(minus < plus, -1, 1)
    return torch.minimum(plus, minus).double().cpu().numpy(), sign.cpu().numpy()


def _check(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()) or bool((_norms(x) == 0).any()):
        raise NoDirection(f"{what} is zero or not finite, so it has no direction; use other starts or another map")
