"""Bracket prompts in which one thing varies at a time: open brackets, brackets in total, their place, or length."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizer import Tokenizer
from .brackets import FILLERS, HEADS, closers
from .refused import Refused

__all__ = ["PLACES", "Evidence", "evidence_lists"]

PLACES = ("early", "late")


@dataclass(frozen=True)
class Evidence:
    """Prompts of the same kind and length, each ending after an element, where the question is asked.

    Attributes:
        ids: (prompts, n).
        positions: (prompts, n).
        filler: (prompts, n) bool, True at elements and commas, which say nothing about the depth.
        open: How many brackets are open.
        closed: How many are closed.
        place: "early" or "late", where the last bracket is.
    """

    ids: Tensor
    positions: Tensor
    filler: Tensor
    open: int
    closed: int
    place: str

    @property
    def n(self) -> int:
        """The number of attended keys at the question."""
        return self.ids.shape[1]

    @property
    def depth(self) -> int:
        return self.open


def evidence_lists(
    tokenizer: Tokenizer, n: int, count: int, *, opened: int, closed: int, place: str, block_size: int, seed: int = 0
) -> Evidence:
    """Make ``count`` lists of exactly ``n`` tokens with ``opened`` (1 or 2) brackets open and ``closed`` rows closed.

    At depth 2 the open row comes last; at depth 1 bare elements follow the closed rows, as in the training text.
    ``place="early"`` puts one element into each closed row and the rest after the last bracket; ``"late"`` puts all
    but three elements into the closed rows, so that the same tokens come in another order. Without a closed row the two
    are the same.

    Raises:
        Refused: If ``n`` leaves no room, is longer than the context, or the tokenizer merges elements with commas.
        ValueError: If an option is not one of those above.
    """
    if opened not in (1, 2) or closed < 0 or place not in PLACES:
        raise ValueError(f"opened is {opened}, closed {closed}, place {place!r}; 1 or 2, 0 or more, early or late")
    if n > block_size:
        raise Refused(f"n is {n}; the context holds {block_size}")
    rng = np.random.default_rng([seed, n, opened, closed, PLACES.index(place)])
    start = list(closers(tokenizer).start)
    bracket, end, comma = (tokenizer.encode(text) for text in ("[", "], ", ", "))
    fillers = [tokenizer.encode(text)[0] for text in FILLERS if len(tokenizer.encode(text)) == 1]
    if not fillers or len(comma) != 1:
        raise Refused("this tokenizer doesn't give an element and its comma a token each")
    rows, masks = [], []
    for _ in range(count):
        pool = rng.choice(fillers, size=1 if rng.random() < 0.5 else 8)
        head = tokenizer.encode(f"{HEADS[rng.integers(len(HEADS))]} = ")
        # A row of e elements has 2e - 1 tokens. What is left over goes into a longer name, so that n is exact.
        room = n - len(start) - len(head) - len(bracket) * (closed + opened) - closed * len(end)
        elements = (room + closed + 1) // 2
        if elements < closed + 1:
            raise Refused(f"n = {n} leaves no room for {closed} closed rows and an element after them")
        spare = room - (2 * elements - closed - 1)
        late = place == "late" and closed > 0
        last = min(3, elements - closed) if late else elements - closed
        in_rows = [len(part) for part in np.array_split(np.arange(elements - last), closed)] if closed else []
        pieces = [(start, False), (tokenizer.encode("x")[:1] * spare, False), (head, False), (bracket, False)]
        for row_length in in_rows:
            pieces += [(bracket, False), (_row(pool, row_length, comma, rng), True), (end, False)]
        pieces += [(bracket * (opened - 1), False), (_row(pool, last, comma, rng), True)]
        rows.append([token for tokens, _ in pieces for token in tokens])
        masks.append([is_filler for tokens, is_filler in pieces for _ in tokens])
    ids = torch.tensor(rows, dtype=torch.int64, device="cpu")
    offset = torch.from_numpy(rng.integers(block_size - n + 1, size=(count, 1)))
    return Evidence(
        ids,
        offset + torch.arange(ids.shape[1], device="cpu"),
        torch.tensor(masks, dtype=torch.bool, device="cpu"),
        opened,
        closed,
        place,
    )


def _row(pool: np.ndarray, count: int, comma: list[int], rng: np.random.Generator) -> list[int]:
    """Draw ``count`` elements, with a comma between any two."""
    row: list[int] = []
    for i, element in enumerate(rng.choice(pool, size=count)):
        row += [*(comma if i else []), int(element)]
    return row
