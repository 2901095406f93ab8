"""What the tests of validity radii share: an oracle that examines the masks of every pair of every row."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import scalpel
from scalpel.hooks.masks import watch_masks
from scalpel.hooks.positions import add_at, select
from scalpel.jacobians.operator import Jacobian

CLOSE = {"rtol": 1e-9, "atol": 0.0}
Taken = Callable[[str, Tensor], Tensor | None]  # the rows of a mask that count, (B, L); None: all rows


def tangents(J: Jacobian, count: int = 3, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *J.source_shape, generator=generator, dtype=torch.float64).to(J.dtype)


def flip_of_row(x: Tensor, t: Tensor, k: int | None) -> float:
    """Find the masks between all steps at which two entries, or an entry and zero, have the same magnitude.

    As in the library, a step at which every dropped entry passes through zero together with a kept one counts as a
    flip.
    """
    pairs = [-x / t]
    if k is not None:
        for sign in (1, -1):
            pairs.append(((sign * x[:, None] - x) / (t - sign * t[:, None])).flatten())
    steps = torch.cat(pairs)
    steps = torch.cat([steps.new_zeros(1), steps[steps.isfinite() & (steps > 0)]]).sort().values
    steps = steps[torch.cat([torch.tensor([True]), steps.diff() > 1e-12 * steps[1:]])]  # the same root, found twice
    between = torch.cat([(steps[1:] + steps[:-1]) / 2, steps[-1:] * 2 + 1])

    def masks(at: Tensor) -> Tensor:
        return at > 0 if k is None else scalpel.topk_mask(at.abs(), k)

    kept = masks(x)
    changed = (masks(x + between[:, None] * t) != kept).any(-1)
    if k is not None and bool(t[~kept].any()):
        there = (x + steps[:, None] * t).abs()
        meet = torch.maximum(there[:, ~kept].amax(-1), there[:, kept].amin(-1)) < 1e-12
        changed |= meet & (steps > 0)
    changed = changed.nonzero()
    return float(steps[changed[0, 0]]) if len(changed) else math.inf


def flips_of_masks(
    model: scalpel.CircuitGPT, ids: Tensor, source: str, v: Tensor, at: Any = None, taken: Any = None, **inputs: Any
) -> list[tuple[float, str]]:
    """The (step, name) of each mask after ``source``, with tangents from two backward passes, not a forward one."""
    chosen = select(at, ids.shape[1], "source")
    seen: list[tuple[str, Tensor, int | None]] = []

    def inputs_of_masks(delta: Tensor) -> tuple[Tensor, ...]:
        seen.clear()

        def tap(name: str, value: Tensor) -> Tensor:
            return add_at(value, delta, chosen) if name == source else value

        with watch_masks(lambda name, x, k: seen.append((name, x, k))):
            model(ids, tap=tap, **inputs)
        return tuple(x + 0 * delta.sum() for _, x, _ in seen)

    moved = torch.autograd.functional.jvp(inputs_of_masks, torch.zeros_like(v), v)[1]
    found = []
    for (name, x, k), t in zip(seen, moved, strict=True):
        rows = None if taken is None else taken(name, x)
        pick = torch.ones(x.shape[:-1], dtype=torch.bool) if rows is None else rows
        steps = [flip_of_row(a, b, k) for a, b in zip(x.detach()[pick], t.detach()[pick], strict=True)]
        found.append((min(steps, default=math.inf), name))
    return found


def check(J: Jacobian, V: Tensor, found: list[list[tuple[float, str]]]) -> None:
    result = J.validity_radius(V)
    first = [min(flips, key=lambda pair: pair[0], default=(math.inf, "")) for flips in found]
    expected = torch.tensor([step for step, _ in first], dtype=torch.float64)
    torch.testing.assert_close(result.radius, expected, **CLOSE)
    assert result.first == [None if math.isinf(step) else name for step, name in first]
