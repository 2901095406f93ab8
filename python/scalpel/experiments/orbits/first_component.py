"""How near a direction is to the first principal component of a model's activations, or of its gradients, at a hook.

Moments are kept by prompt, so that the components of resampled prompts are cheap. Both covariances are centered.
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
    """By prompt, the number of rows x, their sum (width,) and the sum of x xᵀ (width, width), all float64."""

    counts: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    def components(self, prompts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(shares of the variance (width,), descending; components (width, width) as rows).

        ``prompts``: indices of the prompts to use, with repeats allowed; by default all. The shares are NaN if nothing
        varies.
        """
        chosen = np.arange(len(self.counts)) if prompts is None else prompts
        count = self.counts[chosen].sum()
        mean = self.sums[chosen].sum(axis=0) / count
        values, vectors = np.linalg.eigh(self.squares[chosen].sum(axis=0) / count - np.outer(mean, mean))
        values = values[::-1].clip(min=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return values / values.sum(), vectors.T[::-1]


def moments_at(model: CircuitGPT, texts: Sequence[Sequence[int]], hook: str) -> dict[str, Moments]:
    """Moments of "activations" and "gradients" over tokens at ``hook``.

    The gradients are those of the summed cross-entropy of the next token.
    """
    streams = {"activations": hook, "gradients": hook + GRADIENT}
    capture = Capture(model, list(streams.values()), None)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in streams}
    for text in texts:
        values = capture(torch.tensor([list(text)], device=model.device, dtype=torch.int64), streams.values())
        for name, stream in streams.items():
            rows[name].append(values[stream].double().numpy())
    return {
        name: Moments(
            np.array([len(x) for x in by_text], dtype=float),
            np.stack([x.sum(axis=0) for x in by_text]),
            np.stack([x.T @ x for x in by_text]),
        )
        for name, by_text in rows.items()
    }


def closeness(
    axis: np.ndarray, moments: Moments, rng: np.random.Generator, *, draws: int = 999, resamples: int = 200
) -> dict[str, Any]:
    """Measure how near ``axis`` (width,), of any length but zero, is to the first principal component.

    If nothing varies, the figures are NaN and the p-values 1.

    Args:
        axis: The direction.
        moments: Moments of the rows.
        rng: Draws random directions and resamples prompts.
        draws: Random directions, and as many shuffled axes.
        resamples: Bootstrap resamples of the prompts.

    Returns:
        "cos": |cos| with the first component; "interval": its 95 % bootstrap interval over prompts; "nearest": the
        number of the nearest component, 0 being the first; "cos_nearest": |cos| with that one; "share": the first
        component's share of the variance; "p_rotated": p by the rank of "cos" among random directions; "p_shuffled":
        p by its rank among axes with the entries exchanged between channels, which keeps a few large entries large;
        "random": the 95th percentile of |cos| for random directions.
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
