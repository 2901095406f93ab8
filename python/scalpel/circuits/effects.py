"""Measure what the ablation of each node does to the answers, in batched passes that can be resumed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._resume import WayOut, Work
from ..hooks.standing import stood_for
from ..models.circuitgpt.model import CircuitGPT
from ..models.circuitgpt.recording import check_hooks, hook_width
from ..models.fingerprint import identity
from .ablations import Substitute, digest, substitute
from .packing import pack
from .tail import Tail
from .task import Task, answer_logits

__all__ = ["Effects", "ablation_effects"]

# The most elements in the widest value of a batch of variants: 16 MiB of float32, which still fit into a large cache.
_ELEMENTS = 1 << 22
_PREFIXES = 128  # in a pack; the memory that attention needs grows with their square


@dataclass(frozen=True)
class Effects:
    """The logits of the answers with each node ablated.

    Attributes:
        hooks: For each hook, the logits with each of its channels ablated, (width, prompts, answers), in the model's
            dtype.
        base: The logits without ablation, (prompts, answers).
        labels: The right answers of the task, (prompts,).
        groups: The groups of the task, (prompts,).

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> task = scalpel.circuits.bracket_counting(model, prompts=8, seed=0)
        >>> effects = scalpel.circuits.ablation_effects(model, task, hooks=["1.attn.v"])
        >>> effects.loss_change()["1.attn.v"].shape, effects.standard_error()["1.attn.v"].shape
        ((128,), (128,))
        >>> effects.largest(1)[0][0]
        '1.attn.v:71'
    """

    hooks: dict[str, np.ndarray]
    base: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def loss_change(self) -> dict[str, np.ndarray]:
        """Compute by how many nats each ablation raises the cross-entropy of the answers, averaged over prompts.

        Returns:
            For each hook a float64 array (width,).
        """
        before = _losses(self.base[None], self.labels)
        return {hook: (_losses(after, self.labels) - before).mean(1) for hook, after in self.hooks.items()}

    def standard_error(self) -> dict[str, np.ndarray]:
        """Compute the standard error of `loss_change` over groups of prompts.

        Returns:
            For each hook a float64 array (width,), NaN if there is only one group.
        """
        before = _losses(self.base[None], self.labels)
        numbers, group = np.unique(self.groups, return_inverse=True)
        count = len(numbers)
        if count < 2:
            return {hook: np.full(len(after), np.nan) for hook, after in self.hooks.items()}
        errors = {}
        for hook, after in self.hooks.items():
            change = _losses(after, self.labels) - before
            # Write the mean over prompts as a sum over groups, so that groups of unequal size have the same weights.
            sums = np.zeros((len(change), count))
            np.add.at(sums.T, group, (change - change.mean(1, keepdims=True)).T)
            errors[hook] = (sums**2).sum(1) ** 0.5 / len(self.labels) * (count / (count - 1)) ** 0.5
        return errors

    def largest(self, count: int = 20) -> list[tuple[str, float, float]]:
        """List the nodes whose ablation changes the loss most.

        Args:
            count: How many nodes to list.

        Returns:
            For each node its name, the rise of the loss in nats, and its standard error.
        """
        errors = self.standard_error()
        every = [
            (f"{hook}:{channel}", float(value), float(errors[hook][channel]))
            for hook, values in self.loss_change().items()
            for channel, value in enumerate(values)
        ]
        return sorted(every, key=lambda effect: -abs(effect[1]))[:count]


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute cross-entropies (nodes, prompts) of logits (nodes, prompts, answers)."""
    wide = torch.from_numpy(logits).double()
    right = torch.from_numpy(labels).expand(wide.shape[:-1])
    return F.cross_entropy(wide.movedim(-1, 1), right, reduction="none").numpy()


@torch.no_grad()
def ablation_effects(
    model: CircuitGPT,
    task: Task,
    *,
    kind: str = "mean",
    reference: Any = None,
    hooks: Iterable[str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Effects:
    """Compute the answers' logits with each node replaced at all tokens, one node at a time.

    The result is that of ``with model.ablate([node], kind, reference=...)`` for every node, without a pass for each:
    see :mod:`.tail`. For "resample", values are drawn once for each different prefix of the prompts, the same for all
    nodes; ``model.ablate`` draws others.

    Args:
        model: The model.
        task: The prompts and answers.
        kind: What replaces a node, "mean", "zero" or "resample", as in ``model.ablate``.
        reference: The prompts for means and samples. None uses the means that came with the model, else the task's
            prompts.
        hooks: The hooks whose nodes are ablated; None means all.
        folder: A folder that keeps finished hooks, so that a call that was stopped continues from there.
        seed: The seed of the draws.
        progress: A function that is called with the name of each hook and the fraction done.

    Returns:
        The logits, and what follows from them.

    Raises:
        ValueError: If there is no such hook or kind, or the folder belongs to another model or task.
        Refused: If an answer is not in the vocabulary, or a logit is not finite.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> task = scalpel.circuits.bracket_counting(model, prompts=8, seed=0)
        >>> effects = scalpel.circuits.ablation_effects(model, task, hooks=["1.attn.v"])
        >>> effects.hooks["1.attn.v"].shape
        (128, 8, 2)
    """
    model = stood_for(model)
    names = model.hook_names if hooks is None else [hooks] if isinstance(hooks, str) else list(hooks)
    check_hooks(model, names)
    if reference is None and not (kind == "mean" and "hook_means" in model.card):
        reference = (task.ids, task.mask)
    stand_in = substitute(model, kind, reference, list(names), seed)
    tails = [Tail(model, prompts, task.answers) for prompts in pack(task, _PREFIXES)]
    answer_logits(model, task)  # refuses answers outside the vocabulary, and logits that are not finite
    base = torch.empty(len(task), len(task.answers), dtype=model.dtype, device="cpu")
    for tail in tails:
        base[tail.prompts.rows] = tail.logits.cpu()
    key = {"model": identity(model), "task": task.digest(), "values": digest(stand_in), "seed": seed}
    finished = _FinishedHooks(folder, key, names)
    report = progress or (lambda what, done: None)
    by_hook, widths = {}, [hook_width(model, name) for name in names]
    for i, name in enumerate(names):
        report(name, sum(widths[:i]) / sum(widths))
        stored = finished.load(name)
        if stored is None:
            stored = _hook(name, hook_width(model, name), tails, stand_in, base, seed)
            finished.store(name, stored)
        by_hook[name] = stored
    report("done", 1.0)
    return Effects(by_hook, base.numpy(), task.labels.numpy(), task.groups.numpy())


def _hook(name: str, width: int, tails: list[Tail], stand_in: Substitute, base: Tensor, seed: int) -> np.ndarray:
    """Compute the logits with each channel of a hook replaced, (width, prompts, answers)."""
    logits = base.repeat(width, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = Substitute(stand_in.kind, stand_in.values, generator)
    for tail in tails:
        value = tail.values[name]
        change = (drawn.at(name, value).to(value.dtype) - value).T.contiguous()
        # A channel that would be replaced by its own value changes nothing.
        changed = change.any(1).nonzero()[:, 0]
        widest = max(tail.model.config.d_mlp or 0, 3 * tail.model.config.d_attn, tail.model.config.d_model)
        step = max(1, _ELEMENTS // (len(value) * widest))
        for i in range(0, len(changed), step):
            channels = changed[i : i + step]
            replaced = tail.replaced(name, channels, change[channels])
            logits[channels[:, None].cpu(), tail.prompts.rows] = replaced.cpu()
    return logits.numpy()


class _FinishedHooks:
    """Store the logits of finished hooks in a folder; without a folder, store nothing."""

    def __init__(self, folder: str | Path | None, key: dict[str, Any], hooks: Iterable[str]) -> None:
        way_out = WayOut("measurement of effects", "give another folder", "remove that one to begin anew")
        pieces = [f"{hook}.npy" for hook in hooks]
        self.work = None if folder is None else Work(folder, "effects.json", key, way_out, pieces=pieces, bare=True)

    def load(self, hook: str) -> np.ndarray | None:
        if self.work is None or not self.work.path(f"{hook}.npy").exists():
            return None
        values: np.ndarray = np.load(self.work.path(f"{hook}.npy"))
        return values

    def store(self, hook: str, values: np.ndarray) -> None:
        if self.work is not None:
            with self.work.writing(f"{hook}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, values)
