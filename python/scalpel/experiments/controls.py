"""Control models for comparison, and the accuracy from which on a model counts as able to do the task."""

from dataclasses import dataclass

from ..models.circuitgpt.model import CircuitGPT
from ..models.untrained import untrained

LEAST_ACCURACY = 0.95  # below this a model can't do the task, and what is measured on it means nothing


@dataclass(frozen=True)
class Controls:
    """Control models by name: "untrained", and for a shipped model its trained twins."""

    models: dict[str, CircuitGPT]

    @classmethod
    def of(cls, model: CircuitGPT) -> "Controls":
        """An untrained model of the same shape and density, and the controls that the model's card names."""
        models = {"untrained": untrained(model)}
        for name, shipped in model.card.get("controls", {}).items():
            models[name] = CircuitGPT.from_pretrained(shipped)
        return cls(models)
