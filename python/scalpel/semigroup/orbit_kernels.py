"""Loops over millions of states, which numba compiles on first use."""

import numba
import numpy as np

_CHUNK = 4096  # states of the frontier that one task expands; a smaller frontier is not worth a second thread


def breadth_first(images: np.ndarray, starts: np.ndarray, steps_to: np.ndarray) -> None:
    """Fill ``steps_to`` (states,) int32, -1 where not reached yet, with distances from ``starts``.

    ``images`` is (states, generators), so that the images of a state are adjacent in memory.
    """
    generators = images.shape[1]
    frontier = starts.astype(images.dtype)
    steps = 0
    while frontier.size and generators:
        steps += 1
        if frontier.size <= _CHUNK:
            # One call expands a run of narrow levels, because a grid has thousands of them.
            frontier, steps = _narrow(images, frontier, steps_to, steps, _CHUNK)
            continue
        chunks = -(-frontier.size // _CHUNK)
        parts = np.empty((chunks, _CHUNK * generators), dtype=images.dtype)
        counts = np.zeros(chunks, dtype=np.int64)
        _wide(images, frontier, steps_to, steps, parts, counts, _CHUNK)
        frontier = _joined(parts, counts)


@numba.njit(nogil=True)
def _narrow(images, frontier, steps_to, steps, most):  # type: ignore[no-untyped-def]
    """Expand level after level until one is wider than ``most`` or empty; return it and the number of levels done."""
    generators = images.shape[1]
    now = np.empty(most * generators, dtype=images.dtype)
    after = np.empty(most * generators, dtype=images.dtype)
    width = frontier.size
    now[:width] = frontier
    while True:
        count = 0
        for i in range(width):
            for g in range(generators):
                target = images[now[i], g]
                if steps_to[target] == -1:
                    steps_to[target] = steps
                    after[count] = target
                    count += 1
        now, after, width = after, now, count
        if width == 0 or width > most:
            return now[:width].copy(), steps
        steps += 1


@numba.njit(parallel=True, nogil=True)
def _wide(images, frontier, steps_to, steps, parts, counts, chunk):  # type: ignore[no-untyped-def]
    """Expand one level in parallel.

    Two threads may both claim a state. Both then write the same distance, and the state is twice in the next frontier,
    which costs a little time and changes no result.
    """
    generators = images.shape[1]
    for c in numba.prange(counts.size):
        count = 0
        for i in range(c * chunk, min(frontier.size, (c + 1) * chunk)):
            for g in range(generators):
                target = images[frontier[i], g]
                if steps_to[target] == -1:
                    steps_to[target] = steps
                    parts[c, count] = target
                    count += 1
        counts[c] = count


@numba.njit(parallel=True, nogil=True)
def _joined(parts, counts):  # type: ignore[no-untyped-def]
    ends = np.cumsum(counts)
    out = np.empty(ends[-1], dtype=parts.dtype)
    for c in numba.prange(counts.size):
        out[ends[c] - counts[c] : ends[c]] = parts[c, : counts[c]]
    return out


@numba.njit(nogil=True)
def orbit_shapes(image):  # type: ignore[no-untyped-def]
    """Compute index and period of every state under one map, walking over each state once."""
    states = image.size
    index = np.full(states, -1, dtype=image.dtype)  # -1: not visited, -2: on the current walk
    period = np.zeros(states, dtype=image.dtype)
    walk = np.empty(states, dtype=image.dtype)
    for start in range(states):
        length = 0
        state = start
        while index[state] == -1:
            index[state] = -2
            walk[length] = state
            length += 1
            state = image[state]
        if index[state] == -2:  # the walk has met itself, so it ends in a cycle
            size = 0
            while True:
                length -= 1
                size += 1
                if walk[length] == state:
                    break
            for i in range(length, length + size):
                index[walk[i]] = 0
                period[walk[i]] = size
        for i in range(length - 1, -1, -1):
            following = image[walk[i]]
            index[walk[i]] = index[following] + 1
            period[walk[i]] = period[following]
    return index, period
