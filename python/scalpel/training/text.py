"""Training on text: batches of similar length, and a loss in which closing tokens count more.

The loss is a weighted cross-entropy of the next token, so only runs with the same ``closer_weight`` can be compared.
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
    """Texts of similar length. ``ids``, ``positions`` and ``mask`` are (batch, length); padding is on the right."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    longest: int  # elements of the longest list in the batch


def batches(recipe: Recipe, sources: Sources, tokenizer: Tokenizer, start: int = 0) -> Iterator[Batch]:
    """Yield batches from step ``start`` on.

    Texts are drawn in pools, each from its own random numbers, so any step can be reached without those before it. They
    are sorted by length within a pool, so that there is little padding. Each text begins at a random position, so that
    all rows of the position table are trained and a position says nothing about how much text came before.
    """
    begin = tokenizer.token_to_id(START)
    assert begin is not None
    pool = start // POOL_BATCHES
    skip = start % POOL_BATCHES
    while True:
        rng = np.random.default_rng([recipe.seed, pool])
        texts = list(islice(documents(sources, rng), recipe.batch * POOL_BATCHES))
        encoded = [([begin, *tokenizer.encode(text.text)][: recipe.block_size], text.elements) for text in texts]
        encoded.sort(key=lambda row: len(row[0]))
        for i in rng.permutation(POOL_BATCHES)[skip:]:
            rows = encoded[i * recipe.batch : (i + 1) * recipe.batch]
            yield batch_of(rows, recipe.block_size, np.random.default_rng([recipe.seed, pool, int(i)]))
        pool, skip = pool + 1, 0


def batch_of(rows: list[tuple[list[int], int]], block_size: int, rng: np.random.Generator) -> Batch:
    """Pad texts (ids, elements of the longest list) into a batch, each beginning at a random position."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device="cpu")
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[i, : len(row)] = True
    offset = torch.from_numpy(rng.integers(block_size - length + 1, size=(len(rows), 1)))
    return Batch(ids, offset + torch.arange(length, device="cpu"), mask, max(elements for _, elements in rows))


def loss_of(model: CircuitGPT, batch: Batch, token_weight: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of the next token over real tokens, in nats.

    ``token_weight`` (vocab,) weights the targets; without it all count the same.
    """
    logits = model(batch.ids, position_ids=batch.positions)[:, :-1]
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=token_weight)


def closer_weights(recipe: Recipe, tokenizer: Tokenizer) -> Tensor:
    """Return weights (vocab,) for the loss: ``recipe.closer_weight`` for tokens that close a list, 1 for the others."""
    weights = torch.ones(recipe.vocab_size, dtype=torch.float32, device="cpu")
    for text in CLOSERS:
        weights[tokenizer.single(text)] = recipe.closer_weight
    return weights


class TextCourse:
    """The course of bracket-mini: the generated statements of :mod:`scalpel.tasks.corpus`."""

    def __init__(self, recipe: Recipe, sources: Sources, tokenizer: Tokenizer) -> None:
        self.recipe, self.sources, self.tokenizer = recipe, sources, tokenizer
        self._weights = closer_weights(recipe, tokenizer)

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.recipe, self.sources, self.tokenizer, start)

    def loss(self, model: CircuitGPT, batch: Batch) -> Tensor:
        return loss_of(model, batch, self._weights)
