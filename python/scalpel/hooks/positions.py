"""Which tokens a Jacobian is restricted to, and whether a path leads from one hook to another."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Positions = None | int | slice | Sequence[int]
Selected = tuple[int, ...] | None  # None: every position, in order

_PATHS = {  # within a layer: hook → the hooks that it reads, and whether it reads other tokens there
    "attn.act_in": (("resid_in", False),),
    "attn.k": (("attn.act_in", False),),
    "attn.q": (("attn.act_in", False),),
    "attn.v": (("attn.act_in", False),),
    "attn.y": (("attn.q", False), ("attn.k", True), ("attn.v", True)),
    "attn.resid_delta": (("attn.y", False),),
    "resid_mid": (("resid_in", False), ("attn.resid_delta", False)),
    "mlp.act_in": (("resid_mid", False),),
    "mlp.post_act": (("mlp.act_in", False),),
    "mlp.resid_delta": (("mlp.post_act", False),),
}


def split_pair(positions: Any) -> tuple[Any, Any]:
    """``positions`` as (source's, target's): a tuple gives each its own, anything else counts for both."""
    if not isinstance(positions, tuple):
        return positions, positions
    if len(positions) != 2:
        raise ValueError(
            f"positions is a tuple of {len(positions)}; a tuple is a pair (source positions, target "
            "positions). Give a list to name several positions"
        )
    return positions


def select(positions: Any, length: int, side: str) -> Selected:
    """The positions chosen among ``length`` tokens, as non-negative integers in the order given.

    ``positions``: None (all), an int, a slice, or a list of ints; negative ones count from the end.
    ValueError for one outside the text, one given twice, or none at all; TypeError for anything else.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        chosen = list(range(length))[positions]
    elif _integer(positions) is not None:
        chosen = [_integer(positions) or 0]
    else:
        given = positions.tolist() if hasattr(positions, "tolist") else positions
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes, tuple)):
            raise TypeError(
                f"{side} positions are {positions!r}; they must be None, an int, a slice, a list of ints, "
                "or a pair (tuple of two) of these"
            )
        chosen = []
        for each in given:
            value = _integer(each)
            if value is None:
                raise TypeError(f"{side} positions hold {each!r}; each must be an int")
            chosen.append(value)
    if not chosen:
        raise ValueError(f"{side} positions {positions!r} choose no token of {length}: give at least one")
    for each in chosen:
        if not -length <= each < length:
            raise ValueError(
                f"{side} position {each} is outside the text of {length} tokens; allowed: {-length} to {length - 1}"
            )
    counted = tuple(each % length for each in chosen)
    if len(set(counted)) < len(counted):
        raise ValueError(f"{side} positions {positions!r} name a token twice: give each once")
    return None if counted == tuple(range(length)) else counted


def _integer(value: Any) -> int | None:
    if isinstance(value, (bool, str)) or (isinstance(value, Tensor) and value.dim() > 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def read_at(value: Tensor, chosen: Selected) -> Tensor:
    """``value`` (B, L, ...) at the chosen positions: (B, len(chosen), ...)."""
    return value if chosen is None else value[:, torch.tensor(chosen, device=value.device, dtype=torch.int64)]


def add_at(value: Tensor, delta: Tensor, chosen: Selected) -> Tensor:
    """``value`` (B, L, ...) with ``delta`` (B, len(chosen), ...) added at the chosen positions."""
    if chosen is None:
        return value + delta
    return value.index_add(1, torch.tensor(chosen, device=value.device, dtype=torch.int64), delta)


def describe(chosen: Selected) -> str:
    if chosen is None:
        return "all positions"
    return f"position {chosen[0]}" if len(chosen) == 1 else f"positions {list(chosen)}"


def check_path(
    hooks: list[str],
    source: str,
    target: str,
    at: tuple[Selected, Selected],
    allowed: Tensor,
) -> None:
    """ValueError unless some chosen source token can move some chosen target token of a CircuitGPT.

    ``hooks``: names in the order of the forward pass, ``logits`` last; ``allowed`` (L, L) or (B, 1, L, L):
    the keys that each query may read. Only the wiring is asked, not the weights: a path that a zero weight, a
    TopK or an ablation cuts gives a Jacobian of zeros.
    """
    if hooks.index(target) < hooks.index(source):
        raise ValueError(
            f"no path from {source!r} to {target!r}: the forward pass reaches {target!r} first. "
            "Swap them, or choose a later target"
        )
    reads = allowed if allowed.dim() == 2 else allowed[:, 0]
    if not bool(_reached(hooks, source, target, None, reads).any()):
        raise ValueError(
            f"no path from {source!r} to {target!r}: {target!r} does not read {source!r} and nothing between "
            "does. Choose a target further on"
        )
    if not bool(read_at(_reached(hooks, source, target, at[0], reads), at[1]).any()):
        raise ValueError(
            f"no path from {source!r} at {describe(at[0])} to {target!r} at {describe(at[1])}: a token is "
            "read only by itself and, through attention, by the later tokens whose mask allows it. Choose "
            "later target positions"
        )


def _reached(hooks: list[str], source: str, target: str, chosen: Selected, reads: Tensor) -> Tensor:
    """Tokens (B or 1, L) of ``target`` that a chosen token of ``source`` can move."""
    length = reads.shape[-1]
    none = torch.zeros(reads.shape[0] if reads.dim() == 3 else 1, length, dtype=torch.bool, device=reads.device)
    start = none.clone()
    start[:, slice(None) if chosen is None else list(chosen)] = True
    reach = {source: start}
    for name in hooks[hooks.index(source) + 1 : hooks.index(target) + 1]:
        found = none
        for parent, mixes in parents_of(name, hooks):
            if parent in reach:
                found = found | ((reads & reach[parent][:, None, :]).any(-1) if mixes else reach[parent])
        reach[name] = found
    return reach[target]


def parents_of(name: str, hooks: list[str]) -> list[tuple[str, bool]]:
    layer, _, hook = name.partition(".")
    if hook == "mlp.act_in" and f"{layer}.resid_mid" not in hooks:  # attention and MLP in parallel
        return [(f"{layer}.resid_in", False)]
    if hook in _PATHS:
        return [(f"{layer}.{parent}", mixes) for parent, mixes in _PATHS[hook]]
    if name == "logits":
        return [("final_resid", False)]
    # the residual stream at the head of a layer, or after the last one: what the layer before left
    before = hooks[hooks.index(name) - 1].partition(".")[0] if hooks.index(name) else ""
    parents = ["resid_mid", "mlp.resid_delta"]
    if f"{before}.resid_mid" not in hooks:
        parents += ["resid_in", "attn.resid_delta"]
    return [(f"{before}.{parent}", False) for parent in parents] if before else []
