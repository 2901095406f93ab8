"""Prompts for the guard: real nested lists of held-out files, as they stand and lengthened with their own elements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import closers
from ...tasks.held_out import literals
from ...tasks.literals import Literal
from ...tasks.refused import Refused

__all__ = ["Prompts", "held_out_prompts", "lengthened"]


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, and where each comes from.

    Attributes:
        rows: Token ids of each prompt.
        real: bool (prompts,); False for a lengthened prompt.
        prompt: The number of the real prompt that it is or was made from, (prompts,).
        file: The number of the file that holds it, (prompts,).
        left_out: What was not asked, in sentences.
    """

    rows: list[list[int]]
    real: np.ndarray
    prompt: np.ndarray
    file: np.ndarray
    left_out: list[str]


def held_out_prompts(model: CircuitGPT, prompts: int, rng: np.random.Generator) -> Prompts:
    """Up to ``prompts`` distinct real lists of depth 2 that fit the context, and up to half as many lengthened ones.

    A lengthened prompt is a real prompt, drawn at random and made longer by a random amount up to the context. Half of
    them get more elements in the open row, so that n grows; the others get more closed rows, so that n and k grow.

    Raises:
        Refused: No nested list of the held-out files fits the model's context.
    """
    assert model.tokenizer is not None
    start, context = closers(model.tokenizer).start, model.config.block_size
    distinct = {literal.prompt: literal for literal in literals() if literal.depth == 2}
    encoded = [(literal, [*start, *model.tokenizer.encode(text)]) for text, literal in sorted(distinct.items())]
    fitting = [(literal, row) for literal, row in encoded if len(row) <= context]
    if not fitting:
        raise Refused(f"no nested list of the held-out files fits the model's context of {context} tokens")
    chosen = [fitting[i] for i in rng.permutation(len(fitting))[:prompts]]
    rows, origin = [row for _, row in chosen], list(range(len(chosen)))
    real = len(rows)
    for i in range(prompts // 2):
        base = int(rng.integers(len(chosen)))
        literal, row = chosen[base]
        target = int(rng.integers(len(row), context + 1))
        tokens_each = max(1, (len(row) - len(start)) // (1 + literal.elements))  # tokens of an element and its comma
        text = lengthened(literal, (target - len(row)) // tokens_each, whole_rows=bool(i % 2))
        longer = [*start, *model.tokenizer.encode(text)]
        if len(row) < len(longer) <= context:
            rows.append(longer)
            origin.append(base)
    names = sorted({literal.source for literal, _ in chosen})
    left_out = []
    if len(encoded) > len(fitting):
        left_out.append(f"{len(encoded) - len(fitting)} real nested lists don't fit the context of {context} tokens")
    if len(fitting) > len(chosen):
        left_out.append(f"{len(fitting) - len(chosen)} of {len(fitting)} real nested lists weren't drawn")
    return Prompts(
        rows,
        np.arange(len(rows)) < real,
        np.array(origin),
        np.array([names.index(chosen[i][0].source) for i in origin]),
        left_out,
    )


def lengthened(literal: Literal, elements: int, *, whole_rows: bool) -> str:
    """The prompt with ``elements`` more elements, copies of the list's own from the first on.

    They are added to the open row, or with ``whole_rows`` as closed rows before all others.
    """
    more = _cycled(literal.leaves, elements)
    if not more:
        return literal.prompt
    if not whole_rows:
        return f"{literal.prompt}, {', '.join(more)}"
    width = literal.body.rsplit("[", 1)[1].count(",") + 1
    inside = literal.body[1:].lstrip()
    blank = literal.body[
        1 : len(literal.body) - len(inside)
    ]  # what stands before the first element, such as a line break
    rows = [f"[{', '.join(more[i : i + width])}]" for i in range(0, len(more), width)]
    return literal.head + "[" + blank + "".join(f"{row},{blank or ' '}" for row in rows) + inside


def _cycled(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]
