"""Trials of a candidate on words that it wasn't learned from: conflict, fidelity, congruence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .bounds import clopper_pearson
from .learning import Candidate
from .questions import Questions, Word
from .words import random_words, words_to

__all__ = ["Rate", "by_state", "conflicts", "congruence", "fidelity"]

_ROUNDS = 8


@dataclass(frozen=True)
class Rate:
    """A share with its bounds, in cells that are weighted alike.

    ``cells``: name → (hits, trials). ``value``: the mean of the cells' shares. ``low``, ``high``: the means of bounds
    that hold for all cells at once with 95 % (Clopper-Pearson, Bonferroni); ``worst``: the highest bound of a cell.
    Cells without trials count as unknown, from 0 to 1.
    """

    cells: Mapping[str, tuple[int, int]]

    def _bounds(self) -> list[tuple[float, float]]:
        return [clopper_pearson(h, n, 0.05 / len(self.cells)) for h, n in self.cells.values()]

    @property
    def value(self) -> float:
        shares = [hits / trials for hits, trials in self.cells.values() if trials]
        return float(np.mean(shares)) if shares else float("nan")

    @property
    def low(self) -> float:
        return float(np.mean([low for low, _ in self._bounds()])) if self.cells else 0.0

    @property
    def high(self) -> float:
        return float(np.mean([high for _, high in self._bounds()])) if self.cells else 1.0

    @property
    def worst(self) -> float:
        return max((high for _, high in self._bounds()), default=1.0)

    @property
    def least(self) -> float:
        """The lowest bound of a cell."""
        return min((low for low, _ in self._bounds()), default=0.0)

    def to_dict(self) -> dict[str, object]:
        cells = {
            name: {"hits": h, "trials": n, "low": low, "high": high}
            for (name, (h, n)), (low, high) in zip(self.cells.items(), self._bounds(), strict=True)
        }
        return {"value": self.value, "low": self.low, "high": self.high, "worst_cell": self.worst, "cells": cells}


def by_state(
    questions: Questions, candidate: Candidate, each: int, horizon: int, rng: np.random.Generator
) -> dict[int, list[Word]]:
    """State → up to ``each`` distinct new prefixes of up to ``horizon`` letters with ρ(prefix) that state.

    Words that the machine leads there are tried, half of them drawn at random and half aimed. States that no prefix was
    found for are there with an empty list.
    """
    found: dict[int, list[Word]] = {state: [] for state in _asked(candidate)}
    seen = set(candidate.prefixes)
    for _ in range(_ROUNDS):
        wanting = {state: each - len(words) for state, words in found.items() if len(words) < each}
        if not wanting:
            break
        chosen = _led_to(questions, candidate, wanting, horizon, seen, rng)
        for word, state in zip(chosen, candidate.rho(questions, chosen).tolist(), strict=True):
            if state in found and len(found[state]) < each:
                found[state].append(word)
    return found


def _led_to(
    questions: Questions,
    candidate: Candidate,
    wanting: Mapping[int, int],
    horizon: int,
    seen: set[Word],
    rng: np.random.Generator,
) -> list[Word]:
    """Valid words, not ``seen``, that the machine leads to each state: up to as many as are wanted there."""
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
    """The states that prefixes can have: all but that of what isn't valid."""
    machine = candidate.machine
    return [state for state in candidate.states.values() if machine.outputs[state] is not None]


def conflicts(
    questions: Questions, candidate: Candidate, prefixes: Mapping[int, Sequence[Word]]
) -> tuple[Rate, list[tuple[Word, Word, int]]]:
    """ε = P(ρ(ua) ≠ ρ(va) | ρ(u) = ρ(v), u ≠ v) in cells (state, letter), over disjoint pairs; and each (u, v, a) in
    conflict.
    """
    cells: dict[str, tuple[int, int]] = {}
    found = []
    for state, words in prefixes.items():
        for letter, name in enumerate(questions.letters):
            after = candidate.rows(questions, [(*word, letter) for word in words])
            pairs = range(0, len(words) - 1, 2)
            differ = [i for i in pairs if after[i] != after[i + 1]]
            cells[f"{state} {name}"] = (len(differ), len(pairs))
            found += [(words[i], words[i + 1], letter) for i in differ]
    return Rate(cells), found


def fidelity(
    questions: Questions, candidate: Candidate, each: int, horizon: int, rng: np.random.Generator
) -> tuple[Rate, list[Word]]:
    """How often the model says what the machine says, by the state that the machine is in; and where it doesn't."""
    groups: dict[int, list[Word]] = {state: [] for state in _asked(candidate)}
    seen = set(candidate.prefixes)
    for _ in range(_ROUNDS):
        wanting = {state: each - len(words) for state, words in groups.items() if len(words) < each}
        for word in _led_to(questions, candidate, wanting, horizon, seen, rng) if wanting else ():
            groups[candidate.machine.state(word)].append(word)
    cells: dict[str, tuple[int, int]] = {}
    wrong = []
    for state, words in groups.items():
        said = [questions.output(number) for number in questions.ask(words)]
        right = [output == candidate.machine.outputs[state] for output in said]
        cells[str(state)] = (sum(right), len(words))
        wrong += [word for word, ok in zip(words, right, strict=True) if not ok]
    return Rate(cells), wrong


def congruence(
    questions: Questions,
    candidate: Candidate,
    prefixes: Mapping[int, Sequence[Word]],
    horizon: int,
    rng: np.random.Generator,
) -> tuple[Rate, list[tuple[Word, Word, Word]]]:
    """How often ρ(u) = ρ(v) and yet u·w and v·w have different outputs, w a random continuation of 1 to ``horizon``
    letters, valid after both; in cells by state, over disjoint pairs; and the triples that do.
    """
    cells: dict[str, tuple[int, int]] = {}
    found = []
    for state, words in prefixes.items():
        triples = []
        for u, v in zip(words[::2], words[1::2], strict=False):
            w = _continuation(questions, u, v, horizon, rng)
            if w:
                triples.append((u, v, w))
        one = questions.ask([u + w for u, _, w in triples])
        other = questions.ask([v + w for _, v, w in triples])
        cells[str(state)] = (int((one != other).sum()), len(triples))
        found += [triple for triple, a, b in zip(triples, one, other, strict=True) if a != b]
    return Rate(cells), found


def _continuation(questions: Questions, u: Word, v: Word, horizon: int, rng: np.random.Generator) -> Word:
    """Random letters that keep both words valid; the empty word where there are none."""
    letters = len(questions.letters)
    weights = rng.dirichlet(np.ones(letters)) + 1e-3
    w: Word = ()
    for _ in range(int(rng.integers(1, horizon + 1))):
        both = [a for a in range(letters) if questions.is_valid((*u, *w, a)) and questions.is_valid((*v, *w, a))]
        if not both:
            break
        w = (*w, both[int(rng.choice(len(both), p=weights[both] / weights[both].sum()))])
    return w
