"""Learning a candidate machine: classes of prefixes that no continuation tried so far distinguishes.

The observation table of D. Angluin (1987), refined by one continuation at a time as in R. Rivest and R. Schapire
(1993), for a teacher who sometimes errs: a class is split only where more than a tolerated share of its members
disagree about a continuation, and the rarest classes, together a tolerated share of the prefixes, are treated as
strays.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..machine import MooreMachine
from .questions import INVALID, NOT_VALID, Questions, Word
from .words import random_words, short_words

__all__ = ["Candidate", "Row", "learn"]

_ALWAYS = 2  # letters; states that only such short words reach are rare among prefixes, but not strays
Row = tuple[int, ...]  # the outputs after a prefix followed by each continuation


@dataclass(frozen=True)
class Candidate:
    """A machine learned from prefixes of up to ``horizon`` letters.

    Attributes:
        horizon: The length of the longest prefixes.
        continuations: What distinguishes the classes; the empty continuation comes first.
        states: The machine's state for each row.
        machine: The machine.
        classes: How many rows cover all but the tolerated share of the prefixes, and all of the shortest ones.
        capped: Whether the search stopped because there were more classes than the limit.
        prefixes: The prefixes that it was learned from.
    """

    horizon: int
    continuations: tuple[Word, ...]
    states: dict[Row, int]
    machine: MooreMachine
    classes: int
    capped: bool
    prefixes: frozenset[Word]

    def rows(self, questions: Questions, words: Sequence[Word]) -> list[Row]:
        return rows_of(questions, words, self.continuations)

    def rho(self, questions: Questions, words: Sequence[Word]) -> np.ndarray:
        """Compute ρ of each word: the machine's state, or -1 for a stray."""
        return np.array([self.states.get(row, -1) for row in self.rows(questions, words)], dtype=np.int64)


def rows_of(questions: Questions, words: Sequence[Word], continuations: Sequence[Word]) -> list[Row]:
    """Ask for the outputs after each word followed by every continuation."""
    asked = questions.ask([word + end for word in words for end in continuations])
    return [tuple(row) for row in asked.reshape(len(words), len(continuations)).tolist()]


def learn(
    questions: Questions, horizon: int, *, prefixes: int, tolerance: float, limit: int, rng: np.random.Generator
) -> Candidate:
    """Learn a candidate from about ``prefixes`` prefixes of up to ``horizon`` letters, with continuations as long.

    ``tolerance`` is the share of errors that is ignored, and ``limit`` the largest number of classes.
    """
    pool = short_words(questions, horizon, prefixes // 2)
    pool = list(dict.fromkeys([*pool, *random_words(questions, horizon, prefixes - len(pool), rng)]))
    continuations: list[Word] = [()]
    while True:
        rows = rows_of(questions, pool, continuations)
        kept = _covering(rows, tolerance, [row for word, row in zip(pool, rows, strict=True) if len(word) <= _ALWAYS])
        kept = _closed(questions, pool, rows, kept, continuations, limit)
        capped = len(kept) > limit
        split = None if capped else _split(questions, pool, rows, kept, continuations, horizon, tolerance)
        if split is None:
            break
        continuations.append(split)
    machine, states = _machine(questions, pool, rows, kept[: limit + 1], continuations)
    return Candidate(horizon, tuple(continuations), states, machine, len(kept), capped, frozenset(pool))


def _covering(rows: Sequence[Row], tolerance: float, always: Sequence[Row]) -> list[Row]:
    """Find the fewest rows that cover all but a share ``tolerance`` of the prefixes, and all rows of ``always``.

    Those of ``always`` come first, and that of the empty word is the first of them.
    """
    counts = Counter(rows)
    kept = list(dict.fromkeys(always))
    covered = sum(counts[row] for row in kept)
    for row, count in counts.most_common():
        if covered >= (1 - tolerance) * len(rows):
            break
        if row not in kept:
            kept.append(row)
            covered += count
    return kept


def _closed(
    questions: Questions,
    pool: Sequence[Word],
    rows: Sequence[Row],
    kept: list[Row],
    continuations: Sequence[Word],
    limit: int,
) -> list[Row]:
    """Add to the kept classes those to which a letter leads most members of one: rare states, which are not strays."""
    known, counts = set(kept), Counter(rows)
    for row in kept:  # kept grows meanwhile
        if len(kept) > limit:
            break
        own = [word for word, its in zip(pool, rows, strict=True) if its == row]
        for letter in range(len(questions.letters)):
            after = Counter(rows_of(questions, [(*word, letter) for word in own], continuations))
            target = after.most_common(1)[0][0]
            if target not in known and counts[target] > 1:
                known.add(target)
                kept.append(target)
    return kept


def _split(
    questions: Questions,
    pool: Sequence[Word],
    rows: Sequence[Row],
    kept: Sequence[Row],
    continuations: Sequence[Word],
    longest: int,
    tolerance: float,
) -> Word | None:
    """Find the continuation about which the members of a class disagree most often.

    It counts only if they disagree more than is tolerated, or if one of the shortest words does.
    """
    most, split = 0, None
    members = {row: [word for word, own in zip(pool, rows, strict=True) if own == row] for row in kept}
    for letter in range(len(questions.letters)):
        known = set(continuations)
        for own in members.values():
            after = np.array(rows_of(questions, [(*word, letter) for word in own], continuations))
            for end, column in zip(continuations, after.T, strict=True):
                continuation = (letter, *end)
                if continuation in known or len(continuation) > longest:
                    continue
                outputs, counts = np.unique(column, return_counts=True)
                differs = column != outputs[counts.argmax()]
                minority = int(differs.sum())
                decisive = any(len(own[i]) <= _ALWAYS for i in np.flatnonzero(differs))
                if minority > most and (decisive or minority > tolerance * len(column)):
                    most, split = minority, continuation
    return split


def _machine(
    questions: Questions,
    pool: Sequence[Word],
    rows: Sequence[Row],
    kept: Sequence[Row],
    continuations: Sequence[Word],
) -> tuple[MooreMachine, dict[Row, int]]:
    """Build the machine: each class leads where most of its members lead.

    What is not valid becomes a state of its own, which no letter leaves.
    """
    invalid = (INVALID,) * len(continuations)
    number = {row: i for i, row in enumerate(kept)}
    table: list[list[int]] = []
    for row in kept:
        own = [word for word, its in zip(pool, rows, strict=True) if its == row]
        targets = []
        for letter in range(len(questions.letters)):
            after = rows_of(questions, [(*word, letter) for word in own], continuations)
            target = Counter(after).most_common(1)[0][0]
            if target == invalid:
                number.setdefault(invalid, len(kept))
            targets.append(number[target] if target in number else number[_nearest(target, kept)])
        table.append(targets)
    outputs = [questions.output(row[0]) for row in kept]
    if invalid in number:
        table.append([number[invalid]] * len(questions.letters))
        outputs.append(NOT_VALID)
    machine = MooreMachine(questions.letters, tuple(map(tuple, table)), tuple(outputs))
    order = _met(machine)
    place = {old: new for new, old in enumerate(order)}
    machine = MooreMachine(
        questions.letters,
        tuple(tuple(place[t] for t in table[old]) for old in order),
        tuple(outputs[old] for old in order),
    )
    return machine, {row: place[old] for row, old in number.items()}


def _met(machine: MooreMachine) -> list[int]:
    """List the states in breadth-first order from the start, followed by those that cannot be reached."""
    order = [machine.start]
    for state in order:
        order += [t for t in dict.fromkeys(machine.transitions[state]) if t not in order]
    return order + [state for state in range(machine.states) if state not in order]


def _nearest(row: Row, kept: Sequence[Row]) -> Row:
    """Find the class with the most equal answers, because a stray has to lead somewhere."""
    return max(kept, key=lambda other: sum(a == b for a, b in zip(row, other, strict=True)))
