"""Logits, ranks and first choices of rows of the residual stream, some rows at a time.

The logits of all layers and tokens of a text would be gigabytes; only the likeliest tokens and the ranks of a few are
kept. A rank counts from 1: the token of rank 1 has the largest logit, and of equal logits the lower id comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...jacobians.precision import without_gradients
from ...topk import topk_indices
from .head import Head

__all__ = ["Scores", "of_logits", "score"]

_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class Scores:
    """What is kept of the logits of rows; all tensors are on the CPU.

    Attributes:
        tokens: (rows, k), int64: the likeliest tokens, the first one first.
        logits: (rows, k): their logits.
        probabilities: (rows, k): their probabilities, among the whole vocabulary.
        ranks: (rows, watched), int64: the ranks of the tokens that were asked for, from 1; 0 where none was.
        watched: (rows, watched): the logits of these; NaN where none was asked for.
    """

    tokens: Tensor
    logits: Tensor
    probabilities: Tensor
    ranks: Tensor
    watched: Tensor

    def shaped(self, *shape: int) -> Scores:
        """The same with the rows in another shape."""
        return Scores(*(part.reshape(*shape, part.shape[-1]) for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.logits, self.probabilities, self.ranks, self.watched

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        """The rows of all, one after the other."""
        return cls(*(torch.cat(each) for each in zip(*(part._parts() for part in parts), strict=True)))


def score(head: Head, x: Tensor, ids: Tensor | None, k: int, watch: Tensor | None = None) -> Scores:
    """Score rows of the residual stream after the last layer.

    Args:
        head: The model's last stage.
        x: (rows, width).
        ids: (rows,), the tokens at these places, or None.
        k: How many tokens to keep of each row, at least 0; no more than the vocabulary has.
        watch: (rows, watched), int64: tokens whose ranks are wanted; -1 for none.

    Raises:
        ValueError: A token is outside the vocabulary.
    """
    watch = torch.zeros(len(x), 0, dtype=torch.int64, device="cpu") if watch is None else watch
    parts: list[Scores] = []
    first, rows = 0, _rows_at_once(head.vocabulary)
    with without_gradients():
        while first < len(x):
            chunk = slice(first, first + rows)
            logits = head.logits(x[chunk], None if ids is None else ids[chunk])
            parts.append(_of_logits(logits, k, watch[chunk]))
            head.vocabulary = logits.shape[1]
            first, rows = first + rows, _rows_at_once(head.vocabulary)
    return Scores.joined(parts)


def of_logits(logits: Tensor, k: int, watch: Tensor | None = None) -> Scores:
    """Score logits (rows, vocab) that are known already, as :func:`score` does."""
    watch = torch.zeros(len(logits), 0, dtype=torch.int64, device="cpu") if watch is None else watch
    rows = _rows_at_once(logits.shape[1])
    pairs = zip(logits.split(rows), watch.split(rows), strict=True)
    return Scores.joined([_of_logits(some, k, wanted) for some, wanted in pairs])


def _rows_at_once(vocabulary: int | None) -> int:
    """How many rows are scored together; one where the size of the vocabulary isn't known yet."""
    return 1 if vocabulary is None else max(1, _LOGITS_AT_ONCE // vocabulary)


def _of_logits(logits: Tensor, k: int, watch: Tensor) -> Scores:
    vocabulary = logits.shape[1]
    wrong = watch[(watch >= vocabulary) | (watch < -1)]
    if len(wrong):
        raise ValueError(f"token {int(wrong[0])} is outside the vocabulary, whose ids are 0 to {vocabulary - 1}")
    tokens = topk_indices(logits, min(k, vocabulary), by="value")
    best = logits.gather(1, tokens)
    order = best.argsort(dim=1, descending=True, stable=True)  # tokens ascend, so equals stay in the order of their ids
    tokens, best = tokens.gather(1, order), best.gather(1, order)
    probabilities = (best - logits.logsumexp(dim=1, keepdim=True)).exp() if k else best
    ranks = torch.zeros(watch.shape, dtype=torch.int64, device=logits.device)
    watched = torch.full(watch.shape, torch.nan, dtype=logits.dtype, device=logits.device)
    numbers = torch.arange(vocabulary, device=logits.device)
    for column, wanted in enumerate(watch.to(logits.device).unbind(1)):
        asked = (wanted >= 0).nonzero()[:, 0]
        if len(asked):
            token = wanted[asked, None]
            some = logits if len(asked) == len(logits) else logits[asked]
            value = some.gather(1, token)
            found = 1 + (some > value).sum(1)
            equal = some == value
            if int(equal.sum()) > len(asked):  # ties, of which the lower ids come first
                found += (equal & (numbers < token)).sum(1)
            ranks[asked, column] = found
            watched[asked, column] = value[:, 0]
    return Scores(tokens.cpu(), best.cpu(), probabilities.cpu(), ranks.cpu(), watched.cpu())
