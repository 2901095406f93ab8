"""How well a model does a task with only some of its nodes, or without them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from numpy.random import Generator
from torch import Tensor

from ..models.circuitgpt.ablation import Ablation, _parse
from ..models.circuitgpt.model import CircuitGPT
from .ablations import Substitute, masked, nodes_at
from .fit import Fit, refit
from .result import Measured
from .task import Task, answer_logits

__all__ = ["fit_of", "measure", "only", "random_nodes_like"]


def measure(
    model: CircuitGPT,
    nodes: Sequence[str],
    stand_in: Substitute,
    task: Task,
    *,
    removed: bool = False,
    seed: int = 0,
) -> Measured:
    """Measure refitted loss and accuracy with only ``nodes`` kept, or with only them deleted.

    ``seed`` makes values that are drawn the same for every circuit.
    """
    fit = fit_of(model, nodes, stand_in.again(seed), task, removed=removed)
    return Measured(fit.loss, fit.accuracy)


@torch.no_grad()
def fit_of(model: CircuitGPT, nodes: Sequence[str], stand_in: Substitute, task: Task, *, removed: bool = False) -> Fit:
    """Measure as `measure` does, and return the scale and shifts as well."""
    with only(model, nodes, stand_in, removed=removed):
        return refit(answer_logits(model, task), task.labels)


def only(
    model: CircuitGPT, nodes: Iterable[str], stand_in: Substitute, *, removed: bool = False
) -> AbstractContextManager[CircuitGPT]:
    """Return a context in which only ``nodes`` of the model are kept, or in which only they are deleted."""
    named = _parse(model, nodes)
    masks: dict[str, Tensor] = {}
    for name, width in nodes_at(model).items():
        kept = named.get(name, torch.zeros(width, dtype=torch.bool, device="cpu"))
        masks[name] = ~kept if removed else kept
    return Ablation(model, masked(masks, stand_in))


def random_nodes_like(model: CircuitGPT, nodes: Iterable[str], rng: Generator) -> list[str]:
    """Draw as many nodes at every hook as there are among ``nodes``."""
    counts = Counter(node.rpartition(":")[0] for node in nodes)
    return [
        f"{name}:{channel}"
        for name, width in nodes_at(model).items()
        for channel in rng.permutation(width)[: counts[name]]
    ]
