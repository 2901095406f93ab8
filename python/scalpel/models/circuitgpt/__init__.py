"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

from .layers import MLP, Attention, Block

# Models that were pickled when this package was one module name these classes here.
from .layers import _LayerNorm as _LayerNorm
from .layers import _Sink as _Sink
from .layers import _Sparsifier as _Sparsifier
from .model import CircuitGPT

__all__ = ["MLP", "Attention", "Block", "CircuitGPT"]
