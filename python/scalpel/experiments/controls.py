"""The models to compare with, and whether a model can do the task at all."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..models.circuitgpt.model import CircuitGPT
from ..models.untrained import untrained
from .brackets.critical import Curve

LEAST_ACCURACY = 0.95  # below it a model is said not to do the task, and nothing measured on it means anything


@dataclass(frozen=True)
class Controls:
    """Control models by name: "untrained" always; a shipped model's twins where there are any."""

    models: dict[str, CircuitGPT]

    @classmethod
    def of(cls, model: CircuitGPT) -> "Controls":
        """The untrained model, with the same shape and density, and the controls that the model's card names."""
        found = {"untrained": untrained(model)}
        for name, shipped in model.card.get("controls", {}).items():
            found[name] = CircuitGPT.from_pretrained(shipped)
        return cls(found)


def tells_depths(curves: Mapping[int, Curve], flat: Curve, width: int = 16) -> float:
    """The best balanced accuracy over both depths at any one context length, in bins of ``width`` tokens.

    A model that says the same at both depths gets one half; one that compares k/n with a threshold is wrong at depth
    1 where the context is short and at depth 2 where it is long, and right between. Prompts of both depths that fall
    into one bin don't have quite the same n, so a model that goes by length alone can get more than one half, though
    never all.
    """
    longest = max(int(curve.x.max()) for curve in [*curves.values(), flat])
    edges = np.arange(0, longest + width, width)
    alone = flat.binned(edges)
    nested = np.stack([curve.binned(edges) for curve in curves.values()])
    best = (nested + alone) / 2
    return float(np.nanmax(best)) if not np.isnan(best).all() else float("nan")
