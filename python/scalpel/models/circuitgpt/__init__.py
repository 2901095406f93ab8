"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

from .model import MLP, Attention, Block, CircuitGPT

# Models that were pickled when this package was one module name these classes here.
from .model import _LayerNorm as _LayerNorm
from .model import _Sink as _Sink
from .model import _Sparsifier as _Sparsifier

__all__ = ["MLP", "Attention", "Block", "CircuitGPT"]
