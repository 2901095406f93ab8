"""Prompts from real Python files that no shipped model was trained on: the sources of numpy and scipy.

Files are read once a process. A prompt is a window of a file: it begins in front of a statement, some lines above
the question, and ends where the question stands. Prompts from one file form one group, since a file has one style.
"""

import ast
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..models.tokenizer import Tokenizer
from .brackets import START, closers
from .literals import Literal, literals_of, python_files
from .refused import Refused

if TYPE_CHECKING:
    pass

__all__ = ["Questions", "Source", "literals", "sources", "statement_lines", "versions", "window"]

PACKAGES = ("numpy", "scipy")
MOST_CHARS = 200_000  # longer files are tables
_COPIES = ("_pep440.py",)  # copied from a package that the training text has too
SHORTEST, LONGEST = 48, 96  # tokens of a window, drawn between
SHORT_LIST = 48  # tokens of the lists whose accuracy is shown: longer ones may be diluted


@dataclass(frozen=True)
class Source:
    """A held-out file: ``name`` is its path below the packages' folder."""

    name: str
    text: str


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids with the right answer's number; prompts of one group came from one file.

    ``real``: False for a prompt into whose window a statement was put.
    """

    rows: list[list[int]]
    labels: list[int]
    answers: tuple[int, ...]
    groups: list[int]
    real: list[bool]


class NoHeldOutText(RuntimeError):
    """A package whose sources are the held-out text isn't installed."""


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    """The ASCII files of numpy and scipy, in a fixed order. NoHeldOutText where a package is missing."""
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise NoHeldOutText(f"the package {package} is not installed; its sources are the held-out text")
        folder = Path(spec.origin).parent
        for path in python_files(folder):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.isascii() and len(text) <= MOST_CHARS and path.name not in _COPIES:
                found.append(Source(path.relative_to(folder.parent).as_posix(), text))
    return tuple(found)


def versions() -> dict[str, str]:
    """The packages whose files are asked about."""
    return {package: version(package) for package in PACKAGES}


@lru_cache(maxsize=1)
def literals() -> tuple[Literal, ...]:
    """Every list literal of the files that have a nested one; ``source`` is the file's name. About seven seconds."""
    nested = (one for one in sources() if "]]\n" in one.text)
    return tuple(literal for one in nested for literal in literals_of(one.text, one.name))


def parsed(source: Source) -> ast.Module | None:
    """A file's syntax tree, None where it doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            return ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def statement_lines(tree: ast.Module) -> tuple[int, ...]:
    """The lines, from 0, on which a statement begins, ascending."""
    return tuple(sorted({node.lineno - 1 for node in ast.walk(tree) if isinstance(node, ast.stmt)}))


def window(
    lines: Sequence[str], starts: Sequence[int], end: tuple[int, int], first: int, tokenizer: Tokenizer, tokens: int
) -> list[int] | None:
    """Token ids of the text that ends at ``end`` (line and column, from 0) and begins in front of a statement.

    It begins no later than with the statement that holds line ``first``, and as many statements earlier as ``tokens``
    allow. None where even the shortest has more.
    """
    line, column = end
    text, found = lines[line][:column], None
    above = line
    for start in reversed(starts[: bisect_right(starts, first)]):
        text = "".join(f"{one}\n" for one in lines[start:above]) + text
        above = start
        if len(text) > 12 * tokens or len(ids := tokenizer.encode(text)) > tokens:
            break
        found = ids
    return found


def start_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The model's own start token, where the vocabulary has one."""
    vocabulary = tokenizer.inner.get_vocab()
    return (vocabulary[START],) if START in vocabulary else ()


def goes_on(tokenizer: Tokenizer, ids: list[int], text: str, answer: int) -> bool:
    """Whether the prompt followed by ``text`` is its own tokens and then ``answer``: no token reaches across."""
    return tokenizer.encode(tokenizer.decode(ids) + text)[: len(ids) + 1] == [*ids, answer]


def balanced(prompts: int, **options: int) -> int:
    """Prompts for each of two answers. ValueError below 2 prompts, or for an option below 0."""
    if prompts < 2:
        raise ValueError(f"prompts is {prompts}; it must be 2 or more, one for each answer")
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    return -(-prompts // 2)


def interleaved(
    by_answer: Sequence[Sequence[tuple[list[int], int, bool]]], answers: tuple[int, ...], prompts: int
) -> Questions:
    """Prompts (ids, group, real) of each answer in turn, so that any beginning of them is balanced too."""
    order = [(label, *one) for pair in zip(*by_answer, strict=True) for label, one in enumerate(pair)][:prompts]
    labels, rows, groups, real = (list(column) for column in zip(*order, strict=True))
    return Questions(rows, labels, answers, groups, real)


def closing_questions(tokenizer: Tokenizer, prompts: int, seed: int) -> Questions:
    """Does one bracket close the list, or do two? Real lists of at most 48 tokens.

    Refused where the tokenizer splits an answer, or makes more tokens of every list of one of the depths.
    """
    need = balanced(prompts, seed=seed)
    ids = closers(tokenizer)
    rng = np.random.default_rng([seed, 42])
    files = {name: i for i, name in enumerate(dict.fromkeys(one.source for one in literals()))}
    found: list[list[tuple[list[int], int, bool]]] = [[], []]
    distinct = sorted({(one.prompt, one.depth, one.source) for one in literals() if one.depth in (1, 2)})
    for i in rng.permutation(len(distinct)):
        text, depth, source = distinct[i]
        row = [*ids.start, *tokenizer.encode(text)]
        if len(row) <= SHORT_LIST and len(found[depth - 1]) < need:
            found[depth - 1].append((row, files[source], True))
    least = min(map(len, found))
    if not least:
        raise Refused(
            f"the held-out files gave {len(found[0])} flat and {len(found[1])} nested lists of at most {SHORT_LIST} "
            "tokens by this tokenizer; some of each are needed"
        )
    return interleaved([one[:least] for one in found], (ids.one, ids.two), prompts)


def shuffled_sources(rng: np.random.Generator, most_chars: int) -> Iterator[tuple[int, Source]]:
    """The files of at most ``most_chars`` characters in a random order, each with its number."""
    for i in rng.permutation(len(sources())):
        if len(sources()[i].text) <= most_chars:
            yield int(i), sources()[i]
