"""Many streams at once: the activations and gradients of a model's hooks over a corpus, as covariance states."""

from .collecting import collect

__all__ = ["collect"]
