"""Is what the head measures a mean? Uniformity, decay and sink along long contexts; where its statistic crosses θ."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import long_lists
from . import head as h

__all__ = ["MEAN_RULE", "is_mean", "measure", "statistic_figure"]

QUESTIONS = 10
LEAST_UNIFORMITY, MOST_DECAY, MOST_DRIFT = 0.9, 0.1, 0.2
MEAN_RULE = (
    f"A head measures a mean iff its uniformity A² / (n Σ a²) is at least {LEAST_UNIFORMITY}, |mean decay| · n at most "
    f"{MOST_DECAY}, and its sink term σ at the longest contexts is within {MOST_DRIFT:.0%} of that at the second "
    "shortest (of half a token, where that is more)."
)


def measure(model: CircuitGPT, head: h.Head, k: int, length: int, *, prompts: int, seed: int) -> dict[str, np.ndarray]:
    """Means over prompts at about QUESTIONS lengths spread over the context, for lists of evidence k at depth 2.

    ``n``, ``m``, ``attended``, ``sigma``, ``uniformity``, ``decay``: each (questions,), see :class:`.head.Reading`;
    ``m_spread`` the standard deviation of m over prompts.
    """
    assert model.tokenizer is not None
    block = model.config.block_size
    lists = long_lists(model.tokenizer, k, length, prompts, block_size=block, depth=2, seed=1000 * seed + 8)
    asked = np.unique(np.linspace(0, lists.asked.shape[1] - 1, QUESTIONS).round().astype(int))
    reading = h.read(model, head, lists, torch.from_numpy(asked))
    names = ("n", "m", "attended", "sigma", "uniformity", "decay")
    return {name: getattr(reading, name).mean(0) for name in names} | {"m_spread": reading.m.std(0)}


def is_mean(measures: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The verdict by MEAN_RULE, with each of its three figures (the worst along the context, the first left out)."""
    n, sigma = measures["n"][1:], measures["sigma"][1:]
    if len(n) < 2:
        return {"mean": False, "why": "the context holds too few lengths to tell"}
    uniformity = float(measures["uniformity"][1:].min())
    decay = float(np.abs(measures["decay"][1:] * n).max())
    # Half a token of sink is nothing to drift from.
    drift = float(abs(sigma[-1] - sigma[0]) / max(abs(float(sigma[0])), 0.5))
    parts = {
        "uniformity": uniformity >= LEAST_UNIFORMITY,
        "decay": decay <= MOST_DECAY,
        "sigma": drift <= MOST_DRIFT,
    }
    return {
        "mean": all(parts.values()),
        "least_uniformity": uniformity,
        "most_decay_times_n": decay,
        "sigma_drift": drift,
        "fails_by": [name for name, holds in parts.items() if not holds],
    }


def crossing(measures: Mapping[str, np.ndarray], theta: float) -> float:
    """The n at which m falls to θ, linearly between the lengths read; infinite where it stays above, NaN without θ."""
    if not np.isfinite(theta):
        return float("nan")
    n, above = measures["n"], measures["m"] - theta
    under = np.flatnonzero(above <= 0)
    if len(under) == 0:
        return float("inf")
    i = int(under[0])
    if i == 0:
        return float(n[0])
    return float(n[i - 1] + (n[i] - n[i - 1]) * above[i - 1] / (above[i - 1] - above[i]))


def statistic_figure(name: str, by_amount: Mapping[int, Mapping[str, np.ndarray]], theta: float) -> dict[str, Any]:
    """The head's statistic along the context for each amount of evidence, with θ."""
    return {
        "kind": "curves",
        "title": f"What head {name} measures: m = Σ a u at the answer, for each amount of evidence",
        "summary": "Where m falls to θ the head alone would fail; θ was set by intervention at short contexts.",
        "xlabel": "attended keys n (tokens)",
        "ylabel": "m",
        "series": [
            {
                "label": f"k = {k}",
                "x": of["n"],
                "y": of["m"],
                "low": of["m"] - of["m_spread"],
                "high": of["m"] + of["m_spread"],
            }
            for k, of in by_amount.items()
        ],
        "hlines": [{"y": theta, "label": "θ"}] if np.isfinite(theta) else [],
    }
