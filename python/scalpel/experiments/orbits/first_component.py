"""Is a direction the first principal component of a model's activations, or of its gradients, at a hook?

Moments are kept by prompt, so that components can be taken anew of prompts drawn again. Both are centered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from ...streams.capture import GRADIENT, Capture
from ..statistics import bootstrap

__all__ = ["Moments", "closeness", "moments_at"]


@dataclass(frozen=True)
class Moments:
    """Counts (prompts,), sums (prompts, width) and sums of x xᵀ (prompts, width, width) of rows x, all float64."""

    counts: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    def components(self, prompts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the variance (width,), descending, and components (width, width) as rows, of some ``prompts``
        (indices, repeats allowed) or all. Shares are NaN where nothing varies."""
        at = np.arange(len(self.counts)) if prompts is None else prompts
        count = self.counts[at].sum()
        mean = self.sums[at].sum(axis=0) / count
        values, vectors = np.linalg.eigh(self.squares[at].sum(axis=0) / count - np.outer(mean, mean))
        values = values[::-1].clip(min=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return values / values.sum(), vectors.T[::-1]


def moments_at(model: CircuitGPT, texts: Sequence[Sequence[int]], hook: str) -> dict[str, Moments]:
    """{"activations", "gradients"} of each token at ``hook``; the loss is the next token's cross-entropy, summed."""
    streams = {"activations": hook, "gradients": hook + GRADIENT}
    capture = Capture(model, list(streams.values()), None)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in streams}
    for text in texts:
        found = capture(torch.tensor([list(text)], device=model.device, dtype=torch.int64), streams.values())
        for name, stream in streams.items():
            rows[name].append(found[stream].double().numpy())
    return {
        name: Moments(
            np.array([len(x) for x in each], dtype=float),
            np.stack([x.sum(axis=0) for x in each]),
            np.stack([x.T @ x for x in each]),
        )
        for name, each in rows.items()
    }


def closeness(
    axis: np.ndarray, moments: Moments, rng: np.random.Generator, *, draws: int = 999, resamples: int = 200
) -> dict[str, Any]:
    """How near ``axis`` (width,), of any length but zero, is to the first component.

    ``cos``: |cos| with it; ``interval``: its 95 % bootstrap interval over prompts; ``nearest``: which component is
    nearest (0: the first), ``cos_nearest`` how near; ``share``: the first component's share of the variance.
    ``p_rotated``: rank of ``cos`` among ``draws`` random directions; ``p_shuffled``: among axes with the same entries
    exchanged between channels, which keeps a few large channels large; ``random``: the 95th percentile of the random
    directions'. NaN, and p of 1, where nothing varies.
    """
    unit = axis / np.linalg.norm(axis)
    shares, components = moments.components()
    if not np.isfinite(shares).all():
        nan = float("nan")
        return {"cos": nan, "interval": (nan, nan), "nearest": -1, "cos_nearest": nan, "share": nan} | {
            "p_rotated": 1.0,
            "p_shuffled": 1.0,
            "random": nan,
        }
    cosines = np.abs(components @ unit)
    count = len(moments.counts)
    interval = bootstrap(lambda drawn: abs(moments.components(drawn)[1][0] @ unit), count, rng, resamples)
    random = rng.standard_normal((draws, len(unit)))
    rotated = np.abs(random @ components[0]) / np.linalg.norm(random, axis=1)
    shuffled = np.abs(rng.permuted(np.tile(unit, (draws, 1)), axis=1) @ components[0])
    return {
        "cos": float(cosines[0]),
        "interval": interval,
        "nearest": int(cosines.argmax()),
        "cos_nearest": float(cosines.max()),
        "share": float(shares[0]),
        "p_rotated": float((1 + (rotated >= cosines[0]).sum()) / (1 + draws)),
        "p_shuffled": float((1 + (shuffled >= cosines[0] - 1e-12).sum()) / (1 + draws)),
        "random": float(np.percentile(rotated, 95)),
    }
