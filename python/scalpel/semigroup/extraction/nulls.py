"""Nulls of an extraction: how much conflict there would be if the classes meant nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from scipy.cluster.vq import kmeans2

from ...models.circuitgpt.recording import hook_width
from .learning import Candidate, Row
from .questions import ModelQuestions, Questions, Word, batches, pad

__all__ = ["random_nodes", "shuffled_labels"]

NODES = 16
REPEATS = 10


def shuffled_labels(
    questions: Questions, candidate: Candidate, prefixes: Mapping[int, Sequence[Word]], rng: Generator
) -> dict[str, Any]:
    """Measure conflict with classes randomly permuted among the prefixes: mean and minimum of some shuffles."""
    words = [word for own in prefixes.values() for word in own]
    labels = np.repeat(list(prefixes), [len(own) for own in prefixes.values()])
    after = _after(questions, candidate, words)
    rates = [_conflict(rng.permutation(labels), after, rng) for _ in range(REPEATS)]
    return {"mean": float(np.mean(rates)), "least": float(np.min(rates)), "repeats": REPEATS}


def random_nodes(
    questions: ModelQuestions, candidate: Candidate, prefixes: Mapping[int, Sequence[Word]], rng: Generator
) -> dict[str, Any]:
    """Measure conflict with classes computed from random nodes, as many classes as the machine has.

    The values of NODES nodes at the last token of each prefix, and after one more letter, are clustered by k-means. If
    conflict is low here, low conflict is no evidence, because any partition of the activations would show it.
    """
    words = [word for own in prefixes.values() for word in own]
    letters = range(len(questions.letters))
    following = [(*word, a) for a in letters for word in words]
    classes = max(2, sum(len(own) > 0 for own in prefixes.values()))
    every = _values(questions, [*words, *following], [_draw(questions, rng) for _ in range(REPEATS)])
    rates = []
    for values in every:
        spread = values.std(0)
        labels = np.zeros(len(values), dtype=int)
        if spread.any():
            scaled = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
            labels = kmeans2(scaled, classes, minit="++", rng=rng, missing="warn")[1]
        own, after = labels[: len(words)], labels[len(words) :].reshape(len(letters), -1)
        rates.append(_conflict(own, [list(row) for row in after], rng))
    return {"mean": float(np.mean(rates)), "least": float(np.min(rates)), "repeats": REPEATS, "nodes": NODES}


def _after(questions: Questions, candidate: Candidate, words: Sequence[Word]) -> list[list[Row]]:
    return [candidate.rows(questions, [(*word, a) for word in words]) for a in range(len(questions.letters))]


def _conflict(labels: np.ndarray, after: Sequence[Sequence[Any]], rng: Generator) -> float:
    """Compute the mean, over classes and letters, of the share of disjoint pairs in a class whose successors differ."""
    shares = []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        pairs = list(zip(own[::2], own[1::2], strict=False))
        if pairs:
            shares += [float(np.mean([row[i] != row[j] for i, j in pairs])) for row in after]
    return float(np.mean(shares)) if shares else float("nan")


def _draw(questions: ModelQuestions, rng: Generator) -> list[tuple[str, int]]:
    model = questions.model
    hooks = [name for name in model.hook_names if name != model.hook_names[0]]
    return [
        (name, int(rng.integers(hook_width(model, name))))
        for name in (hooks[int(rng.integers(len(hooks)))] for _ in range(NODES))
    ]


@torch.no_grad()
def _values(
    questions: ModelQuestions, words: Sequence[Word], draws: Sequence[Sequence[tuple[str, int]]]
) -> list[np.ndarray]:
    """Record the nodes of each draw (words, nodes) at the last token of each word, without the suffix, in one pass."""
    rows = [questions.ids(word, suffix=False) for word in words]
    recorded = [np.empty((len(rows), len(nodes))) for nodes in draws]
    hooks = list(dict.fromkeys(name for nodes in draws for name, _ in nodes))
    for batch in batches([len(row) for row in rows]):
        ids, last = pad([rows[i] for i in batch])
        at = torch.arange(len(batch), device="cpu")
        _, cache = questions.model.run_with_cache(ids, names=hooks)
        ends = {name: value[at, last] for name, value in cache.items()}
        for values, nodes in zip(recorded, draws, strict=True):
            for column, (name, channel) in enumerate(nodes):
                values[batch, column] = ends[name][:, channel].cpu().numpy()
    return recorded
