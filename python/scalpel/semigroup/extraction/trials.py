"""Trials of a candidate on words that it was not learned from: conflict, fidelity and congruence."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .bounds import clopper_pearson
from .learning import Candidate
from .questions import NOT_VALID, Questions, Word
from .words import all_words_to, random_words, words_to

__all__ = ["Rate", "Sample", "by_state", "conflicts", "congruence", "continuation", "fidelity"]

_ROUNDS = 8


@dataclass(frozen=True)
class Rate:
    """A share with its bounds, over cells of equal weight.

    Cells in ``census`` were not sampled: all words that exist were tried, so their share is exact. Other cells without
    trials count as unknown, from 0 to 1. Bounds hold for all cells together with 95 % (Clopper-Pearson, Bonferroni).

    Attributes:
        cells: The numbers of hits and of trials in each cell.
        census: The cells that were not sampled.
    """

    cells: Mapping[str, tuple[int, int]]
    census: frozenset[str] = frozenset()

    def _bounds(self) -> list[tuple[float, float]]:
        sampled = max(1, len(self.cells) - len(self.census))
        return [
            (h / max(n, 1), h / max(n, 1)) if name in self.census else clopper_pearson(h, n, 0.05 / sampled)
            for name, (h, n) in self.cells.items()
        ]

    @property
    def value(self) -> float:
        """The mean of the cells' shares."""
        shares = [hits / trials for hits, trials in self.cells.values() if trials]
        return float(np.mean(shares)) if shares else float("nan")

    @property
    def low(self) -> float:
        """The mean of the cells' lower bounds."""
        return float(np.mean([low for low, _ in self._bounds()])) if self.cells else 0.0

    @property
    def high(self) -> float:
        """The mean of the cells' upper bounds."""
        return float(np.mean([high for _, high in self._bounds()])) if self.cells else 1.0

    @property
    def worst(self) -> float:
        """The highest upper bound of a cell."""
        return max((high for _, high in self._bounds()), default=1.0)

    @property
    def shown(self) -> float:
        """The highest lower bound of a cell, which the trials establish for some cell."""
        return max((low for low, _ in self._bounds()), default=0.0)

    @property
    def least(self) -> float:
        """The lowest lower bound of a cell."""
        return min((low for low, _ in self._bounds()), default=0.0)

    def to_dict(self) -> dict[str, object]:
        cells = {
            name: {"hits": h, "trials": n, "low": low, "high": high}
            for (name, (h, n)), (low, high) in zip(self.cells.items(), self._bounds(), strict=True)
        }
        return {"value": self.value, "low": self.low, "high": self.high, "worst_cell": self.worst, "cells": cells}


@dataclass(frozen=True)
class Sample:
    """Different prefixes for each state ρ(prefix); for the states in ``census`` they are all that exist."""

    words: dict[int, list[Word]]
    census: frozenset[int] = frozenset()


def by_state(
    questions: Questions, candidate: Candidate, per_state: int, horizon: int, rng: np.random.Generator
) -> Sample:
    """Collect up to ``per_state`` new prefixes of up to ``horizon`` letters for each state.

    New means that the candidate was not learned from them.

    Words that the machine leads to a state are tried: half of them are drawn at random, and half are drawn for that
    state. If the machine leads no more than ``per_state`` words to a state, all of them are taken, including
    those learned from. A state for which no prefix was found has an empty list.
    """
    prefixes: dict[int, list[Word]] = {state: [] for state in _asked(candidate)}
    few, census = _few(questions, candidate, per_state, horizon, rng)
    seen, asked_few = set(candidate.prefixes), False
    for _ in range(_ROUNDS):
        wanting = {
            s: per_state - len(words) for s, words in prefixes.items() if len(words) < per_state and s not in few
        }
        chosen = _led_to(questions, candidate, wanting, horizon, seen, rng) if wanting else []
        if not asked_few:
            chosen += [word for words in few.values() for word in words]
            asked_few = True
        if not chosen:
            break
        for word, state in zip(chosen, candidate.rho(questions, chosen).tolist(), strict=True):
            if state in prefixes and (len(prefixes[state]) < per_state or state in census):
                prefixes[state].append(word)
    return Sample(prefixes, census)


def _few(
    questions: Questions, candidate: Candidate, per_state: int, horizon: int, rng: np.random.Generator
) -> tuple[dict[int, list[Word]], frozenset[int]]:
    """Collect the words of states that few words lead to.

    If at most ``per_state`` words lead to a state, all of them are taken, which is a census. If at most eight times
    as many do, ``per_state`` new ones of them are taken, which drawing at random would find slowly.
    """
    few, census = {}, []
    for state in _asked(candidate):
        words = all_words_to(candidate.machine, state, horizon, 8 * per_state)
        if words is None:
            continue
        words = [word for word in words if questions.is_valid(word)]
        if len(words) <= per_state:
            census.append(state)
        else:
            words = [words[i] for i in rng.permutation(len(words)) if words[i] not in candidate.prefixes][:per_state]
        few[state] = words
    return few, frozenset(census)


def _led_to(
    questions: Questions,
    candidate: Candidate,
    wanting: Mapping[int, int],
    horizon: int,
    seen: set[Word],
    rng: np.random.Generator,
) -> list[Word]:
    """Find valid words, not yet ``seen``, that the machine leads to each state, up to the number wanted there."""
    left = dict(wanting)
    chosen = []
    drawn = random_words(questions, horizon, sum(wanting.values()), rng)
    for state, count in wanting.items():
        drawn += words_to(candidate.machine, state, horizon, count, rng)
    for i in rng.permutation(len(drawn)):
        word = drawn[i]
        state = candidate.machine.state(word)
        if left.get(state, 0) > 0 and word not in seen and questions.is_valid(word):
            left[state] -= 1
            seen.add(word)
            chosen.append(word)
    return chosen


def _asked(candidate: Candidate) -> list[int]:
    """List the states that prefixes can have: all but the state of what is not valid."""
    machine = candidate.machine
    return [state for state in candidate.states.values() if machine.outputs[state] is not NOT_VALID]


def conflicts(questions: Questions, candidate: Candidate, sample: Sample) -> tuple[Rate, list[tuple[Word, Word, int]]]:
    """Measure ε = P(ρ(ua) ≠ ρ(va) | ρ(u) = ρ(v), u ≠ v) for each state and letter, over disjoint pairs.

    In a census it is the share of prefixes whose successor is not the most frequent one.

    Returns:
        The rate, and each (u, v, a) in conflict.
    """
    cells: dict[str, tuple[int, int]] = {}
    conflicting = []
    for state, words in sample.words.items():
        for letter, name in enumerate(questions.letters):
            after = candidate.rows(questions, [(*word, letter) for word in words])
            if state in sample.census:
                most = Counter(after).most_common(1)[0][0] if after else ()
                typical = words[after.index(most)] if after else ()
                differ = [(words[i], typical) for i, row in enumerate(after) if row != most]
                trials = len(words)
            else:
                pairs = range(0, len(words) - 1, 2)
                differ = [(words[i], words[i + 1]) for i in pairs if after[i] != after[i + 1]]
                trials = len(pairs)
            cells[f"{state} {name}"] = (len(differ), trials)
            conflicting += [(u, v, letter) for u, v in differ]
    census = frozenset(f"{state} {name}" for state in sample.census for name in questions.letters)
    return Rate(cells, census), conflicting


def fidelity(
    questions: Questions, candidate: Candidate, per_state: int, horizon: int, rng: np.random.Generator
) -> tuple[Rate, list[Word]]:
    """Measure how often the model's output is the machine's, for each state of the machine.

    Returns:
        The rate, and the words on which they differ.
    """
    few, census = _few(questions, candidate, per_state, horizon, rng)
    groups: dict[int, list[Word]] = {state: list(few.get(state, [])) for state in _asked(candidate)}
    seen = set(candidate.prefixes)
    for _ in range(_ROUNDS):
        wanting = {s: per_state - len(words) for s, words in groups.items() if len(words) < per_state and s not in few}
        for word in _led_to(questions, candidate, wanting, horizon, seen, rng) if wanting else ():
            groups[candidate.machine.state(word)].append(word)
    cells: dict[str, tuple[int, int]] = {}
    wrong = []
    for state, words in groups.items():
        said = [questions.output(number) for number in questions.ask(words)]
        right = [output == candidate.machine.outputs[state] for output in said]
        cells[str(state)] = (sum(right), len(words))
        wrong += [word for word, ok in zip(words, right, strict=True) if not ok]
    return Rate(cells, frozenset(map(str, census))), wrong


def congruence(
    questions: Questions, candidate: Candidate, sample: Sample, pairs: int, horizon: int, rng: np.random.Generator
) -> tuple[Rate, list[tuple[Word, Word, Word]]]:
    """Measure how often ρ(u) = ρ(v), but the outputs after u·w and v·w differ, for each state.

    The continuation w is random, has 1 to ``horizon`` letters and is valid after both. Pairs are disjoint. In a census,
    where prefixes are few, ``pairs`` pairs are drawn, each with its own w. A state with a single prefix has no pairs,
    and a state that nothing valid follows has no continuations, so these cannot fail.

    Returns:
        The rate, and each (u, v, w) that differs.
    """
    cells: dict[str, tuple[int, int]] = {}
    differing = []
    exempt = {str(state) for state in sample.census if len(sample.words[state]) < 2}
    for state, words in sample.words.items():
        couples = list(zip(words[::2], words[1::2], strict=False))
        if state in sample.census and len(words) > 1:
            drawn = (rng.choice(len(words), size=2, replace=False) for _ in range(pairs))
            couples = [(words[i], words[j]) for i, j in drawn]
        tried = ((u, v, continuation(questions, u, v, horizon, rng)) for u, v in couples)
        triples = [(u, v, w) for u, v, w in tried if w]
        if couples and not triples:
            exempt.add(str(state))
        after_u = questions.ask([u + w for u, _, w in triples])
        after_v = questions.ask([v + w for _, v, w in triples])
        cells[str(state)] = (int((after_u != after_v).sum()), len(triples))
        differing += [triple for triple, a, b in zip(triples, after_u, after_v, strict=True) if a != b]
    return Rate(cells, frozenset(exempt)), differing


def continuation(questions: Questions, u: Word, v: Word, horizon: int, rng: np.random.Generator) -> Word:
    """Draw random letters that keep both words valid; the empty word if there are none."""
    letters = len(questions.letters)
    weights = rng.dirichlet(np.ones(letters)) + 1e-3
    w: Word = ()
    for _ in range(int(rng.integers(1, horizon + 1))):
        both = [a for a in range(letters) if questions.is_valid((*u, *w, a)) and questions.is_valid((*v, *w, a))]
        if not both:
            break
        w = (*w, both[int(rng.choice(len(both), p=weights[both] / weights[both].sum()))])
    return w
