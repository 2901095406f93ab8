"""Fewer cases that see as much: every pair of values of any two axes, and not every combination of all of them.

A fault of a kernel lies in a shape, in a dtype or in a target, or in how two of these meet: a tail of lanes that one
target handles, a dtype that one target widens. Each such pair is among the cases that `pairs` chooses, so none of these
faults goes unseen. What is left out is a third axis that says the same again.
"""

from collections.abc import Sequence
from typing import Any

from allpairspy import AllPairs

__all__ = ["pairs"]


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Tuples with one value of each axis, such that any two values of two axes meet in one of them.

    The choice is the same in every process, as pytest-xdist needs it.
    """
    places = [list(range(len(axis))) for axis in axes]
    return [tuple(axis[i] for axis, i in zip(axes, chosen, strict=True)) for chosen in AllPairs(places)]
