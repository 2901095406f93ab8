"""Choose cases that contain every pair of values of any two axes, instead of all combinations.

A fault of a kernel depends on a shape, a dtype or a target, or on how two of these interact: the remainder of a vector
that one target handles, or a dtype that one target widens. Every such pair occurs among the cases that `pairs` chooses,
so none of these faults goes unseen. Only repetitions of a pair with other values of a third axis are left out.
"""

from collections.abc import Sequence
from typing import Any

from allpairspy import AllPairs

__all__ = ["pairs"]


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose tuples with one value of each axis, such that any two values of two axes occur together in one of them.

    The choice is the same in every process, as pytest-xdist requires.
    """
    places = [list(range(len(axis))) for axis in axes]
    return [tuple(axis[i] for axis, i in zip(axes, chosen, strict=True)) for chosen in AllPairs(places)]
