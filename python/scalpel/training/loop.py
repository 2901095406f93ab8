"""Train a weight-sparse CircuitGPT, step by step, so that a stop at any moment loses at most a few seconds."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._files import replacing
from ..models.circuitgpt.attention import fused_training
from ..models.circuitgpt.model import CircuitGPT
from ..models.sparsity import prune_
from .recipe import Recipe, clip_rms_, sparse_matrices

SAVE_EVERY_SECONDS = 20.0


class Course(Protocol):
    """What a model is trained on: batches, and the loss of one."""

    def batches(self, start: int) -> Iterator[Any]:
        """Batches from step ``start`` on, the same for the same start; each has ``longest``, see :class:`Trained`."""

    def loss(self, model: CircuitGPT, batch: Any) -> Tensor:
        """The loss of a batch in nats, a scalar."""


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C is kept until the function given is called: a step half done must never be what is stored.

    Signals reach the main thread only; elsewhere nothing is changed.
    """
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def raise_pending() -> None:
        if pending:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield raise_pending
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Trained:
    """What a run gives: the model, the training loss, the longest text seen as the course counts it, seconds.

    ``loss`` is the course's, in nats, smoothed over about 100 steps.
    """

    model: CircuitGPT
    loss: float
    longest: int
    seconds: float


def train(
    recipe: Recipe,
    course: Course,
    state_file: Path,
    progress: Callable[[int, int, float], None] | None = None,
    snapshot: Callable[[int, CircuitGPT], None] | None = None,
    snapshot_steps: Collection[int] = (),
) -> Trained:
    """Train to the end of the recipe, from ``state_file`` where one is there.

    ``progress(step, steps, loss)`` is called after each step. Ctrl-C writes the state and raises
    KeyboardInterrupt; the same call then resumes and ends with the same weights as a run that wasn't stopped.
    ValueError if the state belongs to another recipe.

    ``snapshot(steps done, model)`` is called when the number of steps done is in ``snapshot_steps`` (0: before the
    first); it must not change the model. A resumed run doesn't call it again for steps that lie behind the state; where
    a run was killed between a snapshot and its next state, it is called a second time, with the same weights.
    """
    model = CircuitGPT(recipe.config(), seed=recipe.seed)
    if not recipe.positions:
        model.transformer.wpe.weight.requires_grad_(False).zero_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
    )
    result = Trained(model, float("nan"), 0, 0.0)
    step = _restore(state_file, recipe, optimizer, result)
    sparse = [p for _, p in sparse_matrices(model, recipe.sparse_embeddings)]
    saved = begun = time.monotonic()
    before = result.seconds
    if snapshot is not None and step == 0 and 0 in snapshot_steps:
        snapshot(0, model)
    try:
        with _interrupt_between_steps() as raise_pending:
            for batch in islice(course.batches(step), recipe.steps - step):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step)
                with fused_training():
                    loss = course.loss(model, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                clip_rms_(parameters, recipe.clip_rms)
                optimizer.step()
                for weight in sparse:
                    prune_(weight, recipe.density_at(step), recipe.min_per_channel)
                value = float(loss.detach())
                if not np.isfinite(value):
                    raise FloatingPointError(
                        f"the loss is {value} at step {step}; lower the learning rate ({recipe.lr})"
                    )
                result.loss = value if step == 0 else 0.99 * result.loss + 0.01 * value
                result.longest = max(result.longest, batch.longest)
                step += 1
                result.seconds = before + time.monotonic() - begun
                if snapshot is not None and step in snapshot_steps:  # before the state, which says that it was made
                    snapshot(step, model)
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    _store(state_file, step, recipe, optimizer, result)
                    saved = time.monotonic()
                if progress is not None:
                    progress(step, recipe.steps, result.loss)
                raise_pending()
    except KeyboardInterrupt:
        _store(state_file, step, recipe, optimizer, result)
        raise
    _store(state_file, step, recipe, optimizer, result)
    return result


def _store(path: Path, step: int, recipe: Recipe, optimizer: torch.optim.Optimizer, result: Trained) -> None:
    state = {
        "step": step,
        "recipe": repr(recipe),
        "model": result.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loss": result.loss,
        "longest": result.longest,
        "seconds": result.seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, recipe: Recipe, optimizer: torch.optim.Optimizer, result: Trained) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != repr(recipe):
        raise ValueError(
            f"{path} was written by another recipe:\n  {state['recipe']}\nand this one is\n  {recipe!r}\n"
            "Give another folder, or remove the state to start anew."
        )
    result.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    result.loss, result.longest, result.seconds = state["loss"], state["longest"], state["seconds"]
    return int(state["step"])
