"""The covariance of the activations and gradients at many hooks of a model, computed over a corpus."""

from .collecting import collect

__all__ = ["collect"]
