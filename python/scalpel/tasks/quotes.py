"""Which quote closes the string? Single-line strings of real library files, cut before their closing quote."""

import ast
from functools import cache

import numpy as np

from ..models.tokenizer import Tokenizer
from . import held_out
from .held_out import Questions, Source
from .refused import Refused

__all__ = ["quote_questions"]

QUOTES = ("'", '"')
MOST_A_FILE = 4  # strings of each quote from one file, so that no file's style rules
MOST_CHARS = 40_000  # files longer than that take long to parse and give no more prompts


def quote_questions(tokenizer: Tokenizer, prompts: int, seed: int) -> Questions:
    """``prompts`` windows of held-out files that end with a string's last character, half with either quote.

    The strings are plain: on one line, without prefix, backslash or any quote inside, not empty, not beside another
    string. Asked is the quote as a token of its own against the other one. A tokenizer that merges the quote with
    what follows (``")``) would say the merged token; the question then is which of two less likely tokens comes
    first. Prompts whose last token would merge with the quote itself are left out. Where a file uses one quote only,
    an earlier string in the window tells the answer as well as the opening quote does.

    Refused where the tokenizer splits a quote, or too few strings are found.
    """
    need = held_out.balanced(prompts, seed=seed)
    answers = (tokenizer.single(QUOTES[0]), tokenizer.single(QUOTES[1]))
    start = held_out.start_of(tokenizer)
    rng = np.random.default_rng([seed, 43])
    found: list[list[tuple[list[int], int, bool]]] = [[], []]
    for number, source in held_out.shuffled_sources(rng, MOST_CHARS):
        if min(map(len, found)) >= need:
            break
        lines, starts, strings = _strings(source)
        for label, quote in enumerate(QUOTES):
            ends = [end for end in strings if lines[end[0]][end[1]] == quote]
            for i in rng.permutation(len(ends))[:MOST_A_FILE]:
                tokens = int(rng.integers(held_out.SHORTEST, held_out.LONGEST + 1)) - len(start)
                row = held_out.window(lines, starts, ends[i], ends[i][0], tokenizer, tokens)
                if row and len(found[label]) < need and held_out.goes_on(tokenizer, row, quote, answers[label]):
                    found[label].append(([*start, *row], number, True))
    if min(map(len, found)) < need:
        raise Refused(
            f"the held-out files gave {len(found[0])} prompts of {QUOTES[0]} and {len(found[1])} of {QUOTES[1]}, and "
            f"{need} of each are asked; ask for fewer, or the tokenizer merges quotes with what stands before them"
        )
    return held_out.interleaved(found, answers, prompts)


@cache
def _strings(source: Source) -> tuple[list[str], tuple[int, ...], list[tuple[int, int]]]:
    """A file's lines, the lines of its statements, and where the closing quote of each plain string stands."""
    tree = held_out.parsed(source)
    if tree is None:
        return [], (), []
    lines, ends = source.text.split("\n"), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node.end_col_offset is None:
            continue
        if node.lineno != node.end_lineno or node.lineno > len(lines):
            continue
        written = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
        inside = written[1:-1]
        # Parts of f-strings have positions of their own that are no string's; their text begins with no quote.
        whole = written[:1] in QUOTES and written[-1:] == written[:1] and inside == node.value
        if whole and inside and not any(sign in inside for sign in (*QUOTES, "\\")):
            ends.append((node.lineno - 1, node.end_col_offset - 1))
    return lines, held_out.statement_lines(tree), ends
