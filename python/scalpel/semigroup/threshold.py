"""The seed's machine: count evidence, divide by the context, compare with a threshold. Exact arithmetic.

"Hole" is the founding document's word for {(k, n): n ≥ ⌈k/θ⌉}. Those are inputs at which the counter answers
"no"; it is a failure region of inputs, not a set of states that no word reaches.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np


@dataclass(frozen=True, init=False)
class ThresholdCounter:
    """Decides 1[k / (n + sink) > theta] for evidence k in a context of n tokens.

    ``theta`` and ``sink`` are a Fraction, a str ("3/20", "0.15"), an int, or a float, which is read as its shortest
    decimal, so that 0.15 is 3/20 and not the binary number next to it. theta > 0; ``sink`` is the weight, in
    tokens, of what takes attention without giving evidence, and may be negative where a fit asks for it.
    """

    theta: Fraction
    sink: Fraction

    def __init__(self, theta: Fraction | str | int | float, sink: Fraction | str | int | float = 0) -> None:
        object.__setattr__(self, "theta", _exact("theta", theta))
        object.__setattr__(self, "sink", _exact("sink", sink))
        if self.theta <= 0:
            raise ValueError(f"theta is {theta!r}; it must be above 0, or every context passes")

    def decide(self, k: int, n: int) -> bool:
        """Whether k pieces of evidence in n tokens pass: k > theta · (n + sink), strictly."""
        _count("k", k)
        _count("n", n)
        return k > self.theta * (n + self.sink)

    def critical_length(self, k: int) -> int:
        """The fewest tokens n ≥ 0 at which ``decide(k, n)`` is False: ⌈k/θ − sink⌉, and no less than 0."""
        _count("k", k)
        return max(0, -floor(-(k / self.theta - self.sink)))

    def min_distractors(self, k: int, n0: int) -> int:
        """The fewest tokens that, added to a context of ``n0``, make the answer fail; 0 where it fails already."""
        _count("n0", n0)
        return max(0, self.critical_length(k) - n0)

    def hole(self, k_max: int, n_max: int) -> np.ndarray:
        """The failure region: bool (k_max + 1, n_max + 1), True at [k, n] where ``decide(k, n)`` is False."""
        _count("k_max", k_max)
        _count("n_max", n_max)
        lengths = np.array([self.critical_length(k) for k in range(k_max + 1)])
        return np.arange(n_max + 1)[None, :] >= lengths[:, None]


def _exact(name: str, value: Fraction | str | int | float) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, Fraction | str | int | float):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a Fraction, str, int or float")
    try:
        return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name} is {value!r}, which is no number") from error


def _count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {type(value).__name__}; it must be an int")
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more")
