"""Which generators of bracket counting a model has: for each letter, whether it moves the model's answer as it should.

A letter is a map on the states "one list open" and "two lists open". After a word ending in a letter, the answer may be
right though the letter does nothing: a model that always says "]" is right behind every "]". So a letter is said to act
rightly at a word u·c only if the answers after u and after u·c are both right; the plain accuracy after u·c stands
beside it. Both are averaged over states first, so that none counts by how many words lead to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.bracket_words import BRACKET_WORDS, is_statement
from ...tasks.brackets import closers
from ...tasks.refused import Refused

__all__ = ["LEAST", "LETTERS", "Acting", "acting", "appeared", "words"]

LEAST = 0.95  # accuracy from which on a generator is said to be there
LETTERS = tuple(BRACKET_WORDS.alphabet)
Word = tuple[str, ...]


@dataclass(frozen=True)
class Acting:
    """Of one letter: ``acts``, the share of words at which the answers before and after it are right, and ``after``,
    that after it, both balanced over the states that the letter is read in; ``words``: how many were asked."""

    acts: float
    after: float
    words: int


def words(longest: int = 7) -> list[Word]:
    """Every valid word of up to ``longest`` letters, the empty one included."""
    return [w for n in range(longest + 1) for w in product(LETTERS, repeat=n) if is_statement(w)]


def state(word: Word) -> int:
    """How many lists are open after ``word``, the outermost included: 1 or 2."""
    return 1 + word.count("[") - word.count("]")


@torch.no_grad()
def answers(model: CircuitGPT, asked: Sequence[Word], batch: int = 256) -> dict[Word, int]:
    """Which of "]\\n" (1), "]]\\n" (2) and, where it is a token, "]]]\\n" (3) the model prefers after each word.

    ValueError without a tokenizer, where it splits an answer, or where a word doesn't fit the context.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; bracket words are text")
    ids = closers(model.tokenizer)
    third = model.tokenizer.inner.token_to_id("]]]\n")
    choices = [ids.one, ids.two, *([] if third is None else [third])]
    letters = BRACKET_WORDS.alphabet
    rows = [
        [
            *ids.start,
            *model.tokenizer.encode(BRACKET_WORDS.prefix + "".join(letters[c] for c in w) + BRACKET_WORDS.suffix),
        ]
        for w in asked
    ]
    found: dict[Word, int] = {}
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.int64, device="cpu") for row in part], batch_first=True
        )
        last = torch.tensor([len(row) - 1 for row in part], dtype=torch.int64, device="cpu")
        logits = model(padded)[torch.arange(len(part), device="cpu"), last][:, choices]  # causality hides the padding
        for word, choice in zip(asked[begin : begin + batch], logits.argmax(-1).tolist(), strict=True):
            found[word] = choice + 1
    return found


def acting(model: CircuitGPT, longest: int = 7) -> dict[str, Acting]:
    """How each letter acts, over every valid word of up to ``longest`` letters."""
    right = {word: answer == state(word) for word, answer in answers(model, words(longest)).items()}
    return acting_of(right)


def acting_of(right: Mapping[Word, bool]) -> dict[str, Acting]:
    """The same from whether the answer is right after each word."""
    found = {}
    for letter in LETTERS:
        cells: dict[int, list[tuple[bool, bool]]] = {}
        for word, after in right.items():
            if word and word[-1] == letter:
                cells.setdefault(state(word[:-1]), []).append((after and right[word[:-1]], after))
        means = [np.mean(cell, axis=0) for cell in cells.values()]
        acts, plain_after = np.mean(means, axis=0)
        found[letter] = Acting(float(acts), float(plain_after), sum(map(len, cells.values())))
    return found


def appeared(steps: Sequence[int], accuracy: Sequence[float], least: float = LEAST) -> int | None:
    """The first step from which on the accuracy is never below ``least``; None if it is so at the last one."""
    found = None
    for step, value in zip(reversed(steps), reversed(accuracy), strict=True):
        if not value >= least:
            break
        found = step
    return found
