"""CircuitGPT: weight-sparse transformers with AbsTopK, whose every weight can be looked at."""

# Models that were pickled when this package was one module name the classes of their layers here.
from .layers import MLP as MLP
from .layers import Attention as Attention
from .layers import Block as Block
from .layers import _LayerNorm as _LayerNorm
from .layers import _Sink as _Sink
from .layers import _Sparsifier as _Sparsifier
from .model import CircuitGPT

__all__ = ["CircuitGPT"]
