"""The result of an extraction: a machine with its bounds, or a refusal with its reasons."""

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
    """The number of classes of prefixes up to one length.

    Attributes:
        horizon: The length, in letters.
        classes: The number of classes.
        capped: Whether the search stopped because there were too many, so that there are at least so many classes.
        prefixes: The number of prefixes.
    """

    horizon: int
    classes: int
    capped: bool
    prefixes: int


@dataclass(frozen=True)
class Extraction:
    """Whether a model acts on words like a finite machine, and the measurements that show it.

    Attributes:
        verdict: "finite" (up to ``horizon`` letters and as many again), "counter" (more classes at each doubling of the
            length), or "refused".
        reasons: What contradicts "finite"; empty if nothing does.
        machine: The machine, or None unless the verdict is "finite".
        candidate: The machine that was tested; None if there were too many classes.
        candidate_horizon: The length of the prefixes that the candidate was learned from.
        horizon: The length of the longest prefixes.
        growth: The number of classes at each of the three lengths.
        continuations: The continuations that distinguish the classes.
        conflict: How often two prefixes of one class lead to different classes; see :mod:`.trials`.
        fidelity: How often the model's output is the machine's; see :mod:`.trials`.
        congruence: How often continuations of two prefixes of one class differ; see :mod:`.trials`.
        interchange: The results of swapping caches; see :mod:`.interchange`.
        pumped: The numbers of wrong answers and of words, for words that repeat a piece.
        counterexamples: Words on which model and candidate differ, the shortest first.
        conflicts: Conflicts (u, v, letter), the shortest first.
        incongruent: Triples (u, v, continuation) that differ, the shortest first.
        nulls: What the same measures give for the nulls.
        asked: The number of words that the model was asked about.
        seconds: The time taken.
        options: The options of the extraction.

    Example:
        >>> def parity(words):
        ...     return [word.count("a") % 2 for word in words]
        >>> extraction = scalpel.semigroup.extract(parity, ["a", "b"], horizon=2, prefixes=32, nulls=False)
        >>> extraction.semigroup(["a"]).size
        2
        >>> extraction.summary()
        'finite: classes 2 at 2, 2 at 4, 2 at 8; conflict 0.0%, below ...% in every cell; fidelity 100.0%; ...'
        >>> extraction.to_dict()["machine"]["transitions"]
        [[1, 0], [0, 1]]
        >>> extraction.to_json()[:22]
        '{"verdict": "finite", '
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
        """Build the machine's transformation semigroup.

        Args:
            letters: The names of some letters; None means all.

        Returns:
            The semigroup that their actions on the states generate.

        Raises:
            ValueError: If no machine was found; ``candidate.semigroup()`` is that of the machine that was tested.
        """
        if self.machine is None:
            raise ValueError(f"no machine was found ({self.verdict}): {'; '.join(self.reasons)}")
        return self.machine.semigroup(letters)

    def summary(self) -> str:
        """Summarize the verdict and the measurements that it rests on.

        Returns:
            One line of text.
        """
        classes = ", ".join(f"{'≥ ' if g.capped else ''}{g.classes} at {g.horizon}" for g in self.growth)
        parts = [f"classes {classes}"]
        if self.conflict is not None:
            parts.append(f"conflict {self.conflict.value:.1%}, below {self.conflict.worst:.1%} in every cell")
        if self.fidelity is not None:
            parts.append(f"fidelity {self.fidelity.value:.1%}")
        if self.congruence is not None and any(trials for _, trials in self.congruence.cells.values()):
            parts.append(f"continuations that differ {self.congruence.value:.1%}")
        if self.machine is not None and len(set(map(str, self.machine.outputs)) - {"not valid"}) == 1:
            parts.append("one answer for every word, so nothing was tested")
        return f"{self.verdict}: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data.

        Returns:
            A dict of what JSON can hold.
        """
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
        """Return the extraction as JSON.

        Args:
            indent: The indentation; None puts everything on one line.

        Returns:
            The text.
        """
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
    """Decide the verdict, and collect what contradicts "finite".

    "finite": the number of classes is the same at the three lengths, the bounds hold in every cell (conflict and
    incongruence at most ``most_conflict``, fidelity at least 1 - ``most_conflict``), and so do the shares of swaps and
    of words that repeat a piece, if there are any. "counter": each doubling of the length finds more classes, none of
    the first two counts is capped, and there are far fewer classes than prefixes, because noise gives nearly as many.
    "refused": otherwise.
    """
    counts = [g.classes for g in growth]
    reasons = []
    if len(set(counts)) > 1 or growth[-1].capped:
        counted = ", ".join(f"{g.classes}{' or more' if g.capped else ''} at {g.horizon}" for g in growth)
        hint = ""
        if counts[1] == counts[2] and not growth[2].capped:
            hint = f"; it does from {growth[1].horizon} on: use horizon={growth[1].horizon}"
        reasons.append(f"the number of classes does not level off: {counted} letters{hint}")
    for rate, what in ((conflict, "conflict"), (congruence, "the share of continuations that differ")):
        if rate is not None and rate.worst > most_conflict:
            reasons.append(f"{what} may be {rate.worst:.1%} in a cell; {most_conflict:.1%} is allowed{_power(rate)}")
    if fidelity is not None and fidelity.least < 1 - most_conflict:
        reasons.append(f"fidelity may be {fidelity.least:.1%} in a state; {1 - most_conflict:.1%} is required")
    if swaps is not None:
        for hits, trials, what in (
            (swaps.same, swaps.same_trials, "within a class left the output"),
            (swaps.other, swaps.other_trials, "between classes gave the machine's output"),
        ):
            if trials and hits < (1 - most_conflict) * trials:
                reasons.append(f"only {hits} of {trials} swaps {what}")
    wrong, asked = pumped
    if asked and wrong > most_conflict * asked:
        reasons.append(f"{wrong} of {asked} words that repeat a piece are answered differently by the machine")
    if not reasons:
        return "finite", ()
    growing = all(a.classes < b.classes for a, b in pairwise(growth)) and not any(g.capped for g in growth[:2])
    few = all(2 * g.classes <= g.prefixes for g in growth)
    return ("counter" if growing and few else "refused"), tuple(reasons)


def _power(rate: Rate) -> str:
    """Point out that a bound is high although no trial speaks for it."""
    return "; no trial shows that, so use more pairs" if rate.shown == 0 else ""
