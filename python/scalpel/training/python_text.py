"""The training text of python-small: windows of real Python files, with statements of the tasks put in between.

Only what could tell a list's depth is controlled. Real statements that end in a list literal are left out, and
generated ones take their place, whose depth is drawn independently of everything else (see
:mod:`scalpel.tasks.corpus`). Comments, preceding statements and unmatched brackets in strings are as people wrote them.
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths

import numpy as np
from torch import Tensor

from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.corpus import Sources, _name, documents
from ..tasks.literals import python_files
from ..tasks.source_files import Place, SourceFile, source_file
from .recipe import Recipe
from .text import Batch, batch_of, closer_weights, loss_of
from .tokenizer import START

SHORTEST = 64  # tokens of the shortest windows; the longest ones fill the context
LIST_SHARE = 0.25  # of the places between statements that get a statement ending in a list
PAIR_SHARE = 0.5  # of the windows that get a set or a string, made first and added to later
CHARS_A_TOKEN = 6  # more than the text has, so that a window always holds enough tokens
MOST_BYTES = 200_000  # longer files are tables


@lru_cache(maxsize=1)
def training_files(packages: tuple[str, ...] = ("torch",)) -> tuple[SourceFile, ...]:
    """Read and parse the interpreter's library and ``packages``, in about two minutes."""
    folders = [Path(get_paths()["stdlib"])]
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"the package {package} is not installed; its sources are training text")
        folders.append(Path(spec.origin).parent)
    parsed = (_read(path) for folder in folders for path in python_files(folder))
    files = tuple(file for file in parsed if file is not None)
    if not files:
        raise RuntimeError("no Python source was found: are the interpreter's .py files installed?")
    return files


def _read(path: Path) -> SourceFile | None:
    try:
        source = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if len(source) > MOST_BYTES or not source.isascii() else source_file(source)


class PythonText:
    """Windows of real files, with generated statements of the tasks put between the statements."""

    def __init__(self, files: tuple[SourceFile, ...], sources: Sources) -> None:
        self.files, self.sources = files, sources
        sizes = np.array([len(file.places) for file in files], dtype=float)
        self._ends = np.cumsum(sizes / sizes.sum())

    def window(self, rng: np.random.Generator, chars: int) -> tuple[str, int]:
        """Draw a text that begins before a random statement, and count the elements of its longest generated list.

        The text has at least ``chars`` characters, unless the file ends before.
        """
        file = self.files[min(int(np.searchsorted(self._ends, rng.random())), len(self.files) - 1)]
        first = int(rng.integers(len(file.places)))
        last, size = file.places[first].line, 0
        while last < len(file.lines) and size < chars:
            size += 0 if last in file.lists else len(file.lines[last]) + 1
            last += 1
        places = file.places[first : bisect_left(file.places, last, key=lambda place: place.line)]
        inserted, longest = self._statements(places, rng)
        text = []
        for line in range(file.places[first].line, last):
            text.append(inserted.get(line, ""))
            if line not in file.lists:
                text.append(file.lines[line] + "\n")
        return "".join(text), longest

    def _statements(self, places: tuple[Place, ...], rng: np.random.Generator) -> tuple[dict[int, str], int]:
        """Draw statements, by the line before which each is put, and count the elements of the longest list."""
        statements: dict[int, str] = {}
        longest = 0
        lists = documents(self.sources, rng)
        for place in places:
            if rng.random() < LIST_SHARE:
                document = next(lists)
                longest = max(longest, document.elements)
                statements[place.line] = _indented(document.text, place.indent)
        if rng.random() < PAIR_SHARE:
            for place, statement in _pair(places, rng):
                statements[place.line] = statements.get(place.line, "") + _indented(statement, place.indent)
        return statements, longest


def _indented(statement: str, indent: int) -> str:
    blank = " " * indent
    return "".join(f"{blank}{line}\n" for line in statement.removesuffix("\n").split("\n"))


def _pair(places: tuple[Place, ...], rng: np.random.Generator) -> Iterator[tuple[Place, str]]:
    """Draw two statements: one makes a set or a string, the other adds to it at a later place of the same block."""
    if len(places) < 2:
        return
    i = int(rng.integers(len(places) - 1))
    block = []
    for later in places[i + 1 : i + 12]:
        if later.indent < places[i].indent:
            break
        block.append(later)
    if not block:
        return
    place = block[int(rng.integers(len(block)))]
    name, item, is_set = _name(rng), _name(rng), rng.random() < 0.5
    quote = "'" if rng.random() < 0.5 else '"'
    yield places[i], f"{name} = set()\n" if is_set else f"{name} = {quote}{quote}\n"
    yield place, f"{name}.add({item})\n" if is_set else f"{name} += {item}\n"


class PythonCourse:
    """The course of python-small: every step has windows of another length, which begin at random positions."""

    def __init__(self, recipe: Recipe, text: PythonText, tokenizer: Tokenizer) -> None:
        self.recipe, self.text, self.tokenizer = recipe, text, tokenizer
        self._weights = closer_weights(recipe, tokenizer)
        self._start = tokenizer.token_to_id(START)

    def batches(self, start: int) -> Iterator[Batch]:
        step = start
        while True:
            rng = np.random.default_rng([self.recipe.seed, step])
            length = int(rng.integers(SHORTEST, self.recipe.block_size + 1))
            rows = []
            for _ in range(self.recipe.batch):
                text, longest = self.text.window(rng, CHARS_A_TOKEN * length)
                rows.append(([self._start, *self.tokenizer.encode(text)][:length], longest))
            yield batch_of(rows, self.recipe.block_size, rng)
            step += 1

    def loss(self, model: CircuitGPT, batch: Batch) -> Tensor:
        return loss_of(model, batch, self._weights)
