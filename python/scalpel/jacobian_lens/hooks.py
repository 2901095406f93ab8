"""The hooks that a lens reads: the output of each layer, by the layer's number or by a module's path."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..hooks.modules import as_named, as_written
from ..hooks.names import hook_named
from ..models.circuitgpt.core import MODULE_PATHS
from ..models.circuitgpt.model import CircuitGPT
from ..models.decoders.families import decoder_inside

__all__ = ["Ends", "ends_of", "is_residual", "layers_of"]

Layer = int | str
Ends = tuple[dict[Layer, str], str]  # the hook of each layer, and the hook of the target


def layers_of(model: nn.Module) -> int | None:
    """How many layers a model has; None where it is of no family, so that a number would mean nothing."""
    model = as_written(model)
    if isinstance(model, CircuitGPT):
        return model.config.n_layer
    found = decoder_inside(model)
    return None if found is None else int(found.module.config.num_hidden_layers)


def ends_of(model: nn.Module, layers: Iterable[Layer], target: Layer | None) -> Ends:
    """Find the hook of the output of each of ``layers`` and of ``target``, by default the last layer.

    Raises:
        ValueError: For a layer that the model lacks or that comes after the target, or if none is given.
        TypeError: For a layer that is neither an int nor a path, or for some of both.
    """
    chosen: list[Any] = list(dict.fromkeys(layers))
    count = layers_of(model)
    if not chosen:
        raise ValueError("layers is empty: give the number of at least one layer")
    given = [*chosen, *([] if target is None else [target])]
    if all(isinstance(layer, str) for layer in given):
        if target is None:
            raise ValueError(
                "layers are paths of modules, and target is not given: give the path of the module whose output is the "
                "target, such as that of the last block"
            )
        hooks, end = {layer: _named(model, layer) for layer in chosen}, _named(model, str(target))
        if all(map(is_residual, (*hooks.values(), end))):
            hooks = dict(sorted(hooks.items(), key=lambda item: _place(item[1])))
            late = next((layer for layer in hooks if _place(hooks[layer]) > _place(end)), None)
            if late is not None:
                raise ValueError(f"layer {late!r} comes after the target, {target!r}, and doesn't move it")
        return hooks, end
    wrong = next((layer for layer in given if isinstance(layer, bool) or not isinstance(layer, int)), None)
    if wrong is not None:
        raise TypeError(
            f"{wrong!r} stands among layers and target; these are all ints, from 0, or all paths of modules"
        )
    if count is None:
        raise ValueError(
            f"layers are numbers, and this {type(model).__name__} belongs to no family whose layers are known: give "
            "the paths of its blocks, such as 'model.layers.0', and the path of the last one as target"
        )
    if not count:
        raise ValueError(f"this {type(model).__name__} has no layers, and so no lens")
    last = count - 1 if target is None else int(target)
    for layer in (last, *chosen):
        if not 0 <= layer < count:
            raise ValueError(f"there is no layer {layer}; this {type(model).__name__} has layers 0 to {count - 1}")
    late = next((layer for layer in chosen if layer > last), None)
    if late is not None:
        raise ValueError(f"layer {late} comes after the target, layer {last}, and doesn't move it: choose another")
    return {layer: _after(layer, count) for layer in sorted(chosen)}, _after(last, count)


def _named(model: nn.Module, path: str) -> str:
    """The hook of the residual stream that a path means in a model with such hooks; others stay as they are."""
    name, inside = as_named(model, path), as_written(model)
    if isinstance(inside, CircuitGPT):
        hook = hook_named(name, MODULE_PATHS, inside.hook_names, True)
    else:
        found = decoder_inside(inside)
        hook = None if found is None or found.refusal is not None else found.hook(name, True)
    return hook if hook is not None and is_residual(hook) else name


def is_residual(hook: str) -> bool:
    """Whether a hook is between two layers, or after the last, by Scalpel's own names."""
    return hook == "final_resid" or hook.endswith(".resid_in")


def _place(hook: str) -> float:
    """Where a hook of the residual stream stands in the model's order."""
    return math.inf if hook == "final_resid" else int(hook.partition(".")[0])


def _after(layer: int, count: int) -> str:
    """The hook of a layer's output."""
    return "final_resid" if layer == count - 1 else f"{layer + 1}.resid_in"
