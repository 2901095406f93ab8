"""The question which quote closes a string, asked of real library files cut before the closing quote."""

import ast
from functools import cache

import numpy as np

from ..models.tokenizer import Tokenizer
from . import held_out
from .held_out import Questions, Source
from .refused import Refused

__all__ = ["quote_questions"]

QUOTES = ("'", '"')
MOST_A_FILE = 4  # strings of each quote from one file, so that no file's style dominates
MOST_CHARS = 40_000  # longer files take long to parse and give no more prompts


def quote_questions(tokenizer: Tokenizer, prompts: int, seed: int) -> Questions:
    """Make prompts that are windows of held-out files and end with a string's last character, half with each quote.

    The strings are plain: on one line, not empty, without prefix, backslash or quotes inside, and not next to another
    string. The answers are the two quotes as tokens of their own. A model whose tokenizer merges the quote with what
    follows (``")``) would predict the merged token; it is then asked which of two less likely tokens it prefers.
    Prompts whose last token would merge with the quote itself are left out. In a file that uses only one kind of quote,
    an earlier string in the window tells the answer as well as the opening quote does.

    Raises:
        Refused: If the tokenizer splits a quote, or too few strings are found.
    """
    need = held_out.balanced(prompts, seed=seed)
    answers = (tokenizer.single(QUOTES[0]), tokenizer.single(QUOTES[1]))
    start = held_out.start_of(tokenizer)
    rng = np.random.default_rng([seed, 43])
    by_answer: list[list[tuple[list[int], int, bool]]] = [[], []]
    for number, source in held_out.shuffled_sources(rng, MOST_CHARS):
        if min(map(len, by_answer)) >= need:
            break
        lines, starts, strings = _strings(source)
        for label, quote in enumerate(QUOTES):
            ends = [end for end in strings if lines[end[0]][end[1]] == quote]
            for i in rng.permutation(len(ends))[:MOST_A_FILE]:
                tokens = int(rng.integers(held_out.SHORTEST, held_out.LONGEST + 1)) - len(start)
                row = held_out.window(lines, starts, ends[i], ends[i][0], tokenizer, tokens)
                if row and len(by_answer[label]) < need and held_out.goes_on(tokenizer, row, quote, answers[label]):
                    by_answer[label].append(([*start, *row], number, True))
    if min(map(len, by_answer)) < need:
        raise Refused(
            f"the held-out files gave {len(by_answer[0])} prompts of {QUOTES[0]} and {len(by_answer[1])} of "
            f"{QUOTES[1]}, and {need} of each are needed: ask for fewer prompts, or use a tokenizer that keeps quotes "
            "apart from the text before them"
        )
    return held_out.interleaved(by_answer, answers, prompts)


@cache
def _strings(source: Source) -> tuple[list[str], tuple[int, ...], list[tuple[int, int]]]:
    """Return a file's lines, the lines at which statements begin, and the places of plain strings' closing quotes."""
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
        # The parts of an f-string have positions too, but their text doesn't begin with a quote.
        whole = written[:1] in QUOTES and written[-1:] == written[:1] and inside == node.value
        if whole and inside and not any(sign in inside for sign in (*QUOTES, "\\")):
            ends.append((node.lineno - 1, node.end_col_offset - 1))
    return lines, held_out.statement_lines(tree), ends
