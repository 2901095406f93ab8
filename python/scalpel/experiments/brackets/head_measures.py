"""Whether a head measures a mean: its uniformity, decay and sink along long contexts, and where its m crosses θ."""

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
    f"A head measures a mean iff its uniformity A² / (n Σ a²) is at least {LEAST_UNIFORMITY}, |mean decay| · n is at "
    f"most {MOST_DECAY}, and its sink term σ at the longest contexts differs from that at the second shortest by at "
    f"most {MOST_DRIFT:.0%} (of half a token, if the sink term is smaller than that)."
)


def measure(model: CircuitGPT, head: h.Head, k: int, length: int, *, prompts: int, seed: int) -> dict[str, np.ndarray]:
    """Read a head at about QUESTIONS lengths spread over the context, for lists of evidence k at depth 2.

    Returns means over prompts, (questions,), of ``n``, ``m``, ``attended``, ``sigma``, ``uniformity`` and ``decay``,
    which :class:`.head.Reading` explains; ``m_spread`` is the standard deviation of m over prompts.
    """
    assert model.tokenizer is not None
    block = model.config.block_size
    lists = long_lists(model.tokenizer, k, length, prompts, block_size=block, depth=2, seed=1000 * seed + 8)
    asked = np.unique(np.linspace(0, lists.asked.shape[1] - 1, QUESTIONS).round().astype(int))
    reading = h.read(model, head, lists, torch.from_numpy(asked))
    names = ("n", "m", "attended", "sigma", "uniformity", "decay")
    return {name: getattr(reading, name).mean(0) for name in names} | {"m_spread": reading.m.std(0)}


def is_mean(measures: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Whether MEAN_RULE holds, with its three figures: each the worst along the context, the first length left out."""
    n, sigma = measures["n"][1:], measures["sigma"][1:]
    if len(n) < 2:
        return {"mean": False, "why": "the context holds too few lengths to decide"}
    uniformity = float(measures["uniformity"][1:].min())
    decay = float(np.abs(measures["decay"][1:] * n).max())
    # A sink of less than half a token is too small for a relative drift to mean anything.
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
    """The n at which m falls to θ, interpolated linearly; infinite if m stays above θ, NaN if there is no θ."""
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
        "summary": "Where m falls to θ, the head by itself would fail. θ was found by intervention at short contexts.",
        "xlabel": "attended keys n (tokens)",
        "ylabel": "m",
        "series": [
            {
                "label": f"k = {k}",
                "x": measures["n"],
                "y": measures["m"],
                "low": measures["m"] - measures["m_spread"],
                "high": measures["m"] + measures["m_spread"],
            }
            for k, measures in by_amount.items()
        ],
        "hlines": [{"y": theta, "label": "θ"}] if np.isfinite(theta) else [],
    }
