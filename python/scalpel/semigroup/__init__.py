"""The algebra: threshold counters, finite semigroups, orbits on grids of states, and machines extracted from models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extraction.extract import extract
    from .extraction.result import Extraction
    from .machine import MooreMachine
    from .orbits import distances, orbit_shapes, reachable, unreachable
    from .threshold import ThresholdCounter
    from .transformation import SemigroupTooLarge, TransformationSemigroup

# Resolved on first use: a counter needs no model, and orbits no torch.
_HOME = {
    "Extraction": "extraction.result",
    "MooreMachine": "machine",
    "SemigroupTooLarge": "transformation",
    "ThresholdCounter": "threshold",
    "TransformationSemigroup": "transformation",
    "distances": "orbits",
    "extract": "extraction.extract",
    "orbit_shapes": "orbits",
    "reachable": "orbits",
    "unreachable": "orbits",
}

__all__ = [
    "Extraction",
    "MooreMachine",
    "SemigroupTooLarge",
    "ThresholdCounter",
    "TransformationSemigroup",
    "distances",
    "extract",
    "orbit_shapes",
    "reachable",
    "unreachable",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
