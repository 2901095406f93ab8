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
    """Run the model and keep the values at some hooks.

    ``names``: a regex (matched from the start of a hook's name, as ``re.match`` does), a list of hook names,
    or a callable of a name. ``stop_at``: a hook right after which the computation stops; the logits are then
    None. ``fwd_hooks``: interventions as in :func:`run_with_hooks`, made before recording. ``inputs``:
    ``attention_mask``, ``position_ids``.

    Returns the logits (B, L, vocab) or None, and a dict of hook name to value (B, L, width), in the order of
    the forward pass. The values are the tensors that the model goes on with: after ablations and
    interventions, with their autograd history (use ``torch.no_grad()`` to save memory), rows at padding
    included. Don't change them in place. ValueError for an unknown hook, for a regex
    or a callable that matches none, and where nothing that was asked for comes before ``stop_at``.
    """
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
    """Logits (B, L, vocab) with ``fn(value, name)`` called at each named hook, in the order given.

    ``fn`` returns the value to go on with, of the same shape and dtype on the same device, or None to leave
    it. Ablations that are in force come first: ``fn`` sees the value after them.
    """
    logits: Tensor = model(input_ids, tap=_tap(model, fwd_hooks), **inputs)
    return logits


def check_hooks(model: CircuitCore, names: Iterable[str]) -> None:
    """ValueError that lists close matches and what there is, if a name isn't one of the model's hooks."""
    known = model.hook_names
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=4, cutoff=0.5)
            hint = f" Close: {', '.join(close)}." if close else ""
            raise ValueError(f"unknown hook {name!r}.{hint} {_available(model)}")


def hook_width(model: CircuitCore, name: str) -> int:
    """Number of channels at a hook."""
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


def _replaced(name: str, value: Tensor, given: Any) -> Tensor:
    if given is None:
        return value
    if not isinstance(given, Tensor):
        raise TypeError(f"the hook at {name!r} returned {type(given).__name__}; a tensor or None is allowed")
    if given.shape != value.shape or given.dtype != value.dtype or given.device != value.device:
        raise ValueError(
            f"the hook at {name!r} returned shape {tuple(given.shape)}, {given.dtype} on {given.device}; it "
            "must be "
            f"{tuple(value.shape)}, {value.dtype} on {value.device}, as it was given"
        )
    return given
