"""Words to ask: short ones, and long ones from many different distributions."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from .questions import Questions, Word

__all__ = ["pumped", "random_words", "short_words"]


def short_words(questions: Questions, longest: int, most: int) -> list[Word]:
    """All valid words, the shortest first, up to ``most`` of them and ``longest`` letters."""
    found: list[Word] = []
    for length in range(longest + 1):
        for word in product(range(len(questions.letters)), repeat=length):
            if len(found) == most:
                return found
            if questions.is_valid(word):
                found.append(word)
        if len(questions.letters) ** (length + 1) > 64 * most:
            break
    return found


def random_words(questions: Questions, longest: int, count: int, rng: np.random.Generator) -> list[Word]:
    """Valid words whose length is uniform up to ``longest``.

    Each has frequencies of letters of its own, from even to nearly a single letter, so that what counts letters is led
    far from the start: with even frequencies, random words never are.
    """
    letters = len(questions.letters)
    found = []
    for _ in range(count):
        weights = rng.dirichlet(np.full(letters, 0.5)) + 1e-3
        word: Word = ()
        for _ in range(int(rng.integers(longest + 1))):
            open_ = [a for a in range(letters) if questions.is_valid((*word, a))]
            if not open_:
                break
            share = weights[open_] / weights[open_].sum()
            word = (*word, open_[int(rng.choice(len(open_), p=share))])
        found.append(word)
    return found


def pumped(questions: Questions, longest: int) -> Iterator[Word]:
    """Valid words x·yⁿ of ``longest`` letters or a little less, for x and y of up to two letters.

    Repetition is where a bounded memory fails first.
    """
    pieces = short_words(questions, 2, 64)
    for x, y in product(pieces, [piece for piece in _all(questions, 2) if piece]):
        word = (*x, *(y * ((longest - len(x)) // len(y))))
        while word and not questions.is_valid(word):
            word = word[: -len(y)] if len(word) > len(x) else ()
        if len(word) > len(x):
            yield word


def _all(questions: Questions, longest: int) -> list[Word]:
    letters = range(len(questions.letters))
    return [word for length in range(1, longest + 1) for word in product(letters, repeat=length)][:64]
