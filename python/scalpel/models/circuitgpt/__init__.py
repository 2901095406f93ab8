"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

from .model import MLP, Attention, Block, CircuitGPT
from .model import _Sink as _Sink  # models pickled when this package was one module name it here

__all__ = ["MLP", "Attention", "Block", "CircuitGPT"]
