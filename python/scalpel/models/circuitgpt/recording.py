"""Recording and changing values at the hooks of a :class:`scalpel.CircuitGPT`."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ...hooks.names import TRANSFORMER_LENS, hook_named, is_pattern, spells_pattern, with_patterns
from ...hooks.stopping import Stop
from .core import MODULE_PATHS, CircuitCore

Names = str | Iterable[str] | Callable[[str], bool]
Hook = tuple[str, Callable[[Tensor, str], Tensor | None]]


def run_with_cache(
    model: CircuitCore,
    input_ids: Tensor,
    names: Names = ".*",
    stop_at: str | None = None,
    *,
    fwd_hooks: Sequence[Hook] = (),
    **inputs: Any,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Run the model and keep the values at some hooks: :meth:`scalpel.CircuitGPT.run_with_cache`."""
    wanted = _chosen(model, names)
    order = with_patterns(model.hook_names)
    if stop_at is not None:
        stop_at = _hook(model, stop_at)
        late = [name for name in order[order.index(stop_at) + 1 :] if name in wanted]
        listed = not isinstance(names, str) and not callable(names)
        if late and (listed or len(late) == len(wanted)):
            raise ValueError(f"{late[0]!r} comes after stop_at {stop_at!r} and would never be computed")
    intervene, changed = _tap(model, fwd_hooks)
    kept: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        value = intervene(name, value)
        if name in wanted:
            kept.update(dict.fromkeys(wanted[name], value))
        if name == stop_at:
            stop()
        return value

    with Stop() as stop:
        return model(input_ids, tap=tap, **_shown([*wanted, *changed, stop_at]), **inputs), kept
    return None, kept


def run_with_hooks(model: CircuitCore, input_ids: Tensor, fwd_hooks: Sequence[Hook], **inputs: Any) -> Tensor:
    """Run the model with values changed at some hooks: :meth:`scalpel.CircuitGPT.run_with_hooks`."""
    tap, changed = _tap(model, fwd_hooks)
    logits: Tensor = model(input_ids, tap=tap, **_shown(changed), **inputs)
    return logits


def check_hooks(model: CircuitCore, names: Iterable[str]) -> None:
    """Raise a ValueError that lists close matches and all hooks if a name is not one of ``model.hook_names``."""
    for name in names:
        if name not in model.hook_names:
            raise _unknown(model, name)


def hook_width(model: CircuitCore, name: str) -> int:
    """Count the channels at a hook."""
    config = model.config
    kind = name.partition(".")[2]
    if kind.endswith("act_in"):
        return config.d_in
    if kind in ("attn.q", "attn.k", "attn.v", "attn.y"):
        return config.d_attn
    if kind == "mlp.post_act":
        assert config.d_mlp is not None
        return config.d_mlp
    return config.d_model


def _hook(model: CircuitCore, name: str) -> str:
    """Find the hook, or the attention weights, that one of our names or of TransformerLens's means.

    Raises:
        ValueError: The name is unknown.
    """
    hooks = with_patterns(model.hook_names)
    if name in hooks:
        return name
    lens = isinstance(name, str) and re.sub(r"^blocks\.\d+\.", "", name) in TRANSFORMER_LENS
    found = hook_named(name, MODULE_PATHS, hooks, as_source=True) if lens else None
    if found is None:
        raise _unknown(model, name)
    return found


def _shown(hooks: Iterable[str | None]) -> dict[str, set[str]]:
    """The keyword that makes a forward pass show the attention weights among ``hooks``; nothing where none are."""
    patterns = {hook for hook in hooks if hook is not None and is_pattern(hook)}
    return {"patterns": patterns} if patterns else {}


def _unknown(model: CircuitCore, name: object) -> ValueError:
    hooks = with_patterns(model.hook_names)
    if name in hooks:
        return ValueError(
            f"{name!r} are attention weights, which have no channels of a fixed number: record them with "
            "run_with_cache, and replace them with run_with_hooks"
        )
    close = difflib.get_close_matches(str(name), hooks, n=4, cutoff=0.5)
    hint = f" Close: {', '.join(close)}." if close else ""
    return ValueError(f"unknown hook {name!r}.{hint} {_available(model)}")


def _available(model: CircuitCore) -> str:
    last = model.config.n_layer - 1
    if last < 0:
        return "Available: final_resid."
    in_layer = [name.partition(".")[2] for name in model.hook_names if name.startswith("0.")]
    return f"Available: {{0..{last}}}.{{{', '.join(in_layer)}}}, final_resid."


def _chosen(model: CircuitCore, names: Names) -> dict[str, list[str]]:
    """Find the hooks that ``names`` picks: {our name: the names that ask for it}."""
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"names is {names!r}, which is not a regular expression: {error}") from error
        known = with_patterns(model.hook_names) if spells_pattern(names) else model.hook_names
        chosen = [name for name in known if pattern.match(name)]
        if not chosen and names.startswith("blocks."):
            return _chosen(model, [names])
    elif callable(names):
        chosen = [name for name in model.hook_names if names(name)]
    else:
        asked: dict[str, list[str]] = {}
        for name in names:
            asked.setdefault(_hook(model, name), []).append(name)
        return asked
    if not chosen:
        raise ValueError(f"names {names!r} matches no hook. {_available(model)}")
    return {name: [name] for name in chosen}


def _tap(model: CircuitCore, fwd_hooks: Sequence[Hook]) -> tuple[Callable[[str, Tensor], Tensor], Iterable[str]]:
    """Make the tap that calls the functions of ``fwd_hooks``; gives it, and the hooks at which it does."""
    by_hook: dict[str, list[Hook]] = {}
    for name, fn in fwd_hooks:
        by_hook.setdefault(_hook(model, name), []).append((name, fn))

    def tap(hook: str, value: Tensor) -> Tensor:
        for name, fn in by_hook.get(hook, ()):
            value = _replaced(name, value, fn(value, name))
        return value

    return tap, by_hook.keys()


def _replaced(name: str, value: Tensor, returned: Any) -> Tensor:
    if returned is None:
        return value
    if not isinstance(returned, Tensor):
        raise TypeError(f"the hook at {name!r} returned {type(returned).__name__}; a tensor or None is allowed")
    if returned.shape != value.shape or returned.dtype != value.dtype or returned.device != value.device:
        raise ValueError(
            f"the hook at {name!r} returned shape {tuple(returned.shape)}, {returned.dtype} on {returned.device}; it "
            "must be "
            f"{tuple(value.shape)}, {value.dtype} on {value.device}, as it was given"
        )
    return returned
