"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

from .core import MLP, Attention, Block

# Models that were pickled when this package was one module name these classes here.
from .core import _LayerNorm as _LayerNorm
from .core import _Sink as _Sink
from .core import _Sparsifier as _Sparsifier
from .model import CircuitGPT

__all__ = ["MLP", "Attention", "Block", "CircuitGPT"]
