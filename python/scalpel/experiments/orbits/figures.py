"""Figures of the orbits: how far each step turns, how the norm grows, components, and how decoding ends."""

from typing import Any

import numpy as np

from ...semigroup.greedy import GreedyOrbits
from .settling import Settling

__all__ = ["orbit_figures"]

_ENDS = (("one token", 1, 1), ("period 2 to 16", 2, 16), ("longer period", 17, np.inf), ("not closed", 0, 0))


def orbit_figures(
    maps: dict[str, list[Settling]],
    near: dict[str, list[dict[str, Any]]],
    decoded: dict[str, GreedyOrbits],
    radius: int,
) -> dict[str, Any]:
    """Figures by name, as :mod:`scalpel.report.pictures.figures` draws them; turns are shown at ``radius``."""
    return {
        "turns": {
            "kind": "curves",
            "title": f"How far each step turns the state: all blocks on one position, r = {radius}",
            "summary": "Decimal logarithm of ‖x' − x‖/r: median over starts, with a band from the first to the third "
            "quartile. A falling line comes to rest at an anchor; a level line never does.",
            "xlabel": "step",
            "ylabel": "log₁₀ of the turn",
            "series": [_turns(name, settled[0].turned[radius]) for name, settled in maps.items()],
        },
        "growth": {
            "kind": "curves",
            "title": "Without the division by the norm there is no fixed point",
            "summary": "‖Πⁿ(x)‖ of all blocks on one position from starts of norm 1, median over starts.",
            "xlabel": "step",
            "ylabel": "norm of the residual",
            "series": [
                {
                    "label": name,
                    "style": "line" if name == "model" else "dashed",
                    "x": list(range(len(settled[0].growth))),
                    "y": np.median(settled[0].growth, axis=1).tolist(),
                }
                for name, settled in maps.items()
            ],
        },
        "component": _component(near),
        "decoding": _decoding(decoded),
    }


def _turns(name: str, turned: np.ndarray) -> dict[str, Any]:
    # A start that has settled turns no further. Its last turn is kept, so that the median stays that of all starts.
    filled = turned.copy()
    for row in range(1, len(filled)):
        filled[row] = np.where(np.isnan(filled[row]), filled[row - 1], filled[row])
    low, middle, high = np.percentile(np.log10(np.maximum(filled, 1e-16)), [25, 50, 75], axis=1)
    steps = np.arange(1, len(filled) + 1)
    shown = np.unique(np.linspace(0, len(steps) - 1, 100).astype(int))
    return {
        "label": name,
        "style": "line" if name == "model" else "dashed",
        "x": steps[shown].tolist(),
        "y": middle[shown].tolist(),
        "low": low[shown].tolist(),
        "high": high[shown].tolist(),
    }


def _component(near: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rows = [
        (f"{name}, {row['map'].split(',')[0]}: {stream}", row[stream])
        for name, by_map in near.items()
        for row in by_map
        for stream in ("activations", "gradients")
    ]
    return {
        "kind": "bars",
        "title": "Is the anchor the first component?",
        "summary": "|cos| of the anchor with the first component where the map ends; without an anchor, of the orbits' "
        "last direction. Lines are 95 % intervals over prompts.",
        "ylabel": "|cos|",
        "labels": [label for label, _ in rows],
        "values": [comparison["cos"] for _, comparison in rows],
        "low": [comparison["interval"][0] for _, comparison in rows],
        "high": [comparison["interval"][1] for _, comparison in rows],
        "reference": [{"y": rows[0][1]["random"], "label": "95 % of random directions lie below"}],
    }


def _decoding(decoded: dict[str, GreedyOrbits]) -> dict[str, Any]:
    labels, values = [], []
    for name, orbits in decoded.items():
        for words, least, most in _ENDS:
            inside = (orbits.period >= least) & (orbits.period <= most)
            labels.append(f"{name}: {words}")
            values.append(float(inside.mean()))
    window = next(iter(decoded.values())).window
    return {
        "kind": "bars",
        "title": f"How greedy decoding ends over a window of {window} tokens",
        "summary": "Share of prompts by the period of the cycle in which their orbit ends. Shuffled: each prompt's "
        "tokens in another order.",
        "ylabel": "share of prompts",
        "labels": labels,
        "values": values,
    }
