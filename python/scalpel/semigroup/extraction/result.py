"""What an extraction gives: a machine with its bounds, or a refusal with its reasons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ..._json import plain
from ..machine import MooreMachine
from ..transformation import TransformationSemigroup
from .interchange import Interchange
from .trials import Rate

__all__ = ["Extraction", "Growth", "Verdict", "judge"]

Verdict = Literal["finite", "counter", "refused"]


@dataclass(frozen=True)
class Growth:
    """Classes found over ``prefixes`` prefixes of up to ``horizon`` letters; ``capped``: at least so many, the search
    stopped.
    """

    horizon: int
    classes: int
    capped: bool
    prefixes: int


@dataclass(frozen=True)
class Extraction:
    """Whether a model acts on words like a finite machine, and the figures that say so.

    ``verdict``: "finite" (up to ``horizon`` letters and as many again), "counter" (more classes at each doubling), or
    "refused"; ``reasons``: what speaks against "finite", empty where nothing does. ``machine``: None unless finite.
    ``candidate``: the machine that was tried, on words of up to four times ``candidate_horizon`` letters where the
    classes grow. ``conflict``, ``fidelity``, ``congruence``: see :mod:`.trials`; ``interchange``: see
    :mod:`.interchange`. ``pumped``: (wrong, asked) of words that repeat a piece. ``counterexamples``: words on which
    model and candidate differ, shortest first. ``conflicts``: (u, v, letter), ``incongruent``: (u, v, continuation).
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    machine: MooreMachine | None
    candidate: MooreMachine | None
    candidate_horizon: int
    horizon: int
    growth: tuple[Growth, ...]
    continuations: tuple[str, ...]
    conflict: Rate | None = None
    fidelity: Rate | None = None
    congruence: Rate | None = None
    interchange: Interchange | None = None
    pumped: tuple[int, int] = (0, 0)
    counterexamples: tuple[dict[str, Any], ...] = ()
    conflicts: tuple[dict[str, Any], ...] = ()
    incongruent: tuple[dict[str, Any], ...] = ()
    nulls: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def semigroup(self, letters: Sequence[str] | None = None) -> TransformationSemigroup:
        """The machine's transformation semigroup. ValueError where none was found; ``candidate`` is what was tried."""
        if self.machine is None:
            raise ValueError(f"no machine was found ({self.verdict}): {'; '.join(self.reasons)}")
        return self.machine.semigroup(letters)

    def summary(self) -> str:
        """One line: the verdict and the figures that it rests on."""
        classes = ", ".join(f"{'≥ ' if g.capped else ''}{g.classes} at {g.horizon}" for g in self.growth)
        parts = [f"classes {classes}"]
        if self.conflict is not None:
            parts.append(f"conflict {self.conflict.value:.1%}, below {self.conflict.worst:.1%} in every cell")
        if self.fidelity is not None:
            parts.append(f"fidelity {self.fidelity.value:.1%}")
        if self.congruence is not None and any(trials for _, trials in self.congruence.cells.values()):
            parts.append(f"continuations that differ {self.congruence.value:.1%}")
        if self.machine is not None and len(set(map(str, self.machine.outputs)) - {"not valid"}) == 1:
            parts.append("one answer whatever the word, so nothing was put to the test")
        return f"{self.verdict}: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "machine": None if self.machine is None else self.machine.to_dict(),
            "candidate": None if self.candidate is None else self.candidate.to_dict(),
            "candidate_horizon": self.candidate_horizon,
            "horizon": self.horizon,
            "growth": [vars(g) for g in self.growth],
            "continuations": list(self.continuations),
            "conflict": None if self.conflict is None else self.conflict.to_dict(),
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "congruence": None if self.congruence is None else self.congruence.to_dict(),
            "interchange": None if self.interchange is None else self.interchange.to_dict(),
            "pumped": {"wrong": self.pumped[0], "asked": self.pumped[1]},
            "counterexamples": list(self.counterexamples),
            "conflicts": list(self.conflicts),
            "incongruent": list(self.incongruent),
            "nulls": self.nulls,
            "words_asked": self.asked,
            "seconds": self.seconds,
            "options": self.options,
        }

    def to_json(self, indent: int | None = None) -> str:
        """The extraction as JSON."""
        return json.dumps(plain(self.to_dict()), indent=indent, ensure_ascii=False, allow_nan=False)


def judge(
    growth: Sequence[Growth],
    most_conflict: float,
    conflict: Rate | None,
    fidelity: Rate | None,
    congruence: Rate | None,
    swaps: Interchange | None,
    pumped: tuple[int, int],
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and what speaks against "finite".

    Finite iff the number of classes is the same at the three horizons, the bounds hold in every cell (conflict and
    incongruence at most ``most_conflict``, fidelity at least 1 - ``most_conflict``), and the shares of swaps and of
    words that repeat a piece do, as far as there are any. Counter iff each doubling finds more classes, all of them
    (none of the first two counts is capped), and not nearly as many as there are prefixes, which noise does. Refused
    otherwise.
    """
    counts = [g.classes for g in growth]
    reasons = []
    if len(set(counts)) > 1 or growth[-1].capped:
        found = ", ".join(f"{g.classes}{' or more' if g.capped else ''} at {g.horizon}" for g in growth)
        hint = ""
        if counts[1] == counts[2] and not growth[2].capped:
            hint = f"; it does from {growth[1].horizon} on: give horizon={growth[1].horizon}"
        reasons.append(f"the number of classes doesn't level off: {found} letters{hint}")
    for rate, what in ((conflict, "conflict"), (congruence, "the share of continuations that differ")):
        if rate is not None and rate.worst > most_conflict:
            reasons.append(f"{what} may be {rate.worst:.1%} in a cell; {most_conflict:.1%} is allowed{_power(rate)}")
    if fidelity is not None and fidelity.least < 1 - most_conflict:
        reasons.append(f"fidelity may be {fidelity.least:.1%} in a state; {1 - most_conflict:.1%} is asked")
    if swaps is not None:
        for hits, trials, what in (
            (swaps.same, swaps.same_trials, "within a class left the output"),
            (swaps.other, swaps.other_trials, "between classes gave the machine's output"),
        ):
            if trials and hits < (1 - most_conflict) * trials:
                reasons.append(f"only {hits} of {trials} swaps {what}")
    wrong, asked = pumped
    if asked and wrong > most_conflict * asked:
        reasons.append(f"{wrong} of {asked} words that repeat a piece are answered otherwise than by the machine")
    if not reasons:
        return "finite", ()
    growing = all(a.classes < b.classes for a, b in pairwise(growth)) and not any(g.capped for g in growth[:2])
    few = all(2 * g.classes <= g.prefixes for g in growth)
    return ("counter" if growing and few else "refused"), tuple(reasons)


def _power(rate: Rate) -> str:
    """What to say where a bound is high although nothing was found."""
    return "; nothing speaks for that, so give more pairs" if rate.shown == 0 else ""
