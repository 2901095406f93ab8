"""Where a model's blocks lead when they are iterated on their own output, with every step normalised."""

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

_SEQUENCE = 4  # positions of a state that is a sequence, if the prompts have that many
_TOL = 1e-7  # a direction counts as fixed if a step turns it by at most this share of the norm
_GROWTH = 50  # steps of the iteration without normalisation


@dataclass(frozen=True)
class Settling:
    """What came of iterating one map.

    Attributes:
        unit: Which map, in words.
        positions: How many positions its state has.
        layer: The block that is iterated; None for the whole stack.
        rows: One table row for each radius.
        turned: By radius, how far each step turned the direction, (steps, starts).
        axis: The anchor (positions · width,) at the radius where most starts settled. If there is none, the first
            principal direction of where the orbits ended.
        growth: ‖Πⁿ(x)‖ without normalisation, from starts of norm 1, (steps + 1, starts).
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
        """Whether at some radius all starts reached the same direction up to sign, and this direction attracts."""
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
    """Iterate the whole stack on one position and on a sequence and, with ``layers``, each block on one position.

    Every map is started from ``starts`` Gaussian directions and from the residuals of as many texts, taken where the
    map begins; a map on one position starts from the last token's residual. All of it is done in float64.

    Args:
        model: The model; it is not changed.
        texts: Token ids of prompts.
        radii: Norms to which the state is scaled at every step.
        starts: Random starts, and as many from texts.
        iterations: The most steps.
        layers: Whether each block is iterated by itself too.
        seed: Seed of the random starts.

    Raises:
        Refused: A state became zero or not finite, so that it has no direction.
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
    settled = []
    for unit, layer, positions in units:
        residuals = entrances[layer or 0]
        own = torch.stack([x[-1:] if positions == 1 else x[:positions] for x in residuals])
        drawn = torch.randn(starts, *own.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        start_states = torch.cat([drawn.to(own.device), own])
        # A single block is iterated at the first radius only: which direction is fixed doesn't depend on the radius.
        settled.append(_settle(double, unit, layer, start_states, radii if layer is None else radii[:1], iterations))
    return settled


def _settle(
    model: CircuitGPT, unit: str, layer: int | None, starts: Tensor, radii: Sequence[int], iterations: int
) -> Settling:
    function = block_map(model, None if layer is None else [layer])
    starts = starts / torch.linalg.vector_norm(starts, dim=(1, 2), keepdim=True)
    rows, turned, ends = [], {}, []
    count = len(starts)
    all_radii = [float(radius) for radius in radii for _ in range(count)]
    # All radii go in one batch, which makes a step hardly slower.
    try:
        together = find_anchors(function, starts.repeat(len(radii), 1, 1), radius=all_radii, tol=_TOL, steps=iterations)
    except NoDirection as error:
        raise Refused(f"{unit}: {error}") from error
    for i, radius in enumerate(radii):
        anchors = together.part(slice(i * count, (i + 1) * count))
        rows.append(_row(function, anchors, radius, unit))
        turned[radius] = anchors.turned
        ends.append(anchors.axis)
    best = max(range(len(rows)), key=lambda i: (rows[i]["unique"], rows[i]["settled"]))
    axis = torch.linalg.svd(ends[best].flatten(1), full_matrices=False)[2][0]
    growth = norm_growth(function, starts, _GROWTH)
    return Settling(unit, starts.shape[1], layer, rows, turned, axis.cpu().numpy(), growth)


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
    """The residual stream (tokens, width) at the entrance of each layer: a list of layers, each a list over prompts."""
    names = [f"{i}.resid_in" for i in range(model.config.n_layer)]
    by_layer: list[list[Tensor]] = [[] for _ in names]
    for text in texts:
        acts = model.run_with_cache(
            torch.tensor([text], device=model.device, dtype=torch.int64), names=names, stop_at=names[-1]
        )[1]
        for rows, name in zip(by_layer, names, strict=True):
            rows.append(acts[name][0])
    return by_layer
