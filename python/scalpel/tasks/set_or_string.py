"""The question whether a variable is a set or a string, asked after its name: ``.add(`` or `` +=``.

Real code has few such places. If more prompts are needed than numpy and scipy have, the statement that makes the
variable and the one that adds to it are put between the statements of other real files.
"""

import ast
import re
from functools import cache, lru_cache

import numpy as np

from ..models.tokenizer import Tokenizer
from . import held_out
from .held_out import Questions, Source
from .refused import Refused
from .source_files import Place, SourceFile, source_file

__all__ = ["real_share", "set_or_string_questions"]

ADD, APPEND = ".add(", " += "
LONGEST = 160  # tokens from the statement that makes the variable to the question, and a little before
MOST_CHARS = 40_000
MOST_BETWEEN = 8  # most statements between the two that are put in
_MAKES = re.compile(r"^[ ]*(\w+) = (set\(\)|''|\"\")$", re.MULTILINE)
_NAMES = ("seen", "found", "out", "names", "result", "done", "parts", "acc", "total", "keys", "buf", "todo", "s", "x")


def set_or_string_questions(tokenizer: Tokenizer, prompts: int, seed: int) -> Questions:
    """Make prompts that are windows of held-out files and end with a variable's name; half of the variables are sets.

    The variable was set to ``set()``, ``""`` or ``''``, and is added to for the first time, in the same function or
    module, by ``.add(`` or `` +=``. The answers are the first tokens of those two. Real places are used first, one for
    each variable. The rest are pairs of prompts put into windows of real files, which differ only in what the variable
    was set to. Prompts of one file form a group.

    Raises:
        Refused: If the two answers begin with the same token, or too few windows are found.
    """
    need = held_out.balanced(prompts, seed=seed)
    answers = (tokenizer.encode(ADD)[0], tokenizer.encode(APPEND)[0])
    if answers[0] == answers[1]:
        raise Refused(f"this tokenizer begins {ADD!r} and {APPEND!r} with the same token; they can't be told apart")
    start = held_out.start_of(tokenizer)
    rng = np.random.default_rng([seed, 45])
    by_answer: list[list[tuple[list[int], int, bool]]] = [[], []]
    uses = _uses()
    for i in rng.permutation(len(uses)):
        number, made, end, label = uses[i]
        lines, starts = _lines_and_starts(held_out.sources()[number])
        row = held_out.window(lines, starts, end, made, tokenizer, LONGEST - len(start))
        if row and len(by_answer[label]) < need and _asks(tokenizer, row, label, answers):
            by_answer[label].append(([*start, *row], number, True))
    for _ in range(3):  # at most three windows from each file
        for number, source in held_out.shuffled_sources(rng, MOST_CHARS):
            if min(map(len, by_answer)) >= need:
                break
            pair = _put_statements(_source_file(source), tokenizer, LONGEST - len(start), rng)
            if pair is None or not all(_asks(tokenizer, row, label, answers) for label, row in enumerate(pair)):
                continue
            for label, row in enumerate(pair):
                if len(by_answer[label]) < need:
                    by_answer[label].append(([*start, *row], number, False))
    if min(map(len, by_answer)) < need:
        raise Refused(
            f"the held-out files gave {len(by_answer[0])} prompts of a set and {len(by_answer[1])} of a string, and "
            f"{need} of each are needed: ask for fewer prompts, or use a tokenizer that keeps names apart from the "
            "text after them"
        )
    return held_out.interleaved(by_answer, answers, prompts)


def real_share(questions: Questions) -> dict[str, int]:
    """Count the prompts that are unchanged real code, by answer, and those into which the two statements were put."""
    real = np.array(questions.real)
    is_set = np.array(questions.labels) == 0
    return {
        "real sets": int((real & is_set).sum()),
        "real strings": int((real & ~is_set).sum()),
        "put in": int((~real).sum()),
    }


def _asks(tokenizer: Tokenizer, row: list[int], label: int, answers: tuple[int, int]) -> bool:
    return held_out.goes_on(tokenizer, row, (ADD, APPEND)[label], answers[label])


@lru_cache(maxsize=1)
def _uses() -> tuple[tuple[int, int, tuple[int, int], int], ...]:
    """List the real places: the file's number, the line that makes the variable, where its name ends, the answer."""
    uses: list[tuple[int, int, tuple[int, int], int]] = []
    for number, source in enumerate(held_out.sources()):
        made = {match[1] for match in _MAKES.finditer(source.text)}
        added = any(name + end in source.text for name in made for end in (ADD, APPEND))
        tree = held_out.parsed(source) if added else None  # parsing is what takes the time
        if tree is None:
            continue
        lines = source.text.split("\n")
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                uses += [(number, *use) for use in _uses_in(scope, lines)]
    return tuple(uses)


def _uses_in(
    scope: ast.FunctionDef | ast.AsyncFunctionDef | ast.Module, lines: list[str]
) -> list[tuple[int, tuple[int, int], int]]:
    """Find where each set or string that a scope makes is first added to, if it isn't assigned again before that."""
    made: dict[str, tuple[int, int]] = {}
    uses = []
    for name in sorted(_names_in(scope), key=lambda node: (node.lineno, node.col_offset)):
        end = (name.lineno - 1, name.end_col_offset or 0)
        after, kind = lines[end[0]][end[1] :], _MAKES.match(lines[end[0]])
        if isinstance(name.ctx, ast.Store) and kind and kind[1] == name.id:
            made[name.id] = (name.lineno - 1, 0 if kind[2] == "set()" else 1)
        elif name.id in made:
            line, label = made[name.id]
            adds = after.startswith((ADD, APPEND)[label])
            if adds:
                uses.append((line, end, label))
            if adds or isinstance(name.ctx, ast.Store):
                del made[name.id]
    return uses


def _names_in(scope: ast.AST) -> list[ast.Name]:
    """List the names in one scope, without those in functions and classes inside it."""
    names, stack = [], list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Name):
            names.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)
    return names


@cache
def _lines_and_starts(source: Source) -> tuple[list[str], tuple[int, ...]]:
    """Return a file's lines, and the lines at which statements begin."""
    tree = held_out.parsed(source)
    return source.text.split("\n"), () if tree is None else held_out.statement_lines(tree)


@cache
def _source_file(source: Source) -> SourceFile | None:
    return source_file(source.text)


def _put_statements(
    file: SourceFile | None, tokenizer: Tokenizer, tokens: int, rng: np.random.Generator, tries: int = 4
) -> tuple[list[int], list[int]] | None:
    """Return a window in which a set is made, and the same with a string; None if the file has no room for them."""
    if file is None or len(file.places) < 3:
        return None
    for _ in range(tries):
        i = int(rng.integers(len(file.places) - 1))
        block: list[Place] = []
        for later in file.places[i + 1 : i + 1 + MOST_BETWEEN]:
            if later.indent < file.places[i].indent:
                break
            block.append(later)
        if not block:
            continue
        made, used = file.places[i], block[int(rng.integers(len(block)))]
        begin = file.places[max(0, i - int(rng.integers(4)))].line
        above = "".join(f"{line}\n" for line in file.lines[begin : made.line])
        between = "".join(f"{line}\n" for line in file.lines[made.line : used.line])
        names = [name for name in _NAMES if not re.search(rf"\b{name}\b", above + between)]
        if not names:
            continue
        name, quotes = names[int(rng.integers(len(names)))], ("''", '""')[int(rng.integers(2))]
        blank, end = " " * made.indent, between + " " * used.indent + name
        texts = [f"{above}{blank}{name} = {value}\n{end}" for value in ("set()", quotes)]
        if max(map(len, texts)) <= 12 * tokens:
            rows = [tokenizer.encode(text) for text in texts]
            if max(map(len, rows)) <= tokens:
                return rows[0], rows[1]
    return None
