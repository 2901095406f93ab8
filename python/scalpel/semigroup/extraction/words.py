"""Words to ask about: short ones, and long ones from many different distributions."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from ..machine import MooreMachine
from .questions import Questions, Word

__all__ = ["all_words_to", "pumped", "random_words", "short_words", "words_to"]


def short_words(questions: Questions, longest: int, most: int) -> list[Word]:
    """List all valid words, the shortest first, up to ``most`` words and ``longest`` letters."""
    words: list[Word] = []
    for length in range(longest + 1):
        for word in product(range(len(questions.letters)), repeat=length):
            if len(words) == most:
                return words
            if questions.is_valid(word):
                words.append(word)
        if len(questions.letters) ** (length + 1) > 64 * most:
            break
    return words


def random_words(questions: Questions, longest: int, count: int, rng: np.random.Generator) -> list[Word]:
    """Draw valid words whose length is uniform up to ``longest``.

    Each word has its own frequencies of letters, from uniform to nearly a single letter, so that a counter of letters
    is led far from the start. Random words with uniform frequencies never do that.
    """
    letters = len(questions.letters)
    words = []
    for _ in range(count):
        weights = rng.dirichlet(np.full(letters, 0.5)) + 1e-3
        word: Word = ()
        for _ in range(int(rng.integers(longest + 1))):
            open_ = [a for a in range(letters) if questions.is_valid((*word, a))]
            if not open_:
                break
            share = weights[open_] / weights[open_].sum()
            word = (*word, open_[int(rng.choice(len(open_), p=share))])
        words.append(word)
    return words


def words_to(machine: MooreMachine, state: int, longest: int, count: int, rng: np.random.Generator) -> list[Word]:
    """Draw ``count`` words of up to ``longest`` letters that lead a machine to ``state``, or none if no word does.

    The length is drawn uniformly from those for which such words exist. The word is then drawn with the probability
    that its letters' frequencies, which are drawn for each word, give it. The weights of all paths from each state to
    the end are summed backwards, so that no word is rejected.
    """
    table = np.array(machine.transitions)
    words: list[Word] = []
    for _ in range(count):
        weights = rng.dirichlet(np.ones(len(machine.letters))) + 1e-3
        ways = [np.eye(machine.states)[state]]
        for _ in range(longest):
            after = ways[-1][table] @ weights
            ways.append(after / max(after.sum(), 1e-300))  # only ratios within a length matter
        lengths = [n for n in range(longest + 1) if ways[n][machine.start] > 0]
        if not lengths:
            break
        word, at = [], machine.start
        for left in range(lengths[int(rng.integers(len(lengths)))], 0, -1):
            share = weights * ways[left - 1][table[at]]
            letter = int(rng.choice(len(share), p=share / share.sum()))
            word.append(letter)
            at = int(table[at, letter])
        words.append(tuple(word))
    return words


def all_words_to(machine: MooreMachine, state: int, longest: int, most: int) -> list[Word] | None:
    """List every word of up to ``longest`` letters that leads to ``state``; None if there are more than ``most``."""
    table = np.array(machine.transitions)
    ways = [np.eye(machine.states)[state]]
    for _ in range(longest):
        ways.append(ways[-1][table].sum(1))
    if sum(way[machine.start] for way in ways) > most:
        return None
    words: list[Word] = []
    for length in range(longest + 1):
        open_: list[tuple[Word, int]] = [((), machine.start)]
        for left in range(length, 0, -1):
            open_ = [
                ((*word, letter), target)
                for word, at in open_
                for letter, target in enumerate(machine.transitions[at])
                if ways[left - 1][target] > 0
            ]
        words += [word for word, at in open_ if at == state]
    return words


def pumped(questions: Questions, longest: int) -> Iterator[Word]:
    """Yield valid words x·yⁿ of about ``longest`` letters, for x and y of up to two letters.

    A bounded memory fails on repetitions first.
    """
    pieces = short_words(questions, 2, 64)
    for x, y in product(pieces, [piece for piece in _all(questions, 2) if piece]):
        word = (*x, *(y * ((longest - len(x)) // len(y))))
        if questions.is_valid(word):
            yield word


def _all(questions: Questions, longest: int) -> list[Word]:
    letters = range(len(questions.letters))
    return [word for length in range(1, longest + 1) for word in product(letters, repeat=length)][:64]
