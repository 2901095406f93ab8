r"""Bracket counting: after a list's last element, does one bracket close it, or do two?

A question stands right after an element, where the next token should be ``]\n`` (depth 1) or ``]]\n`` (depth 2).
A context is measured by n, the number of keys that the answer may attend to: every token of the prompt, including the
start token and the statement's head. Because the model is causal, one pass over a long list asks the question after
each of its elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from .literals import Literal
from .refused import Refused

START = "<s>"
ONE, TWO = "]\n", "]]\n"
FILLERS = tuple("0123456789") + tuple("abcdefghijklmnopqrstuvwxyz")
HEADS = ("x", "y", "rows", "data", "values", "a", "expected", "names", "self.args", "list_", "foo", "types")


@dataclass(frozen=True)
class Closers:
    """Ids of the two answers, and of the start token if the vocabulary has one."""

    one: int
    two: int
    start: tuple[int, ...]


def closers(tokenizer: Tokenizer) -> Closers:
    """Look up the tokens that close a list.

    Raises:
        Refused: If the tokenizer splits an answer, so that no next-token question can be asked.
    """
    try:
        one, two = tokenizer.single(ONE), tokenizer.single(TWO)
    except ValueError as error:
        raise Refused(f"this tokenizer splits an answer of the bracket task: {error}") from error
    vocabulary = tokenizer.inner.get_vocab()
    return Closers(one, two, (vocabulary[START],) if START in vocabulary else ())


@dataclass(frozen=True)
class LongLists:
    """Long lists that all hold the same evidence, with a question after each element.

    Attributes:
        k: How many "[" stand in front of every question.
        depth: How many of them are open.
        ids: (prompts, length).
        positions: (prompts, length).
        asked: (prompts, questions), the index of each question's last token, so that n = asked + 1.
    """

    k: int
    depth: int
    ids: Tensor
    positions: Tensor
    asked: Tensor

    @property
    def n(self) -> Tensor:
        """The number of attended keys at each question, (prompts, questions)."""
        return self.asked + 1


def long_lists(
    tokenizer: Tokenizer, k: int, length: int, count: int, *, block_size: int, depth: int = 2, seed: int = 0
) -> LongLists:
    """Make ``count`` lists of ``length`` tokens that vary in filler, head and position.

    At depth 2, k - 2 closed rows of one element stand before the open row; at depth 1, k is 1. Each element is one
    token and its comma another. The first position is drawn at random from those at which the list fits.

    Raises:
        Refused: If the context is too short, or the tokenizer merges elements with their commas.
        ValueError: If ``k`` and ``depth`` don't fit together.
    """
    if depth not in (1, 2) or k < depth or (depth == 1 and k != 1):
        raise ValueError(f"k = {k} at depth {depth}; k is 1 at depth 1, and 2 or more at depth 2")
    if length > block_size:
        raise Refused(f"length {length} is more than the context holds ({block_size})")
    rng = np.random.default_rng([seed, k, depth])
    start = closers(tokenizer).start
    fillers = [f for f in FILLERS if len(tokenizer.encode(f)) == 1]
    rows, asked = [], []
    for _ in range(count):
        # Half of the lists repeat one element, and half mix several: the elements must not matter.
        pool = rng.choice(fillers, size=1 if rng.random() < 0.5 else 8)
        head = f"{HEADS[rng.integers(len(HEADS))]} = " + "[" * (depth - 1)
        head += "".join(f"[{row}], " for row in rng.choice(pool, size=k - depth)) + "["
        prefix = [*start, *tokenizer.encode(head)]
        if len(prefix) >= length:
            raise Refused(
                f"k = {k}: the rows in front of the question take {len(prefix)} tokens, and lists of "
                f"{length} were asked for; give a smaller k or a greater length"
            )
        body = tokenizer.encode(", ".join(rng.choice(pool, size=length)))
        row = [*prefix, *body][:length]
        if len(row) < length or tokenizer.encode(", ".join(pool[:1].repeat(3)))[1::2] != body[1:5:2]:
            raise Refused("this tokenizer doesn't give an element and its comma a token each")
        rows.append(row)
        asked.append(torch.arange(len(prefix), length, 2, device="cpu"))
    questions = min(map(len, asked))
    offset = torch.from_numpy(rng.integers(block_size - length + 1, size=(count, 1)))
    return LongLists(
        k,
        depth,
        torch.tensor(rows, dtype=torch.int64, device="cpu"),
        offset + torch.arange(length, device="cpu"),
        torch.stack([indices[:questions] for indices in asked]),
    )


@torch.no_grad()
def preference(model: CircuitGPT, lists: LongLists, batch: int = 8) -> Tensor:
    r"""Return logit("]]\n") - logit("]\n") at each question, float32 (prompts, questions); positive means depth 2."""
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    differences = []
    for i in range(0, len(lists.ids), batch):
        part = slice(i, i + batch)
        logits = model(lists.ids[part], position_ids=lists.positions[part])
        difference = (logits[..., ids.two] - logits[..., ids.one]).cpu()
        differences.append(difference.gather(1, lists.asked[part]))
    return torch.cat(differences).float()


@dataclass(frozen=True)
class Answers:
    """How a model answered single prompts: ``right`` is bool (prompts,), and ``preference`` the logit difference."""

    right: np.ndarray
    preference: np.ndarray
    depth: np.ndarray
    tokens: np.ndarray
    skipped_too_long: int

    def accuracy(self, depth: int | None = None) -> float:
        """Return the share of right answers, at one depth or overall; NaN if there are no prompts."""
        chosen = self.right if depth is None else self.right[self.depth == depth]
        return float(chosen.mean()) if chosen.size else float("nan")


def answer(model: CircuitGPT, prompts: Sequence[tuple[str, int]], max_tokens: int, batch: int = 32) -> Answers:
    """Ask single prompts, each a text and its depth (1 or 2).

    Prompts of more than ``max_tokens`` tokens are counted and left out.

    Raises:
        Refused: If the model has no tokenizer, its tokenizer splits an answer, or its context is shorter than
            ``max_tokens``.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer, and the prompts are text: set model.tokenizer")
    if max_tokens > model.config.block_size:
        raise Refused(f"prompts have up to {max_tokens} tokens; the context holds {model.config.block_size}")
    ids = closers(model.tokenizer)
    encoded = [([*ids.start, *model.tokenizer.encode(text)], depth) for text, depth in prompts]
    kept = sorted((pair for pair in encoded if len(pair[0]) <= max_tokens), key=lambda pair: len(pair[0]))
    differences = [_ask(model, [row for row, _ in kept[i : i + batch]], ids) for i in range(0, len(kept), batch)]
    difference = np.concatenate(differences) if differences else np.zeros(0)
    depth = np.array([d for _, d in kept], dtype=int)
    return Answers(
        right=(difference > 0) == (depth == 2),
        preference=difference,
        depth=depth,
        tokens=np.array([len(row) for row, _ in kept], dtype=int),
        skipped_too_long=len(encoded) - len(kept),
    )


@torch.no_grad()
def _ask(model: CircuitGPT, rows: list[list[int]], ids: Closers) -> np.ndarray:
    length = max(map(len, rows))
    padded = torch.zeros(len(rows), length, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device="cpu")
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[i, : len(row)] = True
    logits = model(padded, attention_mask=mask)[torch.arange(len(rows), device="cpu"), mask.sum(1) - 1]
    return (logits[:, ids.two] - logits[:, ids.one]).double().cpu().numpy()


def questions_from(literals: Sequence[Literal]) -> list[tuple[str, int]]:
    """List the distinct prompts of depth 1 and 2, each with its depth as the answer."""
    return sorted({(literal.prompt, literal.depth) for literal in literals if literal.depth in (1, 2)})
