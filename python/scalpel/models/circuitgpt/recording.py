"""Recording and changing values at the hooks of a :class:`scalpel.CircuitGPT`."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from ...hooks.stopping import Stop
from .core import CircuitCore

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
    order = model.hook_names
    if stop_at is not None:
        check_hooks(model, [stop_at])
        late = [name for name in order[order.index(stop_at) + 1 :] if name in wanted]
        listed = not isinstance(names, str) and not callable(names)
        if late and (listed or len(late) == len(wanted)):
            raise ValueError(f"{late[0]!r} comes after stop_at {stop_at!r} and would never be computed")
    intervene = _tap(model, fwd_hooks)
    kept: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        value = intervene(name, value)
        if name in wanted:
            kept[name] = value
        if name == stop_at:
            stop()
        return value

    with Stop() as stop:
        return model(input_ids, tap=tap, **inputs), kept
    return None, kept


def run_with_hooks(model: CircuitCore, input_ids: Tensor, fwd_hooks: Sequence[Hook], **inputs: Any) -> Tensor:
    """Run the model with values changed at some hooks: :meth:`scalpel.CircuitGPT.run_with_hooks`."""
    logits: Tensor = model(input_ids, tap=_tap(model, fwd_hooks), **inputs)
    return logits


def check_hooks(model: CircuitCore, names: Iterable[str]) -> None:
    """Raise a ValueError that lists close matches and all hooks if a name is not one of the model's hooks."""
    known = model.hook_names
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=4, cutoff=0.5)
            hint = f" Close: {', '.join(close)}." if close else ""
            raise ValueError(f"unknown hook {name!r}.{hint} {_available(model)}")


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


def _available(model: CircuitCore) -> str:
    last = model.config.n_layer - 1
    if last < 0:
        return "Available: final_resid."
    in_layer = [name.partition(".")[2] for name in model.hook_names if name.startswith("0.")]
    return f"Available: {{0..{last}}}.{{{', '.join(in_layer)}}}, final_resid."


def _chosen(model: CircuitCore, names: Names) -> set[str]:
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"names is {names!r}, which is not a regular expression: {error}") from error
        chosen = {name for name in model.hook_names if pattern.match(name)}
    elif callable(names):
        chosen = {name for name in model.hook_names if names(name)}
    else:
        listed = list(names)
        check_hooks(model, listed)
        return set(listed)
    if not chosen:
        raise ValueError(f"names {names!r} matches no hook. {_available(model)}")
    return chosen


def _tap(model: CircuitCore, fwd_hooks: Sequence[Hook]) -> Callable[[str, Tensor], Tensor]:
    check_hooks(model, [name for name, _ in fwd_hooks])
    by_name: dict[str, list[Callable[[Tensor, str], Tensor | None]]] = {}
    for name, fn in fwd_hooks:
        by_name.setdefault(name, []).append(fn)

    def tap(name: str, value: Tensor) -> Tensor:
        for fn in by_name.get(name, ()):
            value = _replaced(name, value, fn(value, name))
        return value

    return tap


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
