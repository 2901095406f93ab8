r"""List literals in Python sources: real text to train on, and other real text to ask about.

A literal counts if it ends its statement and its line, and all closing brackets follow its last element directly, so
that the token after the last element is ``]\n``, ``]]\n`` or ``]]]\n``.
"""

import ast
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 3


@dataclass(frozen=True)
class Literal:
    """A statement that ends in a list literal.

    Attributes:
        head: The statement's text in front of the literal.
        body: The literal up to its last element, without the closing brackets.
        depth: How many brackets are open there.
        elements: How many leaves it has.
        leaves: Their texts.
        source: The file's name.
        lines: The statement's first and last line in the file, counted from 1.
    """

    head: str
    body: str
    depth: int
    elements: int
    leaves: tuple[str, ...]
    source: str
    lines: tuple[int, int] = (0, 0)

    @property
    def prompt(self) -> str:
        """The text whose next token should be ``depth`` brackets and a newline."""
        return self.head + self.body

    @property
    def text(self) -> str:
        """The whole statement with its newline."""
        return self.prompt + "]" * self.depth + "\n"


def harvest(files: Iterable[Path], max_chars: int = 2000) -> Iterator[Literal]:
    """Yield every literal of the files that counts, in order; files that don't parse are skipped."""
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if "]\n" not in source:
            continue
        yield from literals_of(source, path.name, max_chars)


def python_files(folder: Path, skip: tuple[str, ...] = ("site-packages", "__pycache__")) -> list[Path]:
    """List the ``.py`` files below ``folder`` in a fixed order, without third-party packages."""
    files = folder.rglob("*.py")
    return sorted(file for file in files if not any(part in skip for part in file.relative_to(folder).parts))


def literals_of(source: str, name: str = "", max_chars: int = 2000) -> Iterator[Literal]:
    """Yield the literals of one file's text that count."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    text = _SourceText(source)
    for statement in _statements(tree):
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr | ast.Assert):
            continue
        if not text.ends_line_with_bracket(statement):
            continue
        node = _list_at_end(statement)
        literal = None if node is None else _read(text, statement, node, name)
        if literal is not None and len(literal.text) <= max_chars:
            yield literal


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what ``ast.walk`` yields, in its order, without the expressions, which are ten times as many."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in node._fields:
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                waiting += [
                    child for child in inner if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
                ]


class _SourceText:
    """A file's text by syntax node. ``ast.get_source_segment`` would split the whole file again at every call."""

    def __init__(self, source: str) -> None:
        self._lines = source.encode().split(b"\n")  # ast counts columns in UTF-8 bytes

    def of(self, node: ast.stmt | ast.expr) -> str:
        assert node.end_lineno is not None and node.end_col_offset is not None
        lines = self._lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return b"\n".join(lines).decode()

    def ends_line_with_bracket(self, node: ast.stmt) -> bool:
        """Tell whether the node ends with a bracket and nothing follows it on its last line, not even a comment."""
        assert node.end_lineno is not None
        line = self._lines[node.end_lineno - 1]
        return line.endswith(b"]") and len(line) == node.end_col_offset


def _list_at_end(statement: ast.stmt) -> ast.List | None:
    """Return the outermost list display that ends exactly where the statement ends, or None."""
    end = (statement.end_lineno, statement.end_col_offset)
    for node in ast.walk(statement):  # breadth first: the outermost comes first
        if isinstance(node, ast.List) and (node.end_lineno, node.end_col_offset) == end:
            return node
    return None


def _read(text: _SourceText, statement: ast.stmt, node: ast.List, name: str) -> Literal | None:
    segment, inner = text.of(statement), text.of(node)
    if not segment.isascii():
        return None
    depth, last = 1, node
    while last.elts and isinstance(last.elts[-1], ast.List):
        depth, last = depth + 1, last.elts[-1]
    body = inner[: len(inner) - depth]
    if depth > MAX_DEPTH or inner[len(body) :] != "]" * depth or not body or body[-1] in " \n\t,[]":
        return None
    leaves = _leaves(text, node)
    if not leaves or "#" in inner:
        return None
    lines = (statement.lineno, statement.end_lineno or statement.lineno)
    return Literal(segment[: len(segment) - len(inner)], body, depth, len(leaves), tuple(leaves), name, lines)


def _leaves(text: _SourceText, node: ast.List) -> list[str]:
    """List the texts of the leaf elements; empty if any of them isn't a plain constant or name."""
    texts: list[str] = []
    for element in node.elts:
        if isinstance(element, ast.List):
            below = _leaves(text, element)
            if not below:
                return []
            texts += below
            continue
        operand = element.operand if isinstance(element, ast.UnaryOp) else element
        if not isinstance(operand, ast.Constant | ast.Name | ast.Attribute):
            return []
        leaf = text.of(element)
        if "\n" in leaf or "[" in leaf or "]" in leaf:
            return []
        texts.append(leaf)
    return texts
