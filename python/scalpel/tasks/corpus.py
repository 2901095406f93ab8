"""The training text of bracket-mini: Python statements that end in a list literal of depth 1 to 3.

Heads and elements come from the running interpreter's own library sources and from a generator. The depth is drawn
independently of the head, of the elements, of their number and of how they are divided into rows, so none of these
tells the depth: a model that mistakes length for depth did not learn that from the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from keyword import iskeyword
from pathlib import Path
from sysconfig import get_paths

import numpy as np

from ..models.circuitgpt.model import CircuitGPT
from .brackets import closers
from .literals import MAX_DEPTH, harvest, python_files

DEPTH_PROBABILITIES = (0.5, 0.35, 0.15)  # real lists are flat more often than not; the same at every length
MEAN_ELEMENTS = 4.0
MAX_ELEMENTS = 64
MAX_HEAD_CHARS = 40
MAX_LEAF_CHARS = 20


@dataclass(frozen=True)
class Sources:
    """Pieces of real text: statement heads, and the leaves of each literal (runs of elements that belong together).

    Repeats are kept, so that what is common in real sources ("return ") is common here too.
    """

    heads: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]


@lru_cache(maxsize=1)
def interpreter_sources() -> Sources:
    """Read heads and element runs from the running interpreter's library, in about 15 seconds."""
    literals = list(harvest(python_files(Path(get_paths()["stdlib"]))))
    heads = [item.head for item in literals if "\n" not in item.head and len(item.head) <= MAX_HEAD_CHARS]
    runs = [item.leaves for item in literals if all(len(leaf) <= MAX_LEAF_CHARS for leaf in item.leaves)]
    if not heads or not runs:
        raise RuntimeError("no list literal was found in the interpreter's library: are its .py sources installed?")
    return Sources(tuple(heads), tuple(runs))


@dataclass(frozen=True)
class Document:
    """A training text with its depth and its number of elements."""

    text: str
    depth: int
    elements: int


def documents(sources: Sources, rng: np.random.Generator) -> Iterator[Document]:
    """Yield training texts without end, the same for the same state of ``rng``."""
    while True:
        depth = 1 + int(rng.choice(MAX_DEPTH, p=DEPTH_PROBABILITIES))
        elements = min(int(rng.geometric(1 / MEAN_ELEMENTS)), MAX_ELEMENTS)
        leaves = _leaves(sources, elements, rng)
        head = _head(sources, rng)
        yield Document(head + layout(leaves, depth, len(head), rng) + "\n", depth, elements)


def reference_prompts(model: CircuitGPT, sources: Sources, count: int = 256) -> list[list[int]]:
    """Draw token ids of new text made like the training text, over which activations are averaged or sampled.

    Args:
        model: Its tokenizer encodes the text, and its context limits the length.
        sources: What the text is made of.
        count: How many prompts.
    """
    assert model.tokenizer is not None
    rng = np.random.default_rng(30_000)
    start = closers(model.tokenizer).start
    rows = ([*start, *model.tokenizer.encode(document.text)] for document in documents(sources, rng))
    return [row[: model.config.block_size] for row in islice(rows, count)]


def _head(sources: Sources, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return sources.heads[rng.integers(len(sources.heads))]
    return f"{_name(rng)} = "


def _name(rng: np.random.Generator) -> str:
    """Make up an identifier: one to three letters, sometimes followed by a second such word or a digit."""
    name = "".join(chr(ord("a") + i) for i in rng.integers(26, size=int(rng.integers(1, 4))))
    if iskeyword(name):
        return _name(rng)
    ending = rng.random()
    return f"{name}_{_name(rng)}" if ending < 0.15 else f"{name}{rng.integers(10)}" if ending < 0.25 else name


def _leaves(sources: Sources, count: int, rng: np.random.Generator) -> list[str]:
    """Draw ``count`` elements of one kind, as real lists have them."""
    kind = rng.choice(6, p=(0.3, 0.1, 0.2, 0.15, 0.15, 0.1))
    if kind == 0:  # as many runs of real elements as are needed
        leaves: list[str] = []
        while len(leaves) < count:
            leaves += sources.runs[rng.integers(len(sources.runs))]
        return leaves[:count]
    if kind == 1:  # the same element each time
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
    """Write a literal: closed rows, then the last row with ``depth`` brackets open around it.

    The rows are divided before the depth is used, so the number of elements, the number of rows, and the number of
    elements after the last bracket say nothing about the depth. At depth 1 the last row's elements stand bare beside
    the closed rows ("[[1, 2], 3"), so the mere presence of a bracket says nothing either: a model has to tell open
    brackets from closed ones.
    """
    comma = ", " if rng.random() < 0.8 else ","
    between = ",\n" + " " * (indent + 1) if rng.random() < 0.5 else comma
    *closed, last = ([comma.join(row)] for row in split_rows(leaves, rng))
    rows = [f"[{row[0]}]" for row in closed]
    if depth == 3 and rows:  # put some of the closed rows into a closed list of their own
        cut = int(rng.integers(len(rows) + 1))
        rows = ([f"[{comma.join(rows[:cut])}]"] if cut else []) + [
            "[" + comma.join([*rows[cut:], f"[{last[0]}]"]) + "]"
        ]
        return "[" + between.join(rows) + "]"
    return "[" + between.join([*rows, "[" * (depth - 1) + last[0] + "]" * (depth - 1)]) + "]"


def split_rows(items: Sequence[str], rng: np.random.Generator) -> list[Sequence[str]]:
    """Divide a list into rows: a single row, rows of equal length, or rows of any length."""
    count, style = len(items), rng.random()
    if style < 0.5 or count == 1:
        return [items]
    if style < 0.75:
        width = int(rng.choice([w for w in range(1, count + 1) if count % w == 0]))
        return [items[i : i + width] for i in range(0, count, width)]
    cuts = np.flatnonzero(rng.random(count - 1) < rng.uniform(0.1, 0.6)) + 1
    return [items[i:j] for i, j in zip([0, *cuts], [*cuts, count], strict=True)]
