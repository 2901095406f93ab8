"""CircuitGPT as transformers knows its own models: a config, a model and a tokenizer for its Auto classes.

:mod:`.registration` adds them to the Auto classes as soon as transformers has been imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modeling import CircuitGPTForCausalLM
    from .published import PublishedGPT
    from .tokenizer import CircuitGPTTokenizer

_HOME = {
    "CircuitGPTForCausalLM": "modeling",
    "CircuitGPTTokenizer": "tokenizer",
    "PublishedGPT": "published",
}

__all__ = ["CircuitGPTForCausalLM", "CircuitGPTTokenizer", "PublishedGPT"]


def __getattr__(name: str) -> Any:
    # On first use, since transformers takes seconds to import.
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
