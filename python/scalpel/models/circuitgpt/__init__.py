"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

from .model import CircuitGPT

__all__ = ["CircuitGPT"]
