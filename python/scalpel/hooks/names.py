"""What hooks are called: their names in the order of the forward pass, and other names for the same values.

A hook of layer 0 is written ``"0.attn.q"``, with a name of :data:`IN_LAYER` after the layer; ``"final_resid"`` follows
the last layer, and ``"logits"`` is the output. The same values are known by TransformerLens's names
(``"blocks.0.attn.hook_q"``) and by module paths (``"model.layers.0.self_attn.q_proj"``, with ``":in"`` for a module's
input). A model family states only its module paths; everything else about names is here.

Beside these hooks every layer has the weights of its attention, ``"0.attn.pattern"``. They are computed only for those
who ask for them by name, so they are in no list of a model's hooks unless :func:`with_patterns` puts them there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = [
    "FINAL",
    "IN_LAYER",
    "LOGITS",
    "PATTERN",
    "TRANSFORMER_LENS",
    "check_no_pattern",
    "hook_named",
    "hook_names",
    "is_pattern",
    "known_hook",
    "module_path",
    "spells_pattern",
    "with_patterns",
]

# A layer's hooks in the order in which the forward pass reaches them.
IN_LAYER = (
    "resid_in",
    "attn.act_in",
    "attn.k",
    "attn.q",
    "attn.v",
    "attn.y",
    "attn.resid_delta",
    "resid_mid",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)
FINAL = "final_resid"
LOGITS = "logits"
# The weights of attention, (B, queries, heads * keys): those of a query's heads side by side. They follow "attn.v".
PATTERN = "attn.pattern"

# What a layer leaves is the next layer's "resid_in", or FINAL after the last layer. Module paths and TransformerLens
# name it by the layer that leaves it, which is "after" in the tables of aliases.
_AFTER = "after"

# TransformerLens's names of the same values. Its q, k, v, z and pattern have an axis for the heads; ours are flat.
TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_in",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": _AFTER,
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_pattern": PATTERN,
    "attn.hook_z": "attn.y",
    "hook_attn_out": "attn.resid_delta",
    "mlp.hook_post": "mlp.post_act",
    "hook_mlp_out": "mlp.resid_delta",
}


def hook_names(layers: int, parallel: bool = False) -> list[str]:
    """List the hooks of a model in the order of the forward pass, ``"final_resid"`` last.

    Args:
        layers: How many layers the model has.
        parallel: Whether attention and MLP read the same residual stream, so that no layer has a ``"resid_mid"``.

    Example:
        >>> hook_names(1)[-3:]
        ['0.mlp.post_act', '0.mlp.resid_delta', 'final_resid']
    """
    in_layer = [name for name in IN_LAYER if not (parallel and name == "resid_mid")]
    return [f"{i}.{name}" for i in range(layers) for name in in_layer] + [FINAL]


def with_patterns(hooks: Sequence[str]) -> list[str]:
    """List ``hooks`` together with the attention weights of every layer, in the order of the forward pass.

    Example:
        >>> with_patterns(hook_names(1))[4:7]
        ['0.attn.v', '0.attn.pattern', '0.attn.y']
    """
    listed = []
    for hook in hooks:
        listed.append(hook)
        layer, _, place = hook.partition(".")
        if place == "attn.v":
            listed.append(f"{layer}.{PATTERN}")
    return listed


def is_pattern(hook: str) -> bool:
    """Tell whether a hook, by our name, is the attention weights of a layer."""
    return hook.partition(".")[2] == PATTERN


def check_no_pattern(source: str) -> None:
    """Raise ValueError where a source, by our name, is the attention weights of a layer."""
    if is_pattern(source):
        at = source.removesuffix(PATTERN)
        raise ValueError(
            f"the source is {source!r}, and attention weights are a target only: what follows them, '{at}attn.y', is "
            f"their product with '{at}attn.v'. Choose one of these, '{at}attn.q' or '{at}attn.k'"
        )


def spells_pattern(names: str) -> bool:
    """Tell whether a name or a regular expression spells out that attention weights are meant.

    Every other expression, such as ``".*"``, leaves them out, because they take (queries x keys) numbers a head.
    """
    return "pattern" in names


def hook_named(name: str, paths: Mapping[str, str], hooks: Sequence[str], as_source: bool) -> str | None:
    """Find the hook that is meant by one of our names, a name of TransformerLens or a module path.

    Args:
        name: The name to look up.
        paths: {hook in a layer, "after" or "final_resid": module path with ``{i}`` for the layer}.
        hooks: The model's hooks, from :func:`hook_names`.
        as_source: Whether the value will be changed there. The input of a layer's second norm has the value of
            ``"resid_mid"``, but a change at that input would leave the residual stream as it is, so this module path
            is no name of ``"resid_mid"`` as a source.

    Returns:
        Our name, or None if ``name`` is unknown.

    Example:
        >>> hook_named("blocks.0.hook_resid_post", {"final_resid": "norm:in"}, hook_names(2), False)
        '1.resid_in'
    """
    return name if name in hooks else dict(_aliases(paths, hooks, as_source)).get(name)


def module_path(name: str, paths: Mapping[str, str], hooks: Sequence[str], as_source: bool = False) -> str:
    """Find the module path at which a hook's value can be read, and replaced if ``as_source``.

    Args:
        name: Any name of the hook.
        paths: The module path of each hook of a layer, as for :func:`hook_named`.
        hooks: The names of all hooks, as for :func:`hook_named`.
        as_source: Whether the value is to be replaced, and not only read.

    Returns:
        The module path; ``name`` as it was given if it names no hook, or a hook that is no module's value.
    """
    hook = hook_named(name, paths, hooks, as_source)
    if hook is None or (as_source and hook.endswith(".resid_mid")):
        return name
    in_layer = re.fullmatch(r"(\d+)\.(.*)", hook)
    path = paths.get(in_layer[2] if in_layer else hook)
    return name if path is None else path.format(i=in_layer[1] if in_layer else "")


def _aliases(paths: Mapping[str, str], hooks: Sequence[str], as_source: bool) -> Iterator[tuple[str, str]]:
    """Yield (another name, our hook)."""
    known = set(hooks)
    layers = 1 + int(hooks[-2].partition(".")[0]) if len(hooks) > 1 else 0
    for i in range(layers):
        left_by_layer = f"{i + 1}.resid_in" if i + 1 < layers else FINAL
        aliases = [(f"blocks.{i}.{alias}", hook) for alias, hook in TRANSFORMER_LENS.items()]
        for hook, path in paths.items():
            if hook != FINAL and not (as_source and hook == "resid_mid"):
                aliases.append((path.format(i=i), hook))
        for alias, hook in aliases:
            ours = left_by_layer if hook == _AFTER else f"{i}.{hook}"
            if ours in known:
                yield alias, ours
    yield paths[FINAL], FINAL


def known_hook(name: Any, known: Sequence[str], role: str, model: str) -> None:
    """Check that a hook's name is known.

    Args:
        name: What the user gave.
        known: The names that are allowed.
        role: What the hook is given as, for the message: "source", "target" or "hook".
        model: What the hook was looked up in, for the message.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If it is not among ``known``; the message lists the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f"{role} is {name!r}; it must be a hook's name")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [hook for hook in known if hook not in ("", ":in")][:6]
        raise ValueError(f"unknown {role} {name!r} for {model}; near it: {', '.join(map(repr, near))}")
