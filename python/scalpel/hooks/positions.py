"""Choosing tokens of a text, and reading or adding values at them."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Positions = None | int | slice | Sequence[int]
Selected = tuple[int, ...] | None  # None: every position, in order


def split_pair(positions: Any) -> tuple[Any, Any]:
    """Split ``positions`` into those of the source and of the target; anything but a tuple counts for both."""
    if not isinstance(positions, tuple):
        return positions, positions
    if len(positions) != 2:
        raise ValueError(
            f"positions is a tuple of {len(positions)}; a tuple is a pair (source positions, target "
            "positions). Give a list to name several positions"
        )
    return positions


def select(positions: Any, length: int, side: str) -> Selected:
    """Return the chosen positions as non-negative integers in the order given; None for every position in order.

    Args:
        positions: None (all), an int, a slice, or a list of ints; negative ones count from the end.
        length: How many tokens the text has.
        side: "source" or "target", for messages.

    Raises:
        ValueError: For a position outside the text or given twice, or if none is chosen.
        TypeError: For anything else.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        chosen = list(range(length))[positions]
    elif _integer(positions) is not None:
        chosen = [_integer(positions) or 0]
    else:
        listed = positions.tolist() if hasattr(positions, "tolist") else positions
        if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, tuple)):
            raise TypeError(
                f"{side} positions are {positions!r}; they must be None, an int, a slice, a list of ints, "
                "or a pair (tuple of two) of these"
            )
        chosen = []
        for entry in listed:
            position = _integer(entry)
            if position is None:
                raise TypeError(f"{side} positions hold {entry!r}; each must be an int")
            chosen.append(position)
    if not chosen:
        raise ValueError(f"{side} positions {positions!r} choose no token of {length}: give at least one")
    for position in chosen:
        if not -length <= position < length:
            raise ValueError(
                f"{side} position {position} is outside the text of {length} tokens; allowed: {-length} to {length - 1}"
            )
    counted = tuple(position % length for position in chosen)
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
    """Return ``value`` (B, L, ...) at the chosen positions, (B, len(chosen), ...)."""
    return value if chosen is None else value[:, torch.tensor(chosen, device=value.device, dtype=torch.int64)]


def add_at(value: Tensor, delta: Tensor, chosen: Selected) -> Tensor:
    """Return ``value`` (B, L, ...) with ``delta`` (B, len(chosen), ...) added at the chosen positions."""
    if chosen is None:
        return value + delta
    return value.index_add(1, torch.tensor(chosen, device=value.device, dtype=torch.int64), delta)


def describe(chosen: Selected) -> str:
    """Say which positions are chosen, for a message."""
    if chosen is None:
        return "all positions"
    return f"position {chosen[0]}" if len(chosen) == 1 else f"positions {list(chosen)}"
