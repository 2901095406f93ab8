"""Which model is analysed where a user gives one that stands for it, such as a CircuitGPT as transformers knows it.

A class of such models says so by a property ``scalpel_model``, which gives the model to analyse. It is looked for on
the class: a wrapper that hands on the attributes of what it wraps, as PEFT's do, may do anything else besides.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters import inside_wrappers
from .modules import as_named as as_named_in_wrapper
from .modules import as_written, hooks_on

__all__ = ["as_analysed", "as_named", "stood_for"]


def as_analysed(model: nn.Module) -> Any:
    """Return the module whose values are analysed for ``model``: inside wrappers that change nothing, and stood for.

    Raises:
        TypeError: As for :func:`scalpel.hooks.modules.as_written`.
        ValueError: As for :func:`stood_for`.
    """
    return stood_for(as_written(model))


def stood_for(model: Any) -> Any:
    """Return the model that ``model`` stands for, inside adapters of PEFT too; ``model`` itself for most.

    Raises:
        ValueError: The model puts virtual tokens before each text, or has a hook on a module that is no part of the
            model that it stands for, so that an analysis of that would be one of something else.
    """
    outer, _, analysed = _standing(model)
    if analysed is None:
        return model
    added = inside_wrappers(model).added
    if added is not None:
        raise ValueError(
            f"the model puts {added} before each text, so its values are not those of the text's tokens alone: switch "
            "them off with model.disable_adapter()"
        )
    for name, module in outer:
        if hooks_on(module):
            raise ValueError(
                f"there is a hook on the module {name!r} of this {type(model).__name__}, which is no part of what is "
                f"analysed, its {type(analysed).__name__}: put the hook on a module inside, or remove it"
            )
    return analysed


def as_named(model: nn.Module, name: Any) -> Any:
    """Return a hook's name in the module that :func:`as_analysed` gives, from its name in ``model``."""
    inner = as_written(model)
    name = as_named_in_wrapper(model, name)
    _, paths, analysed = _standing(inner)
    if analysed is not None and isinstance(name, str):
        for path in paths:
            if name.startswith(f"{path}."):
                return name.removeprefix(f"{path}.")
    return name


def _standing(model: Any) -> tuple[list[tuple[str, nn.Module]], list[str], Any]:
    """Find what a model stands for: the modules outside of it, the paths at which its parts stand, and the model."""
    if not isinstance(model, nn.Module):
        return [], [], None
    found = inside_wrappers(model)
    if not hasattr(type(found.module), "scalpel_model"):
        return [], [], None
    analysed = found.module.scalpel_model
    inside = {id(module) for module in analysed.modules()}
    outer = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
    children = [step for step, child in found.module.named_children() if hasattr(type(child), "scalpel_model")]
    before = f"{found.path}." if found.path else ""
    paths = [before + step for step in children] + children
    return outer, [*paths, *([found.path] if found.path else [])], analysed
