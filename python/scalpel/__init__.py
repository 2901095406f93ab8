"""Scalpel: cut a neural network open, name the algorithm inside, and find where it breaks.

The public names are listed here and resolved on first use, so that `import scalpel` and
`scalpel --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import circuits, experiments, reference, semigroup
    from ._info import __version__, show_config
    from .covariance import StreamingCovariance
    from .guard import HoleGuard
    from .jacobians.entry import jacobian
    from .jacobians.lyapunov import lyapunov
    from .models.circuitgpt import CircuitGPT
    from .models.config import CircuitGPTConfig
    from .ops import AbsTopK, keep_topk, topk_indices, topk_mask
    from .streams.collecting import collect

_HOME = {
    "__version__": "_info",
    "show_config": "_info",
    "topk_mask": "ops",
    "keep_topk": "ops",
    "topk_indices": "ops",
    "AbsTopK": "ops",
    "jacobian": "jacobians.entry",
    "lyapunov": "jacobians.lyapunov",
    "StreamingCovariance": "covariance",
    "collect": "streams.collecting",
    "CircuitGPT": "models.circuitgpt",
    "CircuitGPTConfig": "models.config",
    "HoleGuard": "guard",
}
_SUBPACKAGES = ("circuits", "experiments", "reference", "semigroup")

__all__ = [
    "AbsTopK",
    "CircuitGPT",
    "CircuitGPTConfig",
    "HoleGuard",
    "StreamingCovariance",
    "__version__",
    "circuits",
    "collect",
    "experiments",
    "jacobian",
    "keep_topk",
    "lyapunov",
    "reference",
    "semigroup",
    "show_config",
    "topk_indices",
    "topk_mask",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'scalpel' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
