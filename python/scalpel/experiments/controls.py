"""The models to compare with, and whether a model can do the task at all."""

from dataclasses import dataclass

from ..models.circuitgpt.model import CircuitGPT
from ..models.untrained import untrained

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
