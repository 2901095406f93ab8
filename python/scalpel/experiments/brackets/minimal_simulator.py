"""Where does the seed's simulator fail, in exact rational arithmetic?

No model takes part. The simulator is the one that the seed, the project's founding document, prints: it answers
1[k/n > θ] and computes k/n itself, so a match confirms arithmetic and says nothing about a network.

Predicted: with k evidence tokens the answer fails from n* = ⌈k/θ⌉ tokens on.
Measured: the simulator is run token by token on every cell (k, n) of a grid, for the seed's θ and for random ones.
Null: the same formula with "≥" in place of ">". It must be wrong somewhere, or the comparison could not tell a right
formula from a wrong one.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from ...semigroup import ThresholdCounter
from ..provenance import at_least
from ..result import Protocol, Result

if TYPE_CHECKING:
    from ...models.circuitgpt.model import CircuitGPT

QUESTION = "Where does the seed's simulator 1[k/n > θ] fail, in exact arithmetic?"
SEED_FIGURE = "n* = 14 and d = 12 for k = 2, θ = 0.15"
SEED_THETA, SEED_K, SEED_N0 = "0.15", 2, 2


def simulate(k: int, n: int, theta: Fraction) -> bool:
    """The seed's simulator, step by step, on a context of n tokens of which the first k are evidence."""
    evidence = sum(1 for position in range(n) if position < k)
    return n > 0 and Fraction(evidence, n) > theta


def run(
    model: "CircuitGPT | None" = None, *, k_max: int = 12, n_max: int = 100, seed: int = 0, samples: int = 200
) -> Result:
    """Compare the seed's formula with its simulator on every cell (k, n) with k ≤ n.

    Args:
        model: Not used; every experiment takes a model.
        k_max: The largest amount of evidence, 2 or more.
        n_max: The longest context in tokens.
        seed: Seed of the random thresholds.
        samples: How many random thresholds θ are tried beside the seed's 3/20.

    Returns:
        A Result; its null also states how many cells float32 arithmetic gets wrong.

    Raises:
        ValueError: An option is too small, or ``n_max`` too short for any failure.

    Example:
        >>> from scalpel.experiments import run
        >>> run("minimal_simulator", samples=3).verdict
        'reproduced'
    """
    at_least(SEED_K, k_max=k_max)
    at_least(1, n_max=n_max)
    at_least(0, seed=seed, samples=samples)
    protocol = Protocol("minimal_simulator", QUESTION, SEED_FIGURE, {"model": "none: arithmetic", "seed": seed})
    counter = ThresholdCounter(SEED_THETA)
    rng = np.random.default_rng(seed)
    fractions = zip(rng.integers(1, 40, samples).tolist(), rng.integers(40, 200, samples).tolist(), strict=True)
    thetas = [Fraction(numerator, denominator) for numerator, denominator in fractions]
    length, fewest = counter.critical_length(SEED_K), counter.min_distractors(SEED_K, SEED_N0)
    protocol.predict(
        {
            "summary": f"n* = ⌈k/θ⌉ = {length}, d = {fewest}",
            "critical_length": {k: counter.critical_length(k) for k in range(1, k_max + 1)},
            "min_distractors": fewest,
            "region": "{(k, n): n ≥ ⌈k/θ⌉}",
            "rule": "Reproduced iff the formula and the simulator agree on every cell, for the seed's θ and for random "
            "ones, and the null, which fails one token late, disagrees somewhere.",
        }
    )
    protocol.measuring()
    first_failures = {k: first_failure(k, counter.theta, k_max * n_max) for k in range(1, k_max + 1)}
    wrong_cells = _disagreements(counter, k_max, n_max)
    wrong_cells_random_theta = sum(_disagreements(ThresholdCounter(t), k_max, n_max // 2) for t in thetas)
    wrong_with_at_least = sum(
        (Fraction(k, n) >= counter.theta) != simulate(k, n, counter.theta)
        for k in range(1, k_max + 1)
        for n in range(k, n_max + 1)
    )
    wrong_in_float32 = sum(
        (np.float32(k) > np.float32(0.15) * np.float32(n)) != simulate(k, n, counter.theta)
        for k in range(1, k_max + 1)
        for n in range(k, n_max + 1)
    )
    distractors = first_failures[SEED_K] - SEED_N0
    holds = wrong_cells == 0 and wrong_cells_random_theta == 0 and wrong_with_at_least > 0
    return protocol.conclude(
        measured={
            "summary": f"n* = {first_failures[SEED_K]}, d = {distractors}; "
            f"{wrong_cells + wrong_cells_random_theta} wrong cells",
            "critical_length": first_failures,
            "min_distractors": distractors,
            "wrong_cells": wrong_cells,
            "wrong_cells_random_theta": wrong_cells_random_theta,
            "random_thetas": samples,
        },
        interval={"summary": "exact"},
        null={
            "summary": f"≥ for >: {wrong_with_at_least} wrong cells; float32: {wrong_in_float32}",
            "at_least_instead_of_above": wrong_with_at_least,
            "float32_arithmetic": int(wrong_in_float32),
        },
        verdict="reproduced" if holds else "not reproduced",
        figures={
            "region": {
                "kind": "region",
                "title": "Failure region of the simulator, θ = 3/20 (the seed's “hole”: a region of inputs)",
                "k": list(range(1, k_max + 1)),
                "n_max": n_max,
                "fails": counter.hole(k_max, n_max)[1:],
            }
        },
    )


def first_failure(k: int, theta: Fraction, limit: int) -> int:
    """The shortest context of at least k tokens at which the simulator fails, found by trying each length."""
    for n in range(k, limit + 1):
        if not simulate(k, n, theta):
            return n
    raise ValueError(f"no failure up to n = {limit} for k = {k}, θ = {theta}; give a larger n_max")


def _disagreements(counter: ThresholdCounter, k_max: int, n_max: int) -> int:
    """How many cells the formula and the simulator answer differently."""
    hole = counter.hole(k_max, n_max)
    return sum(
        bool(hole[k, n]) == simulate(k, n, counter.theta) for k in range(1, k_max + 1) for n in range(k, n_max + 1)
    )
