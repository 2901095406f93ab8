"""The defect of composition, estimated without the bias that noise gives to the norm of a difference.

Prompts go in pairs (p, q), which are the units. A unit gives, for every probe row u,
    a_l = u·½(J_p + J_q)^{l→D}              (the left side), and
    b_lm = ½(u·J_p^{m→D} J_q^{l→m} + u·J_q^{m→D} J_p^{l→m})   (the right side: its two factors are from two prompts),
so that E a = u·J̄_{l→D} and E b = u·J̄_{m→D} J̄_{l→m}. With z = a − b, the mean of ⟨z_i, z_j⟩ over pairs of different
units i ≠ j is an unbiased estimate of ‖u(J̄_{l→D} − J̄_{m→D} J̄_{l→m})‖². It never multiplies two values of one
prompt. It is what one gets by taking the left side from one half of the units and the right side from the other half,
by subtracting the noise of both, and by averaging over all ways to form halves. Probes are random signs, for which the
mean of ‖uᵀA‖² is ‖A‖²_F (Hutchinson 1989).

Everything that follows needs only the inner products of units, for each probe: (units, units).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .transports import Prompt

__all__ = ["Products", "exchanged", "measure", "relative", "split_halves", "squares"]

KINDS = ("after", "same")


@dataclass(frozen=True)
class Products:
    """Inner products of units, each (pairs of points, probes, units, units), for one kind of targets.

    Attributes:
        defect: Of z, left less right.
        moved: Of the left side less the probe itself: rows of J̄_{l→D} − I.
        left: Of the left side.
    """

    defect: np.ndarray
    moved: np.ndarray
    left: np.ndarray


def measure(
    prompts: Sequence[Prompt], pairs: Sequence[tuple[int, int]], end: int, probes: int, seed: int
) -> dict[str, Products]:
    """Measure prompts, an even number of them, whose neighbours 2i and 2i + 1 form a unit.

    Args:
        prompts: The prompts; each may be made when it is asked for.
        pairs: (l, m), points with l < m < end.
        end: The point D.
        probes: How many rows u.
        seed: Of the probes, and of the signs of "same", which each prompt draws anew.

    Returns:
        The products for "after" and for "same".
    """
    generator = torch.Generator().manual_seed(seed)
    sources = sorted({l for l, _ in pairs})  # noqa: E741
    middles = sorted({m for _, m in pairs})
    left: list[dict[int, Tensor]] = []
    right: list[dict[tuple[int, int], Tensor]] = []
    rows: Tensor | None = None
    for first in range(0, len(prompts), 2):
        two = prompts[first], prompts[first + 1]
        width = two[0].width
        if rows is None:
            rows = _signs(probes, width, generator=generator).repeat(2, 1)  # one block for "after", one for "same"
        whole = [prompt.pull(rows, _kinds(probes, prompt, generator), end, [*sources, *middles]) for prompt in two]
        left.append({point: ((whole[0][point] + whole[1][point]) / 2).double().cpu() for point in sources})
        products: dict[tuple[int, int], Tensor] = {}
        for m in middles:
            below = [l for l, middle in pairs if middle == m]  # noqa: E741
            for outer, prompt in ((whole[0], two[1]), (whole[1], two[0])):
                pulled = prompt.pull(outer[m], _kinds(probes, prompt, generator), m, below)
                for l in below:  # noqa: E741
                    half = pulled[l].double().cpu() / 2
                    products[l, m] = products[l, m] + half if (l, m) in products else half
        right.append(products)
    assert rows is not None
    found = {}
    for number, kind in enumerate(KINDS):
        block = slice(number * probes, (number + 1) * probes)
        u = rows[block].double()
        defect, moved, own = [], [], []
        for l, m in pairs:  # noqa: E741
            a = torch.stack([unit[l][block] for unit in left])  # (units, probes, width)
            b = torch.stack([unit[l, m][block] for unit in right])
            defect.append(_gram(a - b))
            moved.append(_gram(a - u))
            own.append(_gram(a))
        found[kind] = Products(np.stack(defect), np.stack(moved), np.stack(own))
    return found


def _signs(*shape: int, generator: torch.Generator) -> Tensor:
    """Random signs."""
    return torch.randint(0, 2, shape, generator=generator, device="cpu", dtype=torch.int64).mul_(2).sub_(1).float()


def _kinds(probes: int, prompt: Prompt, generator: torch.Generator) -> Tensor:
    """The factors of a prompt's positions: ones for the rows of "after", and one draw of signs for those of "same"."""
    ones = torch.ones(probes, prompt.positions, dtype=torch.float32, device="cpu")
    return torch.cat([ones, _signs(probes, prompt.positions, generator=generator)])


def _gram(values: Tensor) -> np.ndarray:
    """Inner products between units, (probes, units, units), of values (units, probes, width)."""
    rows = values.transpose(0, 1)
    gram: np.ndarray = (rows @ rows.mT).numpy()
    return gram


# ---- estimates -------------------------------------------------------------------------------------------------


def squares(gram: np.ndarray, units: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """The squared norm of a mean, unbiased: the mean of products between different units.

    Args:
        gram: (pairs, probes, units, units).
        units: (draws, units), how often each unit was drawn. A unit that was drawn twice is not multiplied by itself.
        probes: (draws, probes), how often each probe was drawn.

    Returns:
        (draws, pairs), the mean over probes.
    """
    weights = probes / probes.sum(1, keepdims=True)
    mixed = np.einsum("dk,pkij->dpij", weights, gram, optimize=True)
    all_products = np.einsum("dpij,di,dj->dp", mixed, units, units, optimize=True)
    own = np.einsum("dpii,di->dp", mixed, units.astype(float) ** 2, optimize=True)
    count = units.sum(1) ** 2 - (units.astype(float) ** 2).sum(1)
    found: np.ndarray = (all_products - own) / count[:, None]
    return found


def relative(products: Products, units: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """(‖J̄_{l→D} − J̄_{m→D} J̄_{l→m}‖ / ‖J̄_{l→D} − I‖)², (draws, pairs); noise may make it negative."""
    moved = squares(products.moved, units, probes)
    moved = np.where(moved > 0, moved, np.nan)  # J̄ can't be told from I
    found: np.ndarray = squares(products.defect, units, probes) / moved
    return found


def exchanged(products: Products, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The null of split halves: the estimate with the left and the right side exchanged in a random half of the units.

    That is half the difference between z of one half and z of the other: its truth is 0, and its noise is that of z.

    Returns:
        Squares relative to ‖J̄_{l→D} − I‖², (draws, pairs).
    """
    return _between_halves(products.defect, products.moved, rng, draws) / 4


def split_halves(products: Products, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The same estimate between J̄_{l→D} of one half and of the other, whose truth is 0, too.

    Its noise is larger than the defect's, in which the two sides share the scatter of their unit. So it is shown and
    doesn't decide.

    Returns:
        Squares relative to ‖J̄_{l→D} − I‖², (draws, pairs).
    """
    return _between_halves(products.left, products.moved, rng, draws)


def _between_halves(gram: np.ndarray, moved: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """The squared difference between means of random halves, unbiased and relative to ``moved``, (draws, pairs)."""
    pairs, probes, count, _ = gram.shape
    scale = squares(moved, np.ones((1, count)), np.ones((1, probes)))
    mean = gram.mean(1)
    one = _halves(count, rng, draws).astype(float)
    found = np.zeros((draws, pairs))
    for half in (one, 1 - one):
        size = half.sum(1, keepdims=True)
        own = np.einsum("pij,di,dj->dp", mean, half, half, optimize=True) - np.einsum("pii,di->dp", mean, half)
        found += own / (size * (size - 1))
    between = np.einsum("pij,di,dj->dp", mean, one, 1 - one, optimize=True)
    found -= 2 * between / (one.sum(1) * (1 - one).sum(1))[:, None]
    result: np.ndarray = found / np.where(scale > 0, scale, np.nan)
    return result


def _halves(count: int, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Random halves of ``count`` units, bool (draws, count)."""
    halves: np.ndarray = rng.permuted(np.tile(np.arange(count) < count // 2, (draws, 1)), axis=1)
    return halves
