"""The algebra: counters and what they decide, finite semigroups, orbits on grids, and machines out of models."""

from .orbits import distances, orbit_shapes, reachable, unreachable
from .threshold import ThresholdCounter
from .transformation import SemigroupTooLarge, TransformationSemigroup

__all__ = [
    "SemigroupTooLarge",
    "ThresholdCounter",
    "TransformationSemigroup",
    "distances",
    "orbit_shapes",
    "reachable",
    "unreachable",
]
