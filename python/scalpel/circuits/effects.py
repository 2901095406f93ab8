"""What each node's ablation does to the answers: every node of a model, in batched passes that can be resumed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._resume import WayOut, Work
from ..models.circuitgpt.model import CircuitGPT
from ..models.circuitgpt.recording import check_hooks, hook_width
from ..models.fingerprint import identity
from .ablations import Substitute, digest, substitute
from .packing import pack
from .tail import Tail
from .task import Task, answer_logits

__all__ = ["Effects", "ablation_effects"]

_ELEMENTS = 1 << 22  # of the widest value of one batch: 16 MiB of float32, which still lies in a cache of some size
_PREFIXES = 128  # of one pack: attention takes their square


@dataclass(frozen=True)
class Effects:
    """Answers' logits with each node ablated.

    ``hooks``: hook → (width, prompts, answers), of the model's dtype; ``base`` (prompts, answers) without ablation;
    ``labels`` and ``groups`` (prompts,), as in the task. Derived figures are means over prompts.
    """

    hooks: dict[str, np.ndarray]
    base: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def loss_change(self) -> dict[str, np.ndarray]:
        """By how many nats the answers' cross-entropy rises, hook → float64 (width,)."""
        before = _losses(self.base[None], self.labels)
        return {hook: (_losses(after, self.labels) - before).mean(1) for hook, after in self.hooks.items()}

    def standard_error(self) -> dict[str, np.ndarray]:
        """Of :meth:`loss_change`, over groups of prompts; NaN where there is only one."""
        before = _losses(self.base[None], self.labels)
        numbers, group = np.unique(self.groups, return_inverse=True)
        count = len(numbers)
        if count < 2:
            return {hook: np.full(len(after), np.nan) for hook, after in self.hooks.items()}
        found = {}
        for hook, after in self.hooks.items():
            change = _losses(after, self.labels) - before
            # the mean over prompts as a sum over groups, so that groups of unequal size count as they do there
            sums = np.zeros((len(change), count))
            np.add.at(sums.T, group, (change - change.mean(1, keepdims=True)).T)
            found[hook] = (sums**2).sum(1) ** 0.5 / len(self.labels) * (count / (count - 1)) ** 0.5
        return found

    def largest(self, count: int = 20) -> list[tuple[str, float, float]]:
        """(node, rise of the loss in nats, standard error) of the nodes that matter most."""
        errors = self.standard_error()
        every = [
            (f"{hook}:{channel}", float(value), float(errors[hook][channel]))
            for hook, values in self.loss_change().items()
            for channel, value in enumerate(values)
        ]
        return sorted(every, key=lambda one: -abs(one[1]))[:count]


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropies (nodes, prompts) of logits (nodes, prompts, answers)."""
    given = torch.from_numpy(logits).double()
    right = torch.from_numpy(labels).expand(given.shape[:-1])
    return F.cross_entropy(given.movedim(-1, 1), right, reduction="none").numpy()


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
    """The answers' logits with each node of ``hooks`` (all if not given) replaced, one node at a time, at all tokens.

    The same as ``with model.ablate([node], kind, reference=...)`` for every node, without a pass for each: see
    :mod:`.tail`. ``kind`` and ``reference`` as in ``model.ablate``; by default the means that came with the model, else
    the task's prompts. For "resample" values are drawn once for each distinct prefix of the prompts, the same for all
    nodes; ``model.ablate`` draws others. ``folder``: finished hooks are kept there, and a call that was stopped goes
    on; ValueError where it holds another model's or task's.
    """
    names = model.hook_names if hooks is None else [hooks] if isinstance(hooks, str) else list(hooks)
    check_hooks(model, names)
    if reference is None and not (kind == "mean" and "hook_means" in model.card):
        reference = (task.ids, task.mask)
    stand_in = substitute(model, kind, reference, list(names), seed)
    tails = [Tail(model, prompts, task.answers) for prompts in pack(task, _PREFIXES)]
    answer_logits(model, task)  # refuses answers that are no tokens, and logits that are no numbers
    base = torch.empty(len(task), len(task.answers), dtype=model.dtype, device="cpu")
    for tail in tails:
        base[tail.prompts.rows] = tail.logits.cpu()
    key = {"model": identity(model), "task": task.digest(), "values": digest(stand_in), "seed": seed}
    kept = _Kept(folder, key, names)
    report = progress or (lambda what, done: None)
    found, widths = {}, [hook_width(model, name) for name in names]
    for i, name in enumerate(names):
        report(name, sum(widths[:i]) / sum(widths))
        stored = kept.load(name)
        if stored is None:
            stored = _hook(name, hook_width(model, name), tails, stand_in, base, seed)
            kept.store(name, stored)
        found[name] = stored
    report("done", 1.0)
    return Effects(found, base.numpy(), task.labels.numpy(), task.groups.numpy())


def _hook(name: str, width: int, tails: list[Tail], stand_in: Substitute, base: Tensor, seed: int) -> np.ndarray:
    """(width, prompts, answers): the logits with each channel of one hook replaced."""
    out = base.repeat(width, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = Substitute(stand_in.kind, stand_in.values, generator)
    for tail in tails:
        value = tail.values[name]
        change = (drawn.at(name, value).to(value.dtype) - value).T.contiguous()
        # A channel that would be replaced by what it is changes nothing.
        live = change.any(1).nonzero()[:, 0]
        widest = max(tail.model.config.d_mlp or 0, 3 * tail.model.config.d_attn, tail.model.config.d_model)
        step = max(1, _ELEMENTS // (len(value) * widest))
        for i in range(0, len(live), step):
            channels = live[i : i + step]
            replaced = tail.replaced(name, channels, change[channels])
            out[channels[:, None].cpu(), tail.prompts.rows] = replaced.cpu()
    return out.numpy()


class _Kept:
    """Finished hooks in a folder, or nothing kept where no folder is given."""

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
