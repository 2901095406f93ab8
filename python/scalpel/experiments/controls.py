"""The models to compare with, and whether a model can do the task at all."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..models.circuitgpt import CircuitGPT
from .critical import Curve

LEAST_ACCURACY = 0.95  # below it a model is said not to do the task, and nothing measured on it means anything
SHORT = 40  # tokens: "short contexts", where nothing has diluted yet


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


def untrained(model: CircuitGPT) -> CircuitGPT:
    """A fresh model of the same configuration, from the card's seed, each matrix pruned to the same non-zeros."""
    from ..training.recipe import prune_

    other = CircuitGPT(model.config, seed=int(model.card.get("recipe", {}).get("seed", 0)))
    other.tokenizer = model.tokenizer
    trained = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.dim() == 2:
            nonzero = int(trained[name].count_nonzero())
            prune_(parameter, nonzero / max(1, parameter.numel()), 0)
    return other.eval()


def short_accuracy(curves: Mapping[int, Curve], flat: Curve) -> float:
    """Balanced accuracy over both depths at contexts of at most SHORT tokens."""
    nested = np.concatenate([curve.right[curve.x <= SHORT] for curve in curves.values()])
    alone = flat.right[flat.x <= SHORT]
    return float((nested.mean() + alone.mean()) / 2) if nested.size and alone.size else float("nan")
