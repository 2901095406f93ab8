"""Python files as text into which statements can be put: their lines, and the places between their statements."""

import ast
import warnings
from dataclasses import dataclass

from .literals import literals_of

__all__ = ["Place", "SourceFile", "source_file"]


@dataclass(frozen=True)
class Place:
    """A line before which a statement can be put, and the indent that it needs there."""

    line: int
    indent: int


@dataclass(frozen=True)
class SourceFile:
    """A file's lines, the places between its statements, and the lines of statements that end in a list literal."""

    lines: tuple[str, ...]
    places: tuple[Place, ...]
    lists: frozenset[int]


def source_file(source: str) -> SourceFile | None:
    """Read a file's text into lines and places; None if it doesn't parse or has no statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    lines = source.split("\n")
    starts = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not getattr(node, "decorator_list", None):
            line = lines[node.lineno - 1]
            if not line[: node.col_offset].strip() and not line.lstrip().startswith("elif"):
                starts[node.lineno - 1] = node.col_offset
    if not starts:
        return None
    inside = {line for literal in literals_of(source) for line in range(literal.lines[0] - 1, literal.lines[1])}
    places = tuple(Place(line, indent) for line, indent in sorted(starts.items()) if line not in inside)
    return SourceFile(tuple(lines), places, frozenset(inside)) if places else None
