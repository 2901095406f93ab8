"""Which tokens a Jacobian is restricted to, and whether a path leads from one hook to another."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Positions = None | int | slice | Sequence[int]
Selected = tuple[int, ...] | None  # None: every position, in order


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
