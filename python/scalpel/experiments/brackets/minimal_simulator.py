"""Does the seed's simulator fail where the seed's formula says? Exact rational arithmetic, no model.

The simulator computes k/n itself, so a match confirms arithmetic and nothing about a network. The formula is
checked against the simulator run token by token, on every cell of a grid and for thresholds beyond the seed's.
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
    """The seed's simulator, step by step: a context of n tokens of which the first k are evidence."""
    evidence = sum(1 for position in range(n) if position < k)
    return n > 0 and Fraction(evidence, n) > theta


def run(
    model: "CircuitGPT | None" = None, *, k_max: int = 12, n_max: int = 100, seed: int = 0, samples: int = 200
) -> Result:
    """Compare the formula with the simulator at every cell of k ≤ n; ``model`` is not used.

    The null is the same comparison with the formula's "at equality it fails" turned round: it must disagree
    somewhere, or the comparison could not tell right from wrong. The counter computed in float32 is shown beside it.
    """
    at_least(SEED_K, k_max=k_max)
    at_least(1, n_max=n_max)
    at_least(0, seed=seed, samples=samples)
    protocol = Protocol("minimal_simulator", QUESTION, SEED_FIGURE, {"model": "none: arithmetic", "seed": seed})
    counter = ThresholdCounter(SEED_THETA)
    rng = np.random.default_rng(seed)
    parts = zip(rng.integers(1, 40, samples).tolist(), rng.integers(40, 200, samples).tolist(), strict=True)
    thetas = [Fraction(numerator, denominator) for numerator, denominator in parts]
    length, fewest = counter.critical_length(SEED_K), counter.min_distractors(SEED_K, SEED_N0)
    protocol.predict(
        {
            "summary": f"n* = ⌈k/θ⌉ = {length}, d = {fewest}",
            "critical_length": {k: counter.critical_length(k) for k in range(1, k_max + 1)},
            "min_distractors": fewest,
            "region": "{(k, n): n ≥ ⌈k/θ⌉}",
            "rule": "Reproduced iff formula and simulator agree on every cell, for the seed's θ and for random ones, "
            "and the null that fails one token late does not.",
        }
    )
    protocol.measuring()
    first = {k: first_failure(k, counter.theta, k_max * n_max) for k in range(1, k_max + 1)}
    wrong = _disagreements(counter, k_max, n_max)
    wrong_random = sum(_disagreements(ThresholdCounter(t), k_max, n_max // 2) for t in thetas)
    lenient = sum(
        (Fraction(k, n) >= counter.theta) != simulate(k, n, counter.theta)
        for k in range(1, k_max + 1)
        for n in range(k, n_max + 1)
    )
    rounded = sum(
        (np.float32(k) > np.float32(0.15) * np.float32(n)) != simulate(k, n, counter.theta)
        for k in range(1, k_max + 1)
        for n in range(k, n_max + 1)
    )
    distractors = first[SEED_K] - SEED_N0
    holds = wrong == 0 and wrong_random == 0 and lenient > 0
    return protocol.conclude(
        measured={
            "summary": f"n* = {first[SEED_K]}, d = {distractors}; {wrong + wrong_random} wrong cells",
            "critical_length": first,
            "min_distractors": distractors,
            "wrong_cells": wrong,
            "wrong_cells_random_theta": wrong_random,
            "random_thetas": samples,
        },
        interval={"summary": "exact"},
        null={
            "summary": f"≥ for >: {lenient} wrong cells; float32: {rounded}",
            "at_least_instead_of_above": lenient,
            "float32_arithmetic": int(rounded),
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
    """The shortest context of at least k tokens at which the simulator fails, by trying each."""
    for n in range(k, limit + 1):
        if not simulate(k, n, theta):
            return n
    raise ValueError(f"no failure up to n = {limit} for k = {k}, θ = {theta}; give a larger n_max")


def _disagreements(counter: ThresholdCounter, k_max: int, n_max: int) -> int:
    hole = counter.hole(k_max, n_max)
    return sum(
        bool(hole[k, n]) == simulate(k, n, counter.theta) for k in range(1, k_max + 1) for n in range(k, n_max + 1)
    )
