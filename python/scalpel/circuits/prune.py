"""Find the nodes that a task needs, by learned masks and bisection, from many seeds and beside controls."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._resume import WayOut, Work
from ..hooks.standing import stood_for
from ..models.circuitgpt.ablation import KINDS
from ..models.circuitgpt.model import CircuitGPT
from ..models.fingerprint import identity
from ..tasks.bracket_words import TASK_WORDS
from ..tasks.refused import Refused
from .ablations import digest, node_hooks, nodes_at, substitute, training_text
from .closure import closes_over
from .fit import refit
from .graph import circuit_graph
from .masks import Schedule, learn_masks
from .measure import measure, random_nodes_like
from .result import Measured, Pruning, SeedCircuit
from .task import Task, answer_logits, check_able, nonsense, task_named

__all__ = ["prune"]


def prune(
    model: CircuitGPT,
    task: str | Callable[[CircuitGPT, int, int], Task] = "bracket_counting",
    *,
    ablation: str = "mean",
    reference: Any = None,
    seeds: int = 10,
    target: float = 0.15,
    prompts: int = 512,
    schedule: Schedule | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Pruning:
    """Find the circuit of a model for a task, from several searches with different seeds.

    Args:
        model: The model.
        task: A name in ``circuits.TASKS``, or a function (model, prompts, seed) → Task.
        ablation: What replaces deleted nodes while masks are learned, "mean", "zero" or "resample". Every circuit is
            judged under all three.
        reference: The prompts for means and samples, as in ``model.ablate``. None uses text that the model was trained
            on if that can be made again, else the task's own prompts, which is noted in the result.
        seeds: The number of searches.
        target: The task's loss in nats, with scale and shifts refitted, for which the smallest number of nodes is found
            by bisection (0.15 in Gao et al. 2025, A.5).
        prompts: The number of prompts to learn on; as many others are made to judge on.
        schedule: How masks are learned; None takes the defaults.
        folder: A folder that keeps finished searches, so that a call that was stopped continues from there.
        seed: The seed of all random choices.
        progress: A function that is called with a description and the fraction done.

    Returns:
        The circuits with their controls.

    Raises:
        CannotDoTask: If the model answers too few prompts correctly.
        Refused: If the model has no layers, or lacks what the task needs.
        ValueError: If an option is out of range, or the folder belongs to another search.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> def closing(model, prompts, seed):
        ...     task = scalpel.circuits.bracket_counting(model, prompts, seed)
        ...     return task.relabelled(task.labels, "closing a list")
        >>> reference = closing(model, 32, seed=0)
        >>> pruning = scalpel.circuits.prune(
        ...     model,
        ...     closing,
        ...     reference=(reference.ids, reference.mask),
        ...     seeds=1,
        ...     target=0.5,
        ...     prompts=32,
        ...     schedule=scalpel.circuits.Schedule(steps=2, batch=4),  # the default is 200 steps
        ... )
        >>> len(pruning.circuits), pruning.best.reached, len(pruning.best.nodes) < pruning.total
        (1, True, True)
    """
    model = stood_for(model)
    begun = time.monotonic()
    if ablation not in KINDS:
        raise ValueError(f"ablation is {ablation!r}; allowed: {', '.join(KINDS)}")
    for name, value, least in (("seeds", seeds, 1), ("prompts", prompts, 8)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    if not target > 0:
        raise ValueError(f"target is {target}; it is a loss in nats, above 0")
    make = task_named(task) if isinstance(task, str) else task
    report = progress or (lambda what, done: None)
    schedule = schedule or Schedule()
    if not nodes_at(model):
        raise Refused("the model has no layers, so it has no nodes to prune")
    search_task = make(model, prompts, 2 * seed)
    held_out_task = make(model, prompts, 2 * seed + 1).unseen(search_task)
    accuracy = check_able(model, held_out_task)
    notes = []
    if reference is None:
        report("reading the training text", 0.0)
        reference = training_text(model)
    if reference is None:
        reference = (search_task.ids, search_task.mask)
        notes.append("The model's training text can't be made again, so means and samples are over the task's prompts.")
    options = {
        "seeds": seeds,
        "prompts": prompts,
        "target": target,
        "ablation": ablation,
        "seed": seed,
        "schedule": asdict(schedule),
        "task": search_task.name,
    }
    search = _Search(model, search_task, held_out_task, reference, ablation, target, schedule, seed)
    key = {
        "model": identity(model),
        "tasks": [search_task.digest(), held_out_task.digest()],
        "stand_ins": search.digest(),
    }
    finished = _FinishedSeeds(folder, key | {"options": options | {"seeds": None}})
    circuits = []
    for i in range(seeds):
        report(f"seed {i + 1} of {seeds}", 0.95 * i / seeds)
        circuit = finished.load(i)
        if circuit is None:
            circuit = search.run(i, partial(_share, report, i, seeds))
            finished.store(circuit)
        circuits.append(circuit)
    reached = [circuit for circuit in circuits if circuit.reached]
    best = min(reached, key=lambda circuit: (len(circuit.nodes), circuit.loss), default=None)
    if best is None:
        notes.append(f"No seed reached the target of {target} nats; the whole model's loss is {search.model_loss:.3f}.")
    if search.model_loss > target:
        notes.append(
            f"The whole model's own loss, {search.model_loss:.3f} nats, is above the target: a circuit that reaches it "
            "does the task better than the model, by leaving out what interferes."
        )
    closure: dict[str, Any] = {}
    if best is not None and search_task.name in TASK_WORDS:
        report("what the circuit closes over", 0.97)
        closure = closes_over(
            model,
            best.nodes,
            search.stand_ins[ablation].again(seed),
            search_task,
            TASK_WORDS[search_task.name],
            seed=seed,
        )
    report("done", 1.0)
    return Pruning(
        model=str(model.card.get("name", "unnamed")),
        fingerprint=identity(model),
        task=search_task.name,
        ablation=ablation,
        target=target,
        accuracy=accuracy,
        model_loss=search.model_loss,
        total=sum(nodes_at(model).values()),
        circuits=tuple(circuits),
        best=best,
        graph=None if best is None else circuit_graph(model, best.nodes),
        closure=closure,
        options=options,
        notes=tuple(notes),
        seconds=time.monotonic() - begun,
    )


def _share(report: Callable[[str, float], None], seed: int, seeds: int, done: float) -> None:
    report(f"seed {seed + 1} of {seeds}", 0.95 * (seed + done) / seeds)


class _Search:
    """Search for circuits of one model for one task, with different seeds.

    The tasks, the values that replace deleted nodes, and the loss of the whole model are the same for all seeds.
    """

    def __init__(
        self,
        model: CircuitGPT,
        search_task: Task,
        held_out_task: Task,
        reference: Any,
        ablation: str,
        target: float,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.model, self.search_task, self.held_out_task = model, search_task, held_out_task
        self.ablation, self.target, self.schedule, self.seed = ablation, target, schedule, seed
        hooks = node_hooks(model)
        self.stand_ins = {kind: substitute(model, kind, reference, hooks, seed) for kind in KINDS}
        self.widths = nodes_at(model)
        self.names = [f"{name}:{channel}" for name, width in self.widths.items() for channel in range(width)]
        with torch.no_grad():
            self.model_loss = refit(answer_logits(model, held_out_task), held_out_task.labels).loss

    def digest(self) -> str:
        """Compute the SHA-256 of what replaces deleted nodes."""
        return digest(*self.stand_ins.values())

    def run(self, number: int, progress: Callable[[float], None]) -> SeedCircuit:
        """Search with one seed, judge the circuit on held-out prompts, and measure its controls."""
        begun = time.monotonic()
        rng = np.random.default_rng([self.seed, number])
        draw = int(rng.integers(2**31))
        stand_in = self.stand_ins[self.ablation].again(draw)
        taus = learn_masks(
            self.model, self.search_task, stand_in, self.schedule, draw, lambda done: progress(0.45 * done)
        )
        order = torch.cat(list(taus.values())).argsort(descending=True, stable=True)
        count, loss = self._bisect(order, self.search_task)
        kept = order[:count]
        judged = {kind: self._measure(kept, kind, self.held_out_task) for kind in KINDS}
        removed = {kind: self._measure(kept, kind, self.held_out_task, removed=True) for kind in KINDS}
        nodes = tuple(self.names[i] for i in kept.tolist())
        random_nodes = random_nodes_like(self.model, nodes, rng)
        search_nonsense, held_out_nonsense = nonsense(self.search_task, draw), nonsense(self.held_out_task, draw)
        nonsense_taus = learn_masks(
            self.model,
            search_nonsense,
            stand_in.again(draw),
            self.schedule,
            draw,
            lambda done: progress(0.5 + 0.45 * done),
        )
        nonsense_nodes = torch.cat(list(nonsense_taus.values())).argsort(descending=True, stable=True)[:count]
        return SeedCircuit(
            seed=number,
            nodes=nodes,
            edges=circuit_graph(self.model, nodes).weights,
            loss=loss,
            reached=loss <= self.target,
            kept=judged,
            removed=removed,
            random=self._measure_named(random_nodes),
            random_removed=self._measure_named(random_nodes, removed=True),
            nonsense=self._measure(nonsense_nodes, self.ablation, held_out_nonsense),
            seconds=time.monotonic() - begun,
        )

    def _bisect(self, order: Tensor, task: Task) -> tuple[int, float]:
        """Find the fewest nodes in ``order`` whose loss is at most the target, if the loss falls with their number."""
        low, high = 0, len(order)
        best = (high, self._measure(order, self.ablation, task).loss)
        # Find the first power of two that reaches the target, because beyond it the loss may rise again.
        count = 1
        while count < len(order):
            loss = self._measure(order[:count], self.ablation, task).loss
            if loss <= self.target:
                best, high = (count, loss), count
                break
            low, count = count, 2 * count
        if best[1] > self.target:
            return best
        while high - low > 1:
            middle = (low + high) // 2
            loss = self._measure(order[:middle], self.ablation, task).loss
            if loss <= self.target:
                best, high = (middle, loss), middle
            else:
                low = middle
        return best

    @torch.no_grad()
    def _measure(self, nodes: Tensor, kind: str, task: Task, removed: bool = False) -> Measured:
        """Measure the model with only ``nodes`` kept, or with only them deleted."""
        names = [self.names[i] for i in nodes.tolist()]
        return measure(self.model, names, self.stand_ins[kind], task, removed=removed, seed=self.seed)

    def _measure_named(self, names: list[str], removed: bool = False) -> Measured:
        """Measure nodes by name, under the ablation of the search."""
        stand_in = self.stand_ins[self.ablation]
        return measure(self.model, names, stand_in, self.held_out_task, removed=removed, seed=self.seed)


class _FinishedSeeds:
    """Store the circuits of finished seeds in a folder; without a folder, store nothing."""

    def __init__(self, folder: str | Path | None, key: dict[str, Any]) -> None:
        way_out = WayOut("search", "give another folder", "remove that one to begin anew")
        self.work = (
            None if folder is None else Work(folder, "search.json", key, way_out, pieces=[_name("*")], bare=True)
        )

    def load(self, number: int) -> SeedCircuit | None:
        record = None if self.work is None else self.work.read(_name(number))
        return None if record is None else SeedCircuit.from_dict(record)

    def store(self, circuit: SeedCircuit) -> None:
        if self.work is not None:
            self.work.write(_name(circuit.seed), asdict(circuit), allow_nan=True)


def _name(number: int | str) -> str:
    return f"seed-{number}.json"
