"""Orbits on large grids of states: what is reachable, how far away, and how each state's own orbit ends.

A state is a number from 0 to n - 1; a grid of any shape is its states in row-major order (``numpy.ravel_multi_index``).
A generator is the array of its images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["distances", "orbit_shapes", "reachable", "state_maps", "unreachable"]

UNREACHED = -1
# Up to here numpy's own loop is done before numba would have compiled its own.
_FEW_STATES = 1 << 16


def reachable(images: Any, starts: Any) -> np.ndarray:
    """Whether some word, the empty one included, leads from a start to each state.

    images: integers (generators, states), or any number of leading grid axes flattened by the caller; starts: one
    state or several. Returns bool (states,). TypeError or ValueError where ``images`` holds no maps on the states.
    """
    return distances(images, starts) != UNREACHED


def unreachable(images: Any, starts: Any) -> np.ndarray:
    """The states that no word reaches from the starts, ascending, int64: the holes."""
    return np.flatnonzero(~reachable(images, starts))


def distances(images: Any, starts: Any) -> np.ndarray:
    """Length of the shortest word from a start to each state, int32 (states,); -1 where there is none.

    Breadth-first, one letter at a time; a wide frontier is shared among threads. images and starts as in
    :func:`reachable`.
    """
    maps = state_maps(images)
    first = _states(starts, maps.shape[1])
    found = np.full(maps.shape[1], UNREACHED, dtype=np.int32)
    found[first] = 0
    if maps.shape[1] <= _FEW_STATES:
        _breadth_first(maps, first, found)
    else:
        from .orbit_kernels import breadth_first

        breadth_first(np.ascontiguousarray(maps.T), first, found)
    return found


def orbit_shapes(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """How the orbit s, Π(s), Π²(s), … of every state under one map ends: (index, period), integers (states,) each.

    After ``index`` steps the orbit repeats with ``period``; on a cycle the index is 0. image: integers (states,).
    """
    maps = state_maps(np.asarray(image)[None])
    from .orbit_kernels import orbit_shapes as measure

    index, period = measure(maps[0])
    return index, period


def state_maps(images: Any) -> np.ndarray:
    """``images`` as a contiguous int32 or int64 array (generators, states), checked to be maps on the states."""
    maps = np.asarray(images)
    if maps.dtype.kind not in "iu":
        raise TypeError(f"images are {maps.dtype}; a map on the states is an array of integers")
    if maps.ndim != 2 or maps.shape[1] == 0:
        raise ValueError(f"images have shape {maps.shape}; they must be (generators, states), at least one state")
    states = maps.shape[1]
    low, high = (int(maps.min()), int(maps.max())) if maps.size else (0, 0)
    if low < 0 or high >= states:
        wrong = low if low < 0 else high
        at = np.argwhere(maps == wrong)[0]
        raise ValueError(
            f"generator {at[0]} sends state {at[1]} to {wrong}; the states are 0 to {states - 1}. "
            "A partial map needs a state of its own for what is undefined."
        )
    return np.ascontiguousarray(maps, dtype=np.int32 if states <= np.iinfo(np.int32).max else np.int64)


def _states(states: Any, count: int) -> np.ndarray:
    chosen = np.atleast_1d(np.asarray(states))
    if chosen.dtype == bool and chosen.shape == (count,):
        return np.flatnonzero(chosen)
    if chosen.dtype.kind not in "iu" and chosen.size:
        raise TypeError(f"states are {chosen.dtype}; give a number, numbers, or a bool for each of the {count}")
    chosen = chosen.astype(np.int64).ravel()
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < count:
        raise ValueError(f"there is no state {_outside(chosen.tolist(), count)}; the states are 0 to {count - 1}")
    return np.unique(chosen)


def _outside(states: Sequence[int], count: int) -> int:
    return next(state for state in states if not 0 <= state < count)


def _breadth_first(maps: np.ndarray, frontier: np.ndarray, found: np.ndarray) -> None:
    steps = 0
    while frontier.size and len(maps):
        steps += 1
        next_states = np.unique(maps[:, frontier])
        frontier = next_states[found[next_states] == UNREACHED]
        found[frontier] = steps
