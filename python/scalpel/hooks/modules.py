"""Reading and replacing the values at a module's input and output, and telling whose hooks are on it.

A hook of this library acts only in the thread that registered it, so two threads may look into one model at once.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

__all__ = [
    "as_named",
    "as_written",
    "asks_for_gradients",
    "before_and_after",
    "first_tensor",
    "hooked",
    "hooks_on",
    "leaves",
    "module_hooks",
    "module_names",
    "plain_name",
    "rebuilt",
    "user_hooks",
    "watching_outputs",
    "with_first_tensor",
    "wrapped_at",
]

Meet = Callable[[Any, str], Any]

# transformers and PEFT register a hook with one of these names to train with gradient checkpointing, and leave it there
# afterwards. It asks for gradients of the embedding's output and changes no value.
_ASKS_FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")

# transformers leaves a hook of this name on every layer after output_hidden_states or output_attentions has been used.
# It records values and changes none.
_KEEPS_OUTPUTS = "output_capturing_hook"


class _OwnHook:
    """A module hook of this library, which acts only in the thread that it was made in."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act
        self._thread = threading.get_ident()

    def __call__(self, *arguments: Any) -> Any:
        return self._act(*arguments) if threading.get_ident() == self._thread else None


@contextmanager
def hooked(model: nn.Module, hook: str, meet: Meet) -> Iterator[None]:
    """Call ``meet(value, hook)`` with the value at a hook, inside the context; what it returns takes the value's place.

    ``hook`` is a module path: ``"name"`` means the module's output, ``"name:in"`` its input. ``meet`` runs after the
    user's own hooks there.
    """
    module = model.get_submodule(hook.removesuffix(":in"))
    if hook.endswith(":in"):

        def before(_: nn.Module, arguments: Any, keywords: Any) -> Any:
            if arguments:
                return meet(arguments, hook), keywords
            return arguments, meet(keywords, hook)

        handle = module.register_forward_pre_hook(_OwnHook(before), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_OwnHook(lambda module, arguments, output: meet(output, hook)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_and_after(
    model: nn.Module, calls: Mapping[str, tuple[Callable[[], object], Callable[[], object]]]
) -> Iterator[None]:
    """Call the first function of a pair before the module of that name runs, and the second afterwards."""
    handles = []

    def calling(call: Callable[[], object]) -> _OwnHook:
        def act(*_: Any) -> None:
            call()

        return _OwnHook(act)

    for name, (before, after) in calls.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(calling(before)))
        handles.append(module.register_forward_hook(calling(after)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_outputs(model: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Call ``see`` with the output of every module that runs inside the context."""

    def act(module: nn.Module, arguments: Any, output: Any) -> None:
        see(output)

    handles = [module.register_forward_hook(_OwnHook(act)) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- whose hooks are there -----------------------------------------------------------------------


def user_hooks(model: nn.Module) -> list[tuple[str, Any]]:
    """List what others have put around the forward passes of the model's modules, as (where, hook), in order.

    These are hooks, and forward methods set on a single module. Hooks of this library, and hooks that change no value,
    are left out. Two lists are equal if they hold the same objects.
    """
    foreign: list[tuple[str, Any]] = [
        ("all modules", hook)
        for hook in (*list(_global_forward_pre_hooks.values()), *list(_global_forward_hooks.values()))
    ]
    for name, module in model.named_modules():
        hooks = (*list(module._forward_pre_hooks.values()), *list(module._forward_hooks.values()))
        foreign += [(f"the module {name!r}", hook) for hook in hooks if not _changes_nothing(hook)]
        if "forward" in vars(module) and not _is_compiled_wrapper(module):
            foreign.append((f"the forward method of the module {name!r}", vars(module)["forward"]))
    return foreign


def asks_for_gradients(model: nn.Module) -> bool:
    """Tell whether a hook asks for gradients of a value in the forward pass, which torch.func doesn't allow."""
    return any(
        getattr(hook, "__name__", "") in _ASKS_FOR_GRADIENTS
        for module in model.modules()
        for hook in list(module._forward_hooks.values())
    )


def hooks_on(module: nn.Module) -> bool:
    """Tell whether somebody else has put a hook on the module."""
    return any(
        not _changes_nothing(hook)
        for hook in (*list(module._forward_pre_hooks.values()), *list(module._forward_hooks.values()))
    )


def _changes_nothing(hook: Any) -> bool:
    return isinstance(hook, _OwnHook) or getattr(hook, "__name__", "") in (*_ASKS_FOR_GRADIENTS, _KEEPS_OUTPUTS)


# ---- wrappers ------------------------------------------------------------------------------------


def as_written(model: nn.Module) -> nn.Module:
    """Return the module that was given to ``torch.compile`` or to data parallelism, or the model itself.

    Such a wrapper calls the module inside and nothing else, so the module has the same values without it. A wrapper
    that somebody has put a hook on stays.

    Raises:
        TypeError: If the model is a ScriptModule, which runs no hooks.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is a {type(model).__name__}, which runs no hooks: give the module that it was made of")
    return _layers_of_wrapping(model)[0]


def as_named(model: nn.Module, name: Any) -> Any:
    """Return a hook's name in the model that :func:`as_written` gives, from its name in ``model``.

    A name that is no module path of ``model`` stays as it is, because it may be one of the module inside.
    """
    if not isinstance(name, str):
        return name
    path, colon, end = name.partition(":")
    wrapper = model
    for step in _layers_of_wrapping(model)[1]:
        inside = path.removeprefix(step).removeprefix(".")
        if (path == step or path.startswith(f"{step}.")) and _has(wrapper, path):
            path = inside
        wrapper = wrapper._modules[step]  # type: ignore[assignment]
    return plain_name(path) + colon + end


def wrapped_at(model: Any) -> str | None:
    """Return the name under which a compiled or data-parallel wrapper holds its module; None for other modules."""
    if _is_compiled_wrapper(model):
        return "_orig_mod"
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return "module" if any(isinstance(model, kind) and type(model).forward is kind.forward for kind in kinds) else None


def _layers_of_wrapping(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module inside all wrappers that change nothing, and the names of the steps that lead to it."""
    steps = []
    while (step := wrapped_at(model)) is not None and not _is_touched(model):
        steps.append(step)
        model = model._modules[step]  # type: ignore[assignment]
    return model, steps


def _is_touched(wrapper: nn.Module) -> bool:
    """Whether somebody has put a hook on the wrapper itself, or replaced its forward method."""
    return hooks_on(wrapper) or ("forward" in vars(wrapper) and not _is_compiled_wrapper(wrapper))


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules(remove_duplicate=False))


def _is_compiled_wrapper(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in getattr(module, "_modules", {})


def plain_name(name: str) -> str:
    """Return the name of a module or parameter without the steps that ``torch.compile`` puts into it."""
    return ".".join(step for step in name.split(".") if step != "_orig_mod")


def module_names(model: nn.Module) -> list[str]:
    """List the names of all modules, without the steps of ``torch.compile``. The model itself, ``""``, comes first."""
    return list(dict.fromkeys(plain_name(name) for name, _ in model.named_modules()))


def module_hooks(model: nn.Module) -> list[str]:
    """List the module paths that are hooks: each module's name for its output, and with ``":in"`` for its input."""
    return [name + end for name in module_names(model) for end in ("", ":in")]


# ---- values --------------------------------------------------------------------------------------


def first_tensor(value: Any, hook: str) -> Tensor:
    """Return the first tensor in what a module takes or gives; ValueError if there is none."""
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            return leaf
    raise ValueError(f"the value at {hook!r} is {type(value).__name__} and holds no tensor")


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """Return ``value`` with ``tensor`` in the place that :func:`first_tensor` reads."""
    if isinstance(value, Tensor):
        return tensor
    places: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
    for place, part in places:
        if any(isinstance(leaf, Tensor) for leaf in leaves(part)):
            replaced = with_first_tensor(part, tensor)
            if isinstance(value, Mapping):
                changed: Any = copy.copy(value)
                changed[place] = replaced
                return changed
            return rebuilt(value, [*value[:place], replaced, *value[place + 1 :]])
    return value


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, lists and mappings, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def rebuilt(like: Any, items: list[Any]) -> Any:
    """Return ``items`` as a tuple or list of the same class as ``like``."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
