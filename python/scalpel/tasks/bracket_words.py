"""Bracket prompts as words over an alphabet, so that a model can be questioned as a machine is."""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["BRACKET_WORDS", "TASK_WORDS", "Alphabet", "is_statement"]


@dataclass(frozen=True)
class Alphabet:
    """Arguments of ``semigroup.extract``: letters and answers by name, the text around a word, and the valid words."""

    alphabet: dict[str, str]
    answers: dict[str, str]
    prefix: str
    suffix: str
    valid: Callable[[tuple[str, ...]], bool] | None = field(default=None, compare=False)


def is_statement(word: tuple[str, ...]) -> bool:
    """Tell whether the training text has such lists: first rows, one open at a time, then bare elements."""
    depth, bare = 1, False
    for letter in word:
        if letter == "[":
            if depth == 2 or bare:
                return False
            depth = 2
        elif letter == "]":
            if depth == 1:
                return False
            depth = 1
        elif depth == 1:
            bare = True
    return True


# "x" is an element and its comma; "[" opens a row, and "]" closes it after an element. One more element follows the
# word, and then the question.
BRACKET_WORDS = Alphabet(
    alphabet={"x": "1, ", "[": "[", "]": "1], "},
    answers={"]": "]\n", "]]": "]]\n", "]]]": "]]]\n"},
    prefix="v = [",
    suffix="1",
    valid=is_statement,
)

# Tasks whose prompts are words over an alphabet.
TASK_WORDS = {"bracket_counting": BRACKET_WORDS}
