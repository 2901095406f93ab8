"""Semigroups with published sizes, and random semigroups."""

from math import comb, factorial

import numpy as np


def full(n: int) -> dict[str, list[int]]:
    """The full transformation monoid T_n: all maps on n states."""
    return symmetric(n) | {"collapse": [0, 0, *range(2, n)]}


def symmetric(n: int) -> dict[str, list[int]]:
    """The symmetric group S_n: all permutations of n states."""
    return {"swap": [1, 0, *range(2, n)], "turn": [*range(1, n), 0]}


def cyclic(n: int) -> dict[str, list[int]]:
    return {"turn": [*range(1, n), 0]}


def catalan(n: int) -> dict[str, list[int]]:
    """The order-preserving maps on n states that move no state up, including the identity."""
    step = {f"e{i}": [i - 1 if state == i else state for state in range(n)] for i in range(1, n)}
    return {"1": list(range(n)), **step}


FLIP_FLOP = {"set": [1, 1], "reset": [0, 0], "hold": [0, 1]}

# generators, elements, idempotents, classes of R, L, H, D, aperiodic
BELL = (1, 1, 2, 5, 15, 52, 203)
PUBLISHED = {
    **{
        f"T_{n}": (
            full(n),
            n**n,
            sum(comb(n, k) * k ** (n - k) for k in range(1, n + 1)),
            {"R": BELL[n], "L": 2**n - 1, "D": n},
            False,
        )
        for n in (2, 3, 4, 5)
    },
    **{f"S_{n}": (symmetric(n), factorial(n), 1, {"R": 1, "L": 1, "H": 1, "D": 1}, False) for n in (2, 3, 4, 5, 6)},
    **{f"Z_{n}": (cyclic(n), n, 1, {"R": 1, "L": 1, "H": 1, "D": 1}, n == 1) for n in (1, 2, 3, 12)},
    **{
        f"Catalan_{n}": (
            catalan(n),
            comb(2 * n, n) // (n + 1),
            2 ** (n - 1),
            {c: comb(2 * n, n) // (n + 1) for c in "RLHD"},
            True,
        )
        for n in (2, 3, 4, 5, 6)
    },
    "flip-flop": (FLIP_FLOP, 3, 3, {"R": 2, "L": 3, "H": 3, "D": 2}, True),
}


def random(seed: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    states, generators = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    return {f"g{i}": rng.integers(states, size=states).tolist() for i in range(generators)}
