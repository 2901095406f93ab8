"""Prompts from real Python files that no shipped model was trained on: the sources of numpy and scipy.

Files are read once per process. A prompt is a window of a file: it begins before a statement, some lines above the
question, and ends where the question is asked. Prompts from one file form one group, since a file has one style.
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

import numpy as np

from ..models.tokenizer import Tokenizer
from .brackets import START, closers
from .literals import Literal, literals_of, python_files
from .refused import Refused

__all__ = ["Questions", "Source", "literals", "sources", "statement_lines", "versions", "window"]

PACKAGES = ("numpy", "scipy")
MOST_CHARS = 200_000  # longer files are tables
_COPIES = ("_pep440.py",)  # copied from a package that is also in the training text
SHORTEST, LONGEST = 48, 96  # tokens of a window, drawn between
SHORT_LIST = 48  # most tokens of the lists whose accuracy is shown; in longer ones the evidence may be diluted


@dataclass(frozen=True)
class Source:
    """A held-out file; ``name`` is its path below the folder of the packages."""

    name: str
    text: str


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids, each with the number of the right answer.

    Prompts of one group came from one file. ``real`` is False for a prompt into whose window a statement was put.
    """

    rows: list[list[int]]
    labels: list[int]
    answers: tuple[int, ...]
    groups: list[int]
    real: list[bool]


class NoHeldOutText(RuntimeError):
    """A package whose sources are held-out text is not installed."""


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    """Read the ASCII files of numpy and scipy, in a fixed order; NoHeldOutText if a package is missing."""
    files = []
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
                files.append(Source(path.relative_to(folder.parent).as_posix(), text))
    return tuple(files)


def versions() -> dict[str, str]:
    """Return the versions of the packages whose files are asked about."""
    return {package: version(package) for package in PACKAGES}


@lru_cache(maxsize=1)
def literals() -> tuple[Literal, ...]:
    """Read every list literal of the files that have a nested one, in about seven seconds."""
    nested = (file for file in sources() if "]]\n" in file.text)
    return tuple(literal for file in nested for literal in literals_of(file.text, file.name))


def parsed(source: Source) -> ast.Module | None:
    """Return a file's syntax tree, or None if it doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            return ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def statement_lines(tree: ast.Module) -> tuple[int, ...]:
    """List the lines on which a statement begins, counted from 0, ascending."""
    return tuple(sorted({node.lineno - 1 for node in ast.walk(tree) if isinstance(node, ast.stmt)}))


def window(
    lines: Sequence[str], starts: Sequence[int], end: tuple[int, int], first: int, tokenizer: Tokenizer, tokens: int
) -> list[int] | None:
    """Return the token ids of a text that begins before a statement and ends at ``end`` (line and column, from 0).

    It begins with the statement that holds line ``first``, or as many statements earlier as fit into ``tokens``.
    Returns None if even the shortest text has more tokens.
    """
    line, column = end
    text, longest = lines[line][:column], None
    above = line
    for start in reversed(starts[: bisect_right(starts, first)]):
        text = "".join(f"{earlier}\n" for earlier in lines[start:above]) + text
        above = start
        if len(text) > 12 * tokens or len(ids := tokenizer.encode(text)) > tokens:
            break
        longest = ids
    return longest


def start_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the model's own start token; empty if the vocabulary has none."""
    vocabulary = tokenizer.inner.get_vocab()
    return (vocabulary[START],) if START in vocabulary else ()


def goes_on(tokenizer: Tokenizer, ids: list[int], text: str, answer: int) -> bool:
    """Tell whether the prompt followed by ``text`` is encoded as the prompt's tokens and then ``answer``, unmerged."""
    return tokenizer.encode(tokenizer.decode(ids) + text)[: len(ids) + 1] == [*ids, answer]


def balanced(prompts: int, **options: int) -> int:
    """Return how many prompts each of two answers needs; ValueError for fewer than 2 prompts or a negative option."""
    if prompts < 2:
        raise ValueError(f"prompts is {prompts}; it must be 2 or more, one for each answer")
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    return -(-prompts // 2)


def interleaved(
    by_answer: Sequence[Sequence[tuple[list[int], int, bool]]], answers: tuple[int, ...], prompts: int
) -> Questions:
    """Take prompts (ids, group, real) of each answer in turn, so that any first part of them is balanced too."""
    pairs = zip(*by_answer, strict=True)
    order = [(label, *prompt) for pair in pairs for label, prompt in enumerate(pair)][:prompts]
    labels, rows, groups, real = (list(column) for column in zip(*order, strict=True))
    return Questions(rows, labels, answers, groups, real)


def closing_questions(tokenizer: Tokenizer, prompts: int, seed: int) -> Questions:
    """Ask whether one bracket closes a list or two do, after real lists of at most 48 tokens.

    Raises:
        Refused: If the tokenizer splits an answer, or makes more than 48 tokens of every list of one depth.
    """
    need = balanced(prompts, seed=seed)
    ids = closers(tokenizer)
    rng = np.random.default_rng([seed, 42])
    files = {name: i for i, name in enumerate(dict.fromkeys(literal.source for literal in literals()))}
    by_depth: list[list[tuple[list[int], int, bool]]] = [[], []]
    distinct = sorted(
        {(literal.prompt, literal.depth, literal.source) for literal in literals() if literal.depth in (1, 2)}
    )
    for i in rng.permutation(len(distinct)):
        text, depth, source = distinct[i]
        row = [*ids.start, *tokenizer.encode(text)]
        if len(row) <= SHORT_LIST and len(by_depth[depth - 1]) < need:
            by_depth[depth - 1].append((row, files[source], True))
    least = min(map(len, by_depth))
    if not least:
        raise Refused(
            f"the held-out files gave {len(by_depth[0])} flat and {len(by_depth[1])} nested lists of at most "
            f"{SHORT_LIST} tokens by this tokenizer; some of each are needed"
        )
    return interleaved([rows[:least] for rows in by_depth], (ids.one, ids.two), prompts)


def shuffled_sources(rng: np.random.Generator, most_chars: int) -> Iterator[tuple[int, Source]]:
    """Yield the files of at most ``most_chars`` characters in a random order, each with its number."""
    for i in rng.permutation(len(sources())):
        if len(sources()[i].text) <= most_chars:
            yield int(i), sources()[i]
