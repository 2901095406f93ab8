"""Models: CircuitGPT, the families of dense decoders that have rules, and the files that hold their weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hooks.recorder import hook_recorder

__all__ = ["hook_recorder"]


def __getattr__(name: str) -> Any:
    # On first use, since a reader of files needs no torch.
    if name == "hook_recorder":
        value = getattr(import_module("..hooks.recorder", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
