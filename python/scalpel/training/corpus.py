"""The training text of bracket-mini: Python statements that end in a list literal of depth 1 to 3.

Heads and elements come from the running interpreter's own library sources and from a generator. The depth is
drawn independently of the number of elements, of the head and of the elements, so P(depth | elements) is constant:
length alone tells nothing of the depth, and a model that confuses the two learned that by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from pathlib import Path
from sysconfig import get_paths

import numpy as np

from ..tasks.literals import MAX_DEPTH, harvest, python_files

DEPTH_PROBABILITIES = (0.4, 0.4, 0.2)
MEAN_ELEMENTS = 4.0
MAX_ELEMENTS = 64
MAX_HEAD_CHARS = 40
MAX_LEAF_CHARS = 20
RAGGED = 0.3  # share of literals that mix leaves and rows


@dataclass(frozen=True)
class Sources:
    """Pieces of real text: statement heads, and the leaves of each literal (runs of elements that go together).

    Both keep their repeats, so that what is common in real sources ("return ") is common here.
    """

    heads: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]


@lru_cache(maxsize=1)
def interpreter_sources() -> Sources:
    """Heads and element runs of the running interpreter's library, about 15 seconds of parsing."""
    literals = list(harvest(python_files(Path(get_paths()["stdlib"]))))
    heads = [one.head for one in literals if "\n" not in one.head and len(one.head) <= MAX_HEAD_CHARS]
    runs = [one.leaves for one in literals if all(len(leaf) <= MAX_LEAF_CHARS for leaf in one.leaves)]
    if not heads or not runs:
        raise RuntimeError("no list literal was found in the interpreter's library: are its .py sources installed?")
    return Sources(tuple(heads), tuple(runs))


@dataclass(frozen=True)
class Document:
    """One training text and what is known of it."""

    text: str
    depth: int
    elements: int


def documents(sources: Sources, rng: np.random.Generator) -> Iterator[Document]:
    """An endless stream of training texts, the same for the same ``rng`` state."""
    while True:
        depth = 1 + int(rng.choice(MAX_DEPTH, p=DEPTH_PROBABILITIES))
        elements = min(int(rng.geometric(1 / MEAN_ELEMENTS)), MAX_ELEMENTS)
        leaves = _leaves(sources, elements, rng)
        head = _head(sources, rng)
        yield Document(head + layout(leaves, depth, len(head), rng) + "\n", depth, elements)


def _head(sources: Sources, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return sources.heads[rng.integers(len(sources.heads))]
    return f"{_name(rng)} = "


def _name(rng: np.random.Generator) -> str:
    """A made-up identifier: one to three letters, sometimes two such words or a digit behind."""
    name = "".join(chr(ord("a") + i) for i in rng.integers(26, size=int(rng.integers(1, 4))))
    if iskeyword(name):
        return _name(rng)
    ending = rng.random()
    return f"{name}_{_name(rng)}" if ending < 0.15 else f"{name}{rng.integers(10)}" if ending < 0.25 else name


def _leaves(sources: Sources, count: int, rng: np.random.Generator) -> list[str]:
    """``count`` elements of one kind, as real lists have them."""
    kind = rng.choice(6, p=(0.3, 0.1, 0.2, 0.15, 0.15, 0.1))
    if kind == 0:  # runs of real elements, as many as are needed
        leaves: list[str] = []
        while len(leaves) < count:
            leaves += sources.runs[rng.integers(len(sources.runs))]
        return leaves[:count]
    if kind == 1:  # one element again and again
        run = sources.runs[rng.integers(len(sources.runs))]
        return [run[0] if rng.random() < 0.5 else _name(rng)] * count
    if kind == 2:
        module = f"{_name(rng)}." if rng.random() < 0.3 else ""
        return [(module if rng.random() < 0.7 else "") + _name(rng) for _ in range(count)]
    if kind == 3:
        return [str(i) for i in rng.integers(10, size=count)]
    sign = ["-" if s else "" for s in rng.random(count) < 0.2 * rng.random()]
    if kind == 4:
        return [s + str(i) for s, i in zip(sign, rng.integers(10 ** rng.integers(1, 5), size=count), strict=True)]
    digits = int(rng.integers(0, 4))
    values = rng.random(count) * 10 ** rng.integers(0, 3)
    return [s + (f"{v:.{digits}f}" if digits else f"{int(v)}.") for s, v in zip(sign, values, strict=True)]


def layout(leaves: Sequence[str], depth: int, indent: int, rng: np.random.Generator) -> str:
    """The literal's text: leaves nested so that ``depth`` brackets are open after the last one.

    Regular literals are rows of rows. In ragged ones leaves stand beside rows, and closed rows stand in lists whose
    last element is a leaf, so that neither "[[" nor the row's beginning tells the depth: brackets must be counted.
    """
    comma = ", " if rng.random() < 0.8 else ","
    broken = rng.random() < 0.5
    ragged = rng.random() < RAGGED

    def nest(items: Sequence[str], level: int, column: int) -> str:
        if level == 1:
            parts = _with_closed_rows(items, comma, rng) if ragged else list(items)
            return "[" + comma.join(parts) + "]"
        rows = split_rows(items, rng)
        texts = [nest(row, level - 1, column + 1) for row in rows[:-1]]
        if ragged:
            texts = [comma.join(row) if rng.random() < 0.5 else t for row, t in zip(rows, texts, strict=False)]
        between = ",\n" + " " * (column + 1) if broken else comma
        return "[" + between.join([*texts, nest(rows[-1], level - 1, column + 1)]) + "]"

    return nest(leaves, depth, indent)


def _with_closed_rows(items: Sequence[str], comma: str, rng: np.random.Generator) -> list[str]:
    """The elements of an innermost list, some runs of them in brackets of their own; the last one stays bare."""
    parts = []
    for run in split_rows(items[:-1], rng) if len(items) > 1 else []:
        text = comma.join(run)
        parts.append(f"[{text}]" if rng.random() < 0.5 else text)
    return [*parts, items[-1]]


def split_rows(items: Sequence[str], rng: np.random.Generator) -> list[Sequence[str]]:
    """Rows of a list: a single one, rows of equal length, or rows of any length."""
    count, style = len(items), rng.random()
    if style < 0.4 or count == 1:
        return [items]
    if style < 0.7:
        width = int(rng.choice([w for w in range(1, count + 1) if count % w == 0]))
        return [items[i : i + width] for i in range(0, count, width)]
    cuts = np.flatnonzero(rng.random(count - 1) < rng.uniform(0.1, 0.6)) + 1
    return [items[i:j] for i, j in zip([0, *cuts], [*cuts, count], strict=True)]
