"""The hooks that a lens reads: the output of each layer, by the layer's number or by a module's path."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from ...hooks.names import hook_named
from ...hooks.standing import as_analysed, as_named
from ...models.circuitgpt.core import MODULE_PATHS
from ...models.circuitgpt.model import CircuitGPT
from ...models.decoders.families import decoder_inside

__all__ = ["Ends", "all_layers", "blocks_in", "ends_of", "is_residual", "layers_of"]

Layer = int | str
Ends = tuple[dict[Layer, str], str]  # the hook of each layer, and the hook of the target


def layers_of(model: nn.Module) -> int:
    """Count the layers of a model: those of its family, or the blocks that :func:`blocks_in` finds.

    Raises:
        ValueError: For a model of no family whose blocks can't be told.
    """
    known = _known_layers(model)
    return len(blocks_in(model)) if known is None else known


def all_layers(model: nn.Module, target: Layer | None = None) -> list[int]:
    """List the numbers of all layers before the target, which is the last layer by default.

    Args:
        model: As :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices` takes it.
        target: A layer's number, from 0; or the path of a block in a model of no family.

    Raises:
        ValueError: For a target that is no layer or has none before it, or a model whose blocks can't be told.
    """
    count = layers_of(model)
    kind = type(as_analysed(model)).__name__
    if isinstance(target, str):
        if _known_layers(model) is not None or as_named(model, target) not in blocks_in(model):
            raise ValueError(
                f"the target is {target!r}, so it can't be told which layers come before it: give the layers' paths, "
                "or the number of a layer as target"
            )
        target = blocks_in(model).index(as_named(model, target))
    last = count - 1 if target is None else target
    if not 0 <= last < count:
        raise ValueError(f"there is no layer {last}; this {kind} has {_numbers(count)}")
    if last == 0:
        raise ValueError(f"the target is layer 0 of this {kind}, and no layer comes before it, so there is no lens")
    return list(range(last))


def blocks_in(model: nn.Module) -> list[str]:
    """Find the paths of the blocks of a model of no family, in order.

    They are the modules of its longest ``nn.ModuleList`` that lies in no other one: the experts within a block, or the
    heads of a layer, are no blocks. All are of one class.

    Raises:
        ValueError: If there is no such list, or several are the longest, or its modules differ in class.
    """
    inside = as_analysed(model)
    kind = type(inside).__name__
    lists = {path: module for path, module in inside.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        path: blocks
        for path, blocks in lists.items()
        if not any(path.startswith(f"{other}." if other else "") and path != other for other in lists)
    }
    advice = "give the paths of the modules as layers, such as 'blocks.0', and the path of the last one as target"
    longest = max(map(len, outer.values()), default=0)
    if longest < 2:
        raise ValueError(
            f"this {kind} belongs to no family whose layers are known, and has no nn.ModuleList of two blocks or "
            f"more: {advice}"
        )
    found = [path for path, blocks in outer.items() if len(blocks) == longest]
    if len(found) > 1:
        raise ValueError(
            f"this {kind} belongs to no family whose layers are known, and {' and '.join(map(repr, found))} both "
            f"hold {longest} modules: {advice}"
        )
    kinds = sorted({type(block).__name__ for block in outer[found[0]]})
    if len(kinds) > 1:
        raise ValueError(
            f"the modules of {found[0]!r} in this {kind} are of several classes, {' and '.join(kinds)}, so it can't "
            f"be told whether they are its layers: {advice}"
        )
    before = f"{found[0]}." if found[0] else ""
    return [f"{before}{number}" for number in range(longest)]


def ends_of(model: nn.Module, layers: Iterable[Layer], target: Layer | None) -> Ends:
    """Find the hook of the output of each of ``layers`` and of ``target``, by default the last layer.

    Raises:
        ValueError: For a layer that the model lacks or that comes after the target, if none is given, or if they are
            numbers in a model whose blocks can't be told.
        TypeError: For a layer that is neither an int nor a path, or for some of both.
    """
    chosen: list[Any] = list(dict.fromkeys(layers))
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
    known, kind = _known_layers(model), type(as_analysed(model)).__name__
    paths = blocks_in(model) if known is None else []
    count = len(paths) if known is None else known
    if not count:
        raise ValueError(f"this {kind} has no layers, and so no lens")
    last = count - 1 if target is None else int(target)
    for layer in (last, *chosen):
        if not 0 <= layer < count:
            raise ValueError(f"there is no layer {layer}; this {kind} has {_numbers(count)}")
    late = next((layer for layer in chosen if layer > last), None)
    if late is not None:
        raise ValueError(f"layer {late} comes after the target, layer {last}, and doesn't move it: choose another")
    names = paths if known is None else [_after(layer, count) for layer in range(count)]
    return {layer: names[layer] for layer in sorted(chosen)}, names[last]


def is_residual(hook: str) -> bool:
    """Whether a hook is between two layers, or after the last, by Scalpel's own names."""
    return hook == "final_resid" or hook.endswith(".resid_in")


def _known_layers(model: nn.Module) -> int | None:
    """How many layers a model has by its family; None where it is of none."""
    inside = as_analysed(model)
    if isinstance(inside, CircuitGPT):
        return int(inside.config.n_layer)
    found = decoder_inside(inside)
    return None if found is None else int(found.module.config.num_hidden_layers)


def _numbers(count: int) -> str:
    return f"layers 0 to {count - 1}" if count else "no layers"


def _named(model: nn.Module, path: str) -> str:
    """The hook of the residual stream that a path means in a model with such hooks; others stay as they are."""
    name, inside = as_named(model, path), as_analysed(model)
    if isinstance(inside, CircuitGPT):
        hook = hook_named(name, MODULE_PATHS, inside.hook_names, True)
    else:
        found = decoder_inside(inside)
        hook = None if found is None or found.refusal is not None else found.hook(name, True)
    return hook if hook is not None and is_residual(hook) else str(name)


def _place(hook: str) -> float:
    """Where a hook of the residual stream stands in the model's order."""
    return math.inf if hook == "final_resid" else int(hook.partition(".")[0])


def _after(layer: int, count: int) -> str:
    """The hook of a layer's output."""
    return "final_resid" if layer == count - 1 else f"{layer + 1}.resid_in"
