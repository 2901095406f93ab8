"""Scalpel: cut a neural network open, name the algorithm inside, and find where it breaks.

The public names are listed here and resolved on first use, so that `import scalpel` and
`scalpel --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved, _when_imported

if TYPE_CHECKING:
    from . import circuits, experiments, jacobian_lens, reference, semigroup
    from ._info import __version__, show_config
    from .covariance import StreamingCovariance
    from .guard.hole_guard import HoleGuard
    from .jacobian_lens.lens import JacobianLens
    from .jacobians.depth.lyapunov import lyapunov
    from .jacobians.entry import jacobian
    from .models.circuitgpt.config import CircuitGPTConfig
    from .models.circuitgpt.model import CircuitGPT
    from .streams.collecting import collect
    from .streams.rows import Rows
    from .topk import AbsTopK, keep_topk, topk_indices, topk_mask

_HOME = {
    "__version__": "_info",
    "show_config": "_info",
    "topk_mask": "topk",
    "keep_topk": "topk",
    "topk_indices": "topk",
    "AbsTopK": "topk",
    "jacobian": "jacobians.entry",
    "lyapunov": "jacobians.depth.lyapunov",
    "StreamingCovariance": "covariance",
    "collect": "streams.collecting",
    "Rows": "streams.rows",
    "JacobianLens": "jacobian_lens.lens",
    "CircuitGPT": "models.circuitgpt",
    "CircuitGPTConfig": "models.circuitgpt.config",
    "HoleGuard": "guard",
}
_SUBPACKAGES = ("circuits", "experiments", "jacobian_lens", "reference", "semigroup")

__all__ = [
    "AbsTopK",
    "CircuitGPT",
    "CircuitGPTConfig",
    "HoleGuard",
    "JacobianLens",
    "Rows",
    "StreamingCovariance",
    "__version__",
    "circuits",
    "collect",
    "experiments",
    "jacobian",
    "jacobian_lens",
    "keep_topk",
    "lyapunov",
    "reference",
    "semigroup",
    "show_config",
    "topk_indices",
    "topk_mask",
]

_moved.install()
_when_imported.when_imported(
    {"torch._dynamo": "scalpel.topk:stay_whole"}
    | {
        module: f"scalpel.models.transformers_classes.registration:{function}"
        for module, function in (
            ("transformers.models.auto.configuration_auto", "register_config"),
            ("transformers.models.auto.modeling_auto", "register_model"),
            ("transformers.models.auto.tokenization_auto", "register_tokenizer"),
            ("transformer_lens.factories.architecture_adapter_factory", "register_lens"),
        )
    }
)


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
