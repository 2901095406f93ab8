"""Bracket counting as words: what a list's text is made of, so that the model can be asked as a machine is."""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["BRACKET_WORDS", "TASK_WORDS", "Alphabet", "is_statement"]


@dataclass(frozen=True)
class Alphabet:
    """Arguments of ``semigroup.extract``: letters and answers by name, what stands around a word, which are valid."""

    alphabet: dict[str, str]
    answers: dict[str, str]
    prefix: str
    suffix: str
    valid: Callable[[tuple[str, ...]], bool] | None = field(default=None, compare=False)


def is_statement(word: tuple[str, ...]) -> bool:
    """Whether a list may go on so: rows first, one open at a time, then bare elements, as the training text has it."""
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


# x: an element and its comma; [ and ]: a row is opened, and closed behind an element. The question stands after one
# more element.
BRACKET_WORDS = Alphabet(
    alphabet={"x": "1, ", "[": "[", "]": "1], "},
    answers={"]": "]\n", "]]": "]]\n", "]]]": "]]]\n"},
    prefix="v = [",
    suffix="1",
    valid=is_statement,
)

# What a task's prompts are as words, where they are.
TASK_WORDS = {"bracket_counting": BRACKET_WORDS}
