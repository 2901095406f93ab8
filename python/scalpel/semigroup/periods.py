"""Index and period of a map's powers, from how the orbits of its states end."""

from math import lcm

import numpy as np

__all__ = ["index_and_period"]


def index_and_period(images: np.ndarray) -> tuple[int, int]:
    """Compute the smallest m and p, both at least 1, with xᵐ⁺ᵖ = xᵐ, for a map x with images (states,).

    The index m is the longest path before a cycle, and the period p is the least common multiple of the cycles'
    lengths.
    """
    successor = images.tolist()
    cyclic = _states_on_cycles(images)
    period, seen = 1, set()
    for start in np.flatnonzero(cyclic).tolist():
        length, state = 0, start
        while state not in seen:
            seen.add(state)
            length, state = length + 1, successor[state]
        period = lcm(period, max(length, 1))
    index, states = 1, images
    while not cyclic[states].all():
        index, states = index + 1, images[states]
    return index, period


def _states_on_cycles(images: np.ndarray) -> np.ndarray:
    """Mark the states on cycles, bool (states,), by repeatedly removing states to which nothing leads."""
    left = np.ones(len(images), dtype=bool)
    incoming = np.bincount(images, minlength=len(images))
    leaves = np.flatnonzero(incoming == 0)
    while leaves.size:
        left[leaves] = False
        incoming = incoming - np.bincount(images[leaves], minlength=len(images))
        leaves = np.flatnonzero(left & (incoming == 0))
    return left
