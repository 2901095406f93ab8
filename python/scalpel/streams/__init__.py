"""The covariance of the activations and gradients at many hooks of a model, computed over a corpus."""

from .collecting import collect
from .rows import Rows

__all__ = ["Rows", "collect"]
