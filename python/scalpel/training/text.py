"""Training on text: batches of like length, and the loss of the next token, closing tokens counting more.

The loss is no plain cross-entropy a token, and comparable between runs of one ``closer_weight`` only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.corpus import Sources, documents
from .recipe import Recipe
from .tokenizer import CLOSERS, START

POOL_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Texts of like length. ``ids``, ``positions`` and ``mask`` are (batch, length); padding is on the right."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    longest: int  # most elements of a list in the batch


def batches(recipe: Recipe, sources: Sources, tokenizer: Tokenizer, start: int = 0) -> Iterator[Batch]:
    """Batches from step ``start`` on.

    Texts are drawn a pool at a time from (seed, pool), so any step can be reached without the ones before it, and
    sorted by length within the pool, so that little is padding. Each text begins at a random position: all rows of
    the position table are trained, and position says nothing about how much came before.
    """
    begin = tokenizer.token_to_id(START)
    assert begin is not None
    pool = start // POOL_BATCHES
    skip = start % POOL_BATCHES
    while True:
        rng = np.random.default_rng([recipe.seed, pool])
        texts = list(islice(documents(sources, rng), recipe.batch * POOL_BATCHES))
        encoded = [([begin, *tokenizer.encode(d.text)][: recipe.block_size], d.elements) for d in texts]
        encoded.sort(key=lambda e: len(e[0]))
        for i in rng.permutation(POOL_BATCHES)[skip:]:
            rows = encoded[i * recipe.batch : (i + 1) * recipe.batch]
            yield batch_of(rows, recipe.block_size, np.random.default_rng([recipe.seed, pool, int(i)]))
        pool, skip = pool + 1, 0


def batch_of(rows: list[tuple[list[int], int]], block_size: int, rng: np.random.Generator) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device="cpu")
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[i, : len(row)] = True
    offset = torch.from_numpy(rng.integers(block_size - length + 1, size=(len(rows), 1)))
    return Batch(ids, offset + torch.arange(length, device="cpu"), mask, max(n for _, n in rows))


def loss_of(model: CircuitGPT, batch: Batch, token_weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token over real tokens, in nats; ``token_weight`` (vocab,) weights targets."""
    logits = model(batch.ids, position_ids=batch.positions)[:, :-1]
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=token_weight)


def closer_weights(recipe: Recipe, tokenizer: Tokenizer) -> Tensor:
    """Weights (vocab,) of the loss: ``recipe.closer_weight`` at the tokens that close a list, else 1."""
    weights = torch.ones(recipe.vocab_size, dtype=torch.float32, device="cpu")
    for text in CLOSERS:
        weights[tokenizer.single(text)] = recipe.closer_weight
    return weights


class TextCourse:
    """The course of bracket-mini: generated statements, see :mod:`scalpel.tasks.corpus`."""

    def __init__(self, recipe: Recipe, sources: Sources, tokenizer: Tokenizer) -> None:
        self.recipe, self.sources, self.tokenizer = recipe, sources, tokenizer
        self._weights = closer_weights(recipe, tokenizer)

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.recipe, self.sources, self.tokenizer, start)

    def loss(self, model: CircuitGPT, batch: Batch) -> Tensor:
        return loss_of(model, batch, self._weights)
