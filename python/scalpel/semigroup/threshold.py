"""The seed's machine, in exact arithmetic: count evidence, divide by the context's length, compare with a threshold.

"Hole" is the seed's word for {(k, n): n ≥ ⌈k/θ⌉}, the inputs for which the counter answers "no". It is a failure region
of inputs, not a set of states that no word reaches.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np


@dataclass(frozen=True, init=False)
class ThresholdCounter:
    """Decide 1[k / (n + sink) > theta] for k pieces of evidence in a context of n tokens.

    A float is read as its shortest decimal, so 0.15 is 3/20 and not the binary number next to it.

    Args:
        theta: The threshold, above 0: a Fraction, a string such as "3/20" or "0.15", an int or a float.
        sink: The weight, in tokens, of what receives attention without giving evidence. It may be negative, because a
            fit may require that.

    Attributes:
        theta: The threshold, as a Fraction.
        sink: The weight of the sink, as a Fraction.

    Raises:
        TypeError: If theta or sink is not a number or a string.
        ValueError: If theta or sink cannot be read as a number, or theta is not above 0.

    Example:
        >>> law = scalpel.semigroup.ThresholdCounter("0.15")
        >>> law.theta
        Fraction(3, 20)
        >>> law.decide(k=2, n=13), law.decide(k=2, n=14)
        (True, False)
    """

    theta: Fraction
    sink: Fraction

    def __init__(self, theta: Fraction | str | int | float, sink: Fraction | str | int | float = 0) -> None:
        object.__setattr__(self, "theta", _exact("theta", theta))
        object.__setattr__(self, "sink", _exact("sink", sink))
        if self.theta <= 0:
            raise ValueError(f"theta is {theta!r}; it must be above 0, or every context passes")

    def decide(self, k: int, n: int) -> bool:
        """Decide whether the evidence suffices: k > theta · (n + sink), strictly.

        Args:
            k: The number of pieces of evidence.
            n: The length of the context, in tokens.

        Returns:
            True if the evidence suffices.

        Example:
            >>> scalpel.semigroup.ThresholdCounter("1/2").decide(k=1, n=2)  # equality fails
            False
        """
        _count("k", k)
        _count("n", n)
        return k > self.theta * (n + self.sink)

    def critical_length(self, k: int) -> int:
        """Compute the length of context from which k pieces of evidence no longer suffice.

        Args:
            k: The number of pieces of evidence.

        Returns:
            The smallest n ≥ 0 for which ``decide(k, n)`` is False: max(0, ⌈k/θ − sink⌉).

        Example:
            >>> scalpel.semigroup.ThresholdCounter("0.15").critical_length(2)
            14
        """
        _count("k", k)
        return max(0, -floor(-(k / self.theta - self.sink)))

    def min_distractors(self, k: int, n0: int) -> int:
        """Compute how many tokens have to be added to a context before the answer fails.

        Args:
            k: The number of pieces of evidence.
            n0: The length of the context, in tokens.

        Returns:
            The smallest number of added tokens; 0 if the answer fails already.

        Example:
            >>> scalpel.semigroup.ThresholdCounter("0.15").min_distractors(k=2, n0=2)
            12
        """
        _count("n0", n0)
        return max(0, self.critical_length(k) - n0)

    def hole(self, k_max: int, n_max: int) -> np.ndarray:
        """Map the failure region over evidence and context length.

        Args:
            k_max: The largest amount of evidence.
            n_max: The largest length of context.

        Returns:
            A bool array (k_max + 1, n_max + 1), True at [k, n] where ``decide(k, n)`` is False.

        Example:
            >>> scalpel.semigroup.ThresholdCounter("1/2").hole(k_max=1, n_max=3)
            array([[ True,  True,  True,  True],
                   [False, False,  True,  True]])
        """
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
        raise ValueError(f"{name} is {value!r}, which is not a number") from error


def _count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {type(value).__name__}; it must be an int")
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more")
