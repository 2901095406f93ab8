"""Which generators of bracket counting a model has: whether each letter moves the model's answer as it should.

A letter is a map on the states "one list open" and "two lists open". The answer after a word that ends in a letter may
be right although the letter does nothing: a model that always answers "]" is right after every "]". So a letter c is
said to act rightly at a word u·c only if the answers after u and after u·c are both right. The plain accuracy after u·c
is given beside it. Both are first averaged within each state, so that a state doesn't count by how many words lead to
it.
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

LEAST = 0.95  # the accuracy from which a generator counts as present
LETTERS = tuple(BRACKET_WORDS.alphabet)
Word = tuple[str, ...]


@dataclass(frozen=True)
class Acting:
    """How one letter acts on a model's answers.

    Attributes:
        acts: Share of words at which the answers before and after the letter are both right.
        after: Share of words at which the answer after the letter is right. Both shares are balanced over the states in
            which the letter is read.
        words: How many words were asked.
    """

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
    """Which of "]\\n" (1), "]]\\n" (2) and, if that is a token, "]]]\\n" (3) the model prefers after each word.

    Raises:
        Refused: The model has no tokenizer, or one that splits an answer.
        ValueError: A word doesn't fit the context.
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
    preferred: dict[Word, int] = {}
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.int64, device="cpu") for row in part], batch_first=True
        )
        last = torch.tensor([len(row) - 1 for row in part], dtype=torch.int64, device="cpu")
        logits = model(padded)[torch.arange(len(part), device="cpu"), last][
            :, choices
        ]  # attention is causal, so the padding has no effect
        for word, choice in zip(asked[begin : begin + batch], logits.argmax(-1).tolist(), strict=True):
            preferred[word] = choice + 1
    return preferred


def acting(model: CircuitGPT, longest: int = 7) -> dict[str, Acting]:
    """How each letter acts, over every valid word of up to ``longest`` letters."""
    right = {word: answer == state(word) for word, answer in answers(model, words(longest)).items()}
    return acting_of(right)


def acting_of(right: Mapping[Word, bool]) -> dict[str, Acting]:
    """How each letter acts, computed from whether the answer is right after each word."""
    by_letter = {}
    for letter in LETTERS:
        cells: dict[int, list[tuple[bool, bool]]] = {}
        for word, after in right.items():
            if word and word[-1] == letter:
                cells.setdefault(state(word[:-1]), []).append((after and right[word[:-1]], after))
        means = [np.mean(cell, axis=0) for cell in cells.values()]
        acts, plain_after = np.mean(means, axis=0)
        by_letter[letter] = Acting(float(acts), float(plain_after), sum(map(len, cells.values())))
    return by_letter


def appeared(steps: Sequence[int], accuracy: Sequence[float], least: float = LEAST) -> int | None:
    """The first step from which the accuracy is never below ``least``; None if it is below at the last step."""
    first = None
    for step, value in zip(reversed(steps), reversed(accuracy), strict=True):
        if not value >= least:
            break
        first = step
    return first
