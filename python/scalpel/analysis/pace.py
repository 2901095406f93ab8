"""How far an analysis has come, and when it is asked to stop."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

__all__ = ["Clock", "Plan", "Progress", "Stopped", "seconds_of"]

Progress = Callable[[str, float], None]

_UNITS = {"s": 1, "m": 60, "h": 3600}


class Stopped(Exception):
    """The time that an analysis was given is over."""


class Clock:
    """The time that one run of an analysis is given.

    A run is never so short that it achieves nothing: time is not over before the run has finished a piece of the work.

    Args:
        seconds: The time; None for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._begun = time.monotonic()
        self._achieved = False

    def achieved(self) -> None:
        """Note that this run has finished a piece of the work."""
        self._achieved = True

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.seconds is not None and self._achieved and time.monotonic() - self._begun >= self.seconds

    def check(self) -> None:
        """Raise Stopped where it is time to stop."""
        if self.over:
            raise Stopped


class Plan:
    """The pieces of an analysis in the order in which they are done, each of about as much work.

    Args:
        pieces: Their names.
        report: Called as ``report(what, done)``, with ``done`` from 0 to 1, which never falls.
        clock: The time that is given, which is checked at each report.
    """

    def __init__(self, pieces: Sequence[str], report: Progress, clock: Clock) -> None:
        self._places = {piece: i for i, piece in enumerate(pieces)}
        self._report, self._clock = report, clock
        self._done = 0.0

    def of(self, piece: str, words: str, stops: bool = True) -> Progress:
        """Return what reports progress within a piece and, where it ``stops``, raises Stopped when time is over.

        ``words`` is what the report calls the piece.
        """
        place, count = self._places[piece], len(self._places)

        def step(what: str, done: float) -> None:
            if stops:
                self._clock.check()
            self._done = max(self._done, (place + min(1.0, max(0.0, done))) / count)
            self._report(f"{words}: {what}" if what else words, self._done)

        return step


def seconds_of(text: str) -> float:
    """Read a time such as "10m", "90s" or "1h30m"; a bare number is seconds.

    Args:
        text: The time.

    Returns:
        Seconds.

    Raises:
        ValueError: If it is no time above zero.

    Example:
        >>> from scalpel.analysis.pace import seconds_of
        >>> seconds_of("1h30m"), seconds_of("90")
        (5400.0, 90.0)
    """
    plain = text.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", plain)
    if not parts or "".join(number + unit for number, unit in parts) != plain or (len(parts) > 1 and not parts[-1][1]):
        raise ValueError(f"{text!r} is no time: give it as 10m, 90s or 1h30m")
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time above zero: give it as 10m, 90s or 1h30m")
    return seconds
