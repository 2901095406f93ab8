"""Where a model's blocks lead when they are iterated on their own output, each step normalised: one table a model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from ...semigroup.anchor import Anchors, NoDirection, block_map, find_anchors, norm_growth, spectral_radius
from ...tasks.refused import Refused

__all__ = ["Settling", "settling"]

_SEQUENCE = 4  # positions of the state that is a sequence, where the prompts have so many
_TOL = 1e-7  # turn in a step, of the norm, at which a direction counts as fixed
_GROWTH = 50  # steps of the iteration that isn't normalised


@dataclass(frozen=True)
class Settling:
    """One map iterated.

    ``unit`` says which; ``rows``: one a radius; ``turned``: {radius: (steps, starts)} how far each step turned the
    direction; ``axis`` (L · width,): the anchor, or where there is none the first principal direction of where the
    orbits ended, of the radius at which most settled; ``growth`` (steps + 1, starts): ‖Πⁿ(x)‖, not normalised, from
    starts of norm 1.
    """

    unit: str
    positions: int
    layer: int | None
    rows: list[dict[str, Any]]
    turned: dict[int, np.ndarray]
    axis: np.ndarray
    growth: np.ndarray

    @property
    def best(self) -> dict[str, Any]:
        """The row of the radius at which the most starts settled."""
        return max(self.rows, key=lambda row: (row["unique"], row["settled"]))

    @property
    def has_anchor(self) -> bool:
        """Whether at one of the radii all starts reached one direction up to sign, and it attracts."""
        return any(row["unique"] and row["spectral_radius"] < 1 for row in self.rows)


def settling(
    model: CircuitGPT,
    texts: Sequence[Sequence[int]],
    *,
    radii: Sequence[int],
    starts: int,
    iterations: int,
    layers: bool,
    seed: int,
) -> list[Settling]:
    """The stack of all blocks on one position and on a sequence and, with ``layers``, each block on one position.

    Each from ``starts`` Gaussian directions and the residuals of as many of ``texts``: of one position, the last
    token's at the map's entrance. float64.
    """
    double = copy.deepcopy(model).double().eval()
    chosen = [list(text) for text in texts[:starts]]
    length = min(_SEQUENCE, *map(len, chosen))
    generator = torch.Generator().manual_seed(seed)
    entrances = _residuals(double, chosen)
    units: list[tuple[str, int | None, int]] = [("all blocks, one position", None, 1)]
    units.append((f"all blocks, {length} positions", None, length))
    if layers and model.config.n_layer > 1:
        units += [(f"block {i}, one position", i, 1) for i in range(model.config.n_layer)]
    found = []
    for unit, layer, positions in units:
        at = entrances[layer or 0]
        own = torch.stack([x[-1:] if positions == 1 else x[:positions] for x in at])
        drawn = torch.randn(starts, *own.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        given = torch.cat([drawn.to(own.device), own])
        # a block by itself at the first radius alone: which direction is fixed doesn't depend on it
        found.append(_settle(double, unit, layer, given, radii if layer is None else radii[:1], iterations))
    return found


def _settle(
    model: CircuitGPT, unit: str, layer: int | None, given: Tensor, radii: Sequence[int], iterations: int
) -> Settling:
    function = block_map(model, None if layer is None else [layer])
    given = given / torch.linalg.vector_norm(given, dim=(1, 2), keepdim=True)
    rows, turned, ends = [], {}, []
    count = len(given)
    every = [float(radius) for radius in radii for _ in range(count)]
    # all radii in one batch: a step costs hardly more for it
    try:
        together = find_anchors(function, given.repeat(len(radii), 1, 1), radius=every, tol=_TOL, steps=iterations)
    except NoDirection as error:
        raise Refused(f"{unit}: {error}") from error
    for i, radius in enumerate(radii):
        anchors = together.part(slice(i * count, (i + 1) * count))
        rows.append(_row(function, anchors, radius, unit))
        turned[radius] = anchors.turned
        ends.append(anchors.axis)
    best = max(range(len(rows)), key=lambda i: (rows[i]["unique"], rows[i]["settled"]))
    axis = torch.linalg.svd(ends[best].flatten(1), full_matrices=False)[2][0]
    growth = norm_growth(function, given, _GROWTH)
    return Settling(unit, given.shape[1], layer, rows, turned, axis.cpu().numpy(), growth)


def _row(function: Any, anchors: Anchors, radius: int, unit: str) -> dict[str, Any]:
    contraction = [spectral_radius(function, anchors.directions[i], radius=float(radius)) for i in anchors.found]
    last = [column[np.isfinite(column)][-1] for column in anchors.turned.T]
    return {
        "map": unit,
        "radius": radius,
        "starts": len(anchors.period),
        "settled": float(anchors.settled.mean()),
        "cycles": int((anchors.period > 1).sum()),
        "directions": len(anchors.found),
        "turned_over": int((anchors.sign < 0).sum()),
        "unique": anchors.unique,
        "spectral_radius": max(contraction, default=float("nan")),
        "spectral_radii": contraction,
        "median_steps": float(np.median(anchors.steps)),
        "median_last_turn": float(np.median(last)),
        "least_cos_between_starts": anchors.agreement,
        "concentration": float(np.median(anchors.concentration)),
    }


@torch.no_grad()
def _residuals(model: CircuitGPT, texts: list[list[int]]) -> list[list[Tensor]]:
    """The residual stream (tokens, width) at the entrance of each layer, a list of prompts each."""
    names = [f"{i}.resid_in" for i in range(model.config.n_layer)]
    found: list[list[Tensor]] = [[] for _ in names]
    for text in texts:
        acts = model.run_with_cache(
            torch.tensor([text], device=model.device, dtype=torch.int64), names=names, stop_at=names[-1]
        )[1]
        for rows, name in zip(found, names, strict=True):
            rows.append(acts[name][0])
    return found
