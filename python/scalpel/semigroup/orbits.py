"""Orbits on large grids of states: what is reachable, how far away it is, and how each state's own orbit ends.

A state is a number from 0 to n - 1. The states of a grid of any shape are numbered in row-major order
(``numpy.ravel_multi_index``). A generator is the array of its images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["distances", "orbit_shapes", "reachable", "state_maps", "unreachable"]

UNREACHED = -1
# Up to this size numpy's loop finishes before numba would have compiled its own.
_FEW_STATES = 1 << 16


def reachable(images: Any, starts: Any) -> np.ndarray:
    """Find the states to which some word leads from a start.

    The empty word counts, so the starts are reachable.

    Args:
        images: The images of the states under each generator, integers (generators, states).
        starts: One state, several, or a bool for each state.

    Returns:
        A bool array (states,).

    Raises:
        TypeError: If images or starts are not integers.
        ValueError: If a generator leads out of the states, or there is no such start.

    Example:
        >>> scalpel.semigroup.reachable(images=[[1, 2, 2, 3]], starts=0)
        array([ True,  True,  True, False])
    """
    return distances(images, starts) != UNREACHED


def unreachable(images: Any, starts: Any) -> np.ndarray:
    """Find the holes: the states to which no word leads from the starts.

    Args:
        images: The images of the states under each generator, integers (generators, states).
        starts: One state, several, or a bool for each state.

    Returns:
        The states, ascending, int64.

    Raises:
        TypeError: If images or starts are not integers.
        ValueError: If a generator leads out of the states, or there is no such start.

    Example:
        >>> scalpel.semigroup.unreachable(images=[[1, 2, 2, 3]], starts=0)
        array([3])
    """
    return np.flatnonzero(~reachable(images, starts))


def distances(images: Any, starts: Any) -> np.ndarray:
    """Compute the length of the shortest word from a start to each state.

    The search is breadth-first, one letter at a time; several threads share a wide frontier.

    Args:
        images: The images of the states under each generator, integers (generators, states).
        starts: One state, several, or a bool for each state.

    Returns:
        The lengths, int32 (states,); -1 where no word leads to a state.

    Raises:
        TypeError: If images or starts are not integers.
        ValueError: If a generator leads out of the states, or there is no such start.

    Example:
        >>> scalpel.semigroup.distances(images=[[1, 2, 2, 3]], starts=0)
        array([ 0,  1,  2, -1], dtype=int32)
    """
    maps = state_maps(images)
    first = _states(starts, maps.shape[1])
    steps_to = np.full(maps.shape[1], UNREACHED, dtype=np.int32)
    steps_to[first] = 0
    if maps.shape[1] <= _FEW_STATES:
        _breadth_first(maps, first, steps_to)
    else:
        from .orbit_kernels import breadth_first

        breadth_first(np.ascontiguousarray(maps.T), first, steps_to)
    return steps_to


def orbit_shapes(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find how the orbit s, Π(s), Π²(s), … of every state s under one map ends.

    Args:
        image: The image of each state, integers (states,).

    Returns:
        For each state the index, the number of steps before its orbit enters a cycle (0 on a cycle), and the period of
        that cycle: two integer arrays (states,).

    Raises:
        TypeError: If image is not an array of integers.
        ValueError: If it leads out of the states.

    Example:
        >>> index, period = scalpel.semigroup.orbit_shapes([1, 2, 1, 3])
        >>> index.tolist(), period.tolist()
        ([1, 0, 0, 0], [2, 2, 2, 1])
    """
    maps = state_maps(np.asarray(image)[None])
    from .orbit_kernels import orbit_shapes as measure

    index, period = measure(maps[0])
    return index, period


def state_maps(images: Any) -> np.ndarray:
    """Check that images are maps on the states, and return them as contiguous int32 or int64 (generators, states).

    Raises:
        TypeError: If they are not integers.
        ValueError: If there are no states, or a map leads out of them.
    """
    maps = np.asarray(images)
    if maps.dtype.kind not in "iu":
        raise TypeError(f"images are {maps.dtype}; a map on the states is an array of integers")
    if maps.ndim != 2 or maps.shape[1] == 0:
        raise ValueError(f"images have shape {maps.shape}; they must be (generators, states) with at least one state")
    states = maps.shape[1]
    low, high = (int(maps.min()), int(maps.max())) if maps.size else (0, 0)
    if low < 0 or high >= states:
        outside = low if low < 0 else high
        at = np.argwhere(maps == outside)[0]
        raise ValueError(
            f"generator {at[0]} sends state {at[1]} to {outside}; the states are 0 to {states - 1}. "
            "Give a partial map an extra state for what is undefined."
        )
    return np.ascontiguousarray(maps, dtype=np.int32 if states <= np.iinfo(np.int32).max else np.int64)


def _states(states: Any, count: int) -> np.ndarray:
    chosen = np.atleast_1d(np.asarray(states))
    if chosen.dtype == bool and chosen.shape == (count,):
        return np.flatnonzero(chosen)
    if chosen.dtype.kind not in "iu" and chosen.size:
        raise TypeError(
            f"states are {chosen.dtype}; pass a number, several numbers, or a bool for each of the {count} states"
        )
    chosen = chosen.astype(np.int64).ravel()
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < count:
        raise ValueError(f"there is no state {_outside(chosen.tolist(), count)}; the states are 0 to {count - 1}")
    return np.unique(chosen)


def _outside(states: Sequence[int], count: int) -> int:
    return next(state for state in states if not 0 <= state < count)


def _breadth_first(maps: np.ndarray, frontier: np.ndarray, steps_to: np.ndarray) -> None:
    steps = 0
    while frontier.size and len(maps):
        steps += 1
        next_states = np.unique(maps[:, frontier])
        frontier = next_states[steps_to[next_states] == UNREACHED]
        steps_to[frontier] = steps
