"""The anchor of an iterated block: where x ↦ r Π(x)/‖Π(x)‖ comes to rest, and how fast.

A pre-norm block adds to the residual whatever its norm is, so iterated as it is it has no fixed point: its norm grows
(:func:`norm_growth`). What can come to rest is the direction. The norm in front of each sublayer makes what a block
adds depend on the direction alone (but for the norm's eps), so a direction is fixed iff what the blocks add to it lies
along it, whatever the radius r; how fast it is reached does depend on r, since a longer residual turns less in a step.

A state is what Π maps: one position's residual (1, width), or a sequence's (L, width), normalised as a whole.
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

SAME = 1e-4  # 1 - |cos| up to which two directions are one
_DENSE = 512  # up to so many dimensions all eigenvalues are as quick as one


class NoDirection(ValueError):
    """A state is zero or not finite, so there is no direction to follow."""


@dataclass(frozen=True)
class Anchors:
    """Where the normalised iteration went from S starts. States have the shape (\\*shape,).

    ``directions`` (S, \\*shape): the last point of each, of norm 1. ``period`` int64 (S,): 1 where the direction is
    fixed, p where it comes back after p steps, 0 where neither was seen. ``sign`` int64 (S,): -1 where it comes back
    as its opposite, else 1. ``steps`` int64 (S,): steps until the direction was fixed, or all that were made.
    ``turned`` float64 (steps, S): how far each step turned the direction, ‖x' ∓ x‖/r, NaN after it was fixed.
    ``axis`` (S, \\*shape): the first principal direction of the last points, sign open; with an anchor, the anchor.
    ``concentration`` float64 (S,): its share of these points' energy, 1 for an anchor.
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
        """Bool (S,): from which starts a fixed direction was reached."""
        found: np.ndarray = self.period == 1
        return found

    @property
    def agreement(self) -> float:
        """The least |cos| of any two starts' axes: 1 where there is one direction up to its sign."""
        flat = self.axis.flatten(1)
        return float((flat @ flat.T).abs().min())

    @property
    def unique(self) -> bool:
        """Whether every start reached a fixed direction, and all the same one up to sign."""
        return bool(self.settled.all()) and self.agreement >= 1 - SAME

    def part(self, starts: slice) -> "Anchors":
        """Of some of the starts only."""
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
        """A start for each different direction that was reached, the first of each."""
        kept: list[int] = []
        flat = self.directions.flatten(1)
        for i in np.flatnonzero(self.settled).tolist():
            if all(float((flat[i] @ flat[j]).abs()) < 1 - SAME for j in kept):
                kept.append(i)
        return kept


def block_map(model: CircuitGPT, layers: Sequence[int] | None = None) -> Map:
    """Π: (S, L, width) → (S, L, width), the blocks ``layers`` one after the other (None: all).

    Causal attention among the L positions; ablations and interventions in force at the call count. Learned positions
    are added at the embedding and so aren't added again; concatenated ones are those of positions 0 to L - 1.
    ValueError for a layer that there isn't.
    """
    count = model.config.n_layer
    chosen = list(range(count)) if layers is None else list(layers)
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"layers are {chosen}; give one or more of 0 to {count - 1}")

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
    """Iterate x ↦ r Π(x)/‖Π(x)‖ from each of ``starts`` (S, \\*shape), of any norm but zero; ``radius``: r, one for all
    or one a start.

    A direction counts as fixed when a step turns it by at most ``tol``; a cycle of up to ``longest`` steps as found
    when it comes back that near. float64 is advised. NoDirection for a start that is zero or not finite, for a Π that
    gives zero or what isn't finite; ValueError for a radius that isn't above 0.
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
        _check(after, "what the map gave")
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
    points = torch.stack([each.flatten(1) for each in tail], dim=1)
    _, sizes, axes = torch.linalg.svd(points, full_matrices=False)
    share = (sizes[:, 0] ** 2 / (sizes**2).sum(dim=1)).double().cpu().numpy()
    shape = starts.shape[1:]
    last = tail[-1] / scale
    return Anchors(last, period, sign, needed, turned, axes[:, 0].reshape(count, *shape), share)


def spectral_radius(function: Map, direction: Tensor, *, radius: float = 1.0, seed: int = 0) -> float:
    """The largest |eigenvalue| of the derivative of x ↦ r Π(x)/‖Π(x)‖ at a fixed ``direction`` (\\*shape,), along the
    sphere: below 1, what is near comes nearer, by that factor a step.

    All eigenvalues in up to 512 dimensions, else the largest by ARPACK (Lehoucq, Sorensen and Yang 1998), from
    products with tangents alone. A TopK keeps the support that it has there. 0 in one dimension, where nothing turns.
    NaN where ARPACK finds none.
    """
    shape, n = direction.shape, direction.numel()
    unit = direction.flatten() / torch.linalg.vector_norm(direction)
    step = _normalised(function, radius)
    if n < 2:
        return 0.0

    def product(block: Tensor) -> Tensor:
        """(T, n) → (T, n), both cut to the sphere's tangents."""
        tangents = block - (block @ unit)[:, None] * unit
        at = (radius * unit).reshape(1, *shape).repeat(len(block), *[1] * len(shape))
        with torch.no_grad(), ALONE:
            moved = jvp(step, (at,), (tangents.reshape(-1, *shape),))[1].flatten(1)
        return moved - (moved @ unit)[:, None] * unit

    if n <= _DENSE:
        matrix = product(torch.eye(n, dtype=unit.dtype, device=unit.device))
        return float(torch.linalg.eigvals(matrix).abs().max())

    def apply(v: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(v).reshape(1, -1)).to(unit)
        found: np.ndarray = product(given)[0].double().cpu().numpy()
        return found

    start = np.random.default_rng(seed).standard_normal(n)
    try:
        values = eigs(LinearOperator((n, n), matvec=apply, dtype=np.float64), k=1, v0=start, tol=1e-6)[0]
    except ArpackNoConvergence as error:
        values = error.eigenvalues
    return float(np.abs(values).max()) if len(values) else float("nan")


@torch.no_grad()
def norm_growth(function: Map, starts: Tensor, steps: int) -> np.ndarray:
    """‖Πⁿ(x)‖ for n = 0 … ``steps``, nothing normalised: float64 (steps + 1, S)."""
    rows, x = [_norms(starts).flatten()], starts
    for _ in range(steps):
        x = function(x)
        rows.append(_norms(x).flatten())
    found: np.ndarray = torch.stack(rows).double().cpu().numpy()
    return found


def _apart(after: Tensor, before: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distance up to sign, and the sign: -1 where ``after`` is nearer to the opposite of ``before``."""
    plus, minus = _norms(after - before).flatten(), _norms(after + before).flatten()
    sign = torch.where(minus < plus, -1, 1)
    return torch.minimum(plus, minus).double().cpu().numpy(), sign.cpu().numpy()


def _check(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()) or bool((_norms(x) == 0).any()):
        raise NoDirection(f"{what} is zero or not finite, and has no direction; give other starts or another map")
