"""Index and period of one map's powers, from how its states' orbits end."""

from math import lcm

import numpy as np

__all__ = ["index_and_period"]


def index_and_period(images: np.ndarray) -> tuple[int, int]:
    """The least index m and period p, both 1 or more, with xᵐ⁺ᵖ = xᵐ, of a map x given by images (states,).

    m is the longest tail before a cycle, p the common period of the cycles.
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
    """bool (states,): what is left after taking away, again and again, the states that nothing leads to."""
    left = np.ones(len(images), dtype=bool)
    incoming = np.bincount(images, minlength=len(images))
    leaves = np.flatnonzero(incoming == 0)
    while leaves.size:
        left[leaves] = False
        incoming = incoming - np.bincount(images[leaves], minlength=len(images))
        leaves = np.flatnonzero(left & (incoming == 0))
    return left
