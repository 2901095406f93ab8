"""Rows of a prompt's mean Jacobians between any two points of the residual stream, without the matrices.

Point p is the residual stream after p layers: point 0 is the embedding, and point p the output of block p − 1, which a
Jacobian lens calls layer p − 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...jacobians.precision import without_gradients
from ...jacobians.sweep import Sweep

__all__ = ["Prompt", "SweptPrompt", "hook_at"]


class Prompt(Protocol):
    """One prompt whose Jacobians are averaged over its positions.

    Attributes:
        positions: How many positions count.
        width: The width of the residual stream.
    """

    positions: int
    width: int

    def pull(self, rows: Tensor, signs: Tensor, target: int, sources: Sequence[int]) -> dict[int, Tensor]:
        """Multiply rows by the prompt's mean Jacobians from earlier points to ``target``.

        Args:
            rows: (T, width) vectors u.
            signs: (T, positions) factors z; all 1 for "after", and random signs for an unbiased row of "same".
            target: The point where the cotangents start: z_t u at every position t.
            sources: Points at or before the target.

        Returns:
            {source: (T, width)}, 1/positions · Σ_t z_t (what arrives at t).
        """


def hook_at(point: int, layers: int) -> str:
    """The hook of a point of a model with ``layers`` layers."""
    return "final_resid" if point == layers else f"{point}.resid_in"


class SweptPrompt:
    """A prompt whose rows come from sweeps.

    Args:
        sweep: Makes the sweep from one hook back to another that passes hooks: (hooks in the model's order).
        layers: How many layers the model has.
        positions: How many positions count.
        width: The width of the residual stream.
    """

    def __init__(self, sweep: Callable[[Sequence[str]], Sweep], layers: int, positions: int, width: int) -> None:
        self._sweep, self._layers = sweep, layers
        self.positions, self.width = positions, width

    def pull(self, rows: Tensor, signs: Tensor, target: int, sources: Sequence[int]) -> dict[int, Tensor]:
        hooks = {hook_at(point, self._layers): point for point in sorted({*sources, target})}
        wanted = set(sources)
        sweep = self._sweep(list(hooks))
        rows, signs = rows.to(sweep.device, sweep.dtype), signs.to(sweep.device, sweep.dtype)
        found = {point: torch.zeros_like(rows) for point in wanted}

        def see(hook: str, pulled: Tensor, first: int) -> None:
            point = hooks.get(hook)
            if point in wanted:
                part = slice(first, first + len(pulled))
                found[point][part] = torch.einsum("tc,tcw->tw", signs[part], pulled[:, 0]) / self.positions

        with without_gradients():
            sweep.pull((signs[:, :, None] * rows[:, None, :])[:, None], see)
        return found
