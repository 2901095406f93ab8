"""The steps of training a weight-sparse CircuitGPT. Stopping at any moment loses at most a few seconds of work."""

import ast
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

from .._resume import Pieces, WayOut, another_work
from ..models.circuitgpt.attention import fused_training
from ..models.circuitgpt.model import CircuitGPT
from ..models.sparsity import prune_
from .recipe import Recipe, clip_rms_, sparse_matrices

SAVE_EVERY_SECONDS = 20.0
_WAY_OUT = WayOut("recipe", "give another folder", "remove the state to start anew")


class Course(Protocol):
    """What a model is trained on: batches, and their loss."""

    def batches(self, start: int) -> Iterator[Any]:
        """Yield batches from step ``start`` on, the same for the same start.

        Each has ``longest``, the length of its longest text in the unit of the course.
        """

    def loss(self, model: CircuitGPT, batch: Any) -> Tensor:
        """Return the loss of a batch in nats, a scalar."""


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back inside the context until the yielded function is called, so that no half-done step is stored.

    Signals reach only the main thread; in other threads nothing is changed.
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
    """The result of a run.

    Args:
        model: The trained model.
        loss: The loss of the course in nats, smoothed over about 100 steps.
        longest: The longest text seen, in the unit of the course.
        seconds: How long the training took.
    """

    model: CircuitGPT
    loss: float
    longest: int
    seconds: float


def state_file_in(out: Path) -> Path:
    """The file that a training into the folder ``out`` is resumed from. The folder is created if need be.

    Raises:
        ValueError: ``out`` holds a finished model.
    """
    if (out / "card.json").exists():
        raise ValueError(f"{out} holds a finished model; give another folder, or remove that one to train anew")
    out.mkdir(parents=True, exist_ok=True)
    return out / "training-state.pt"


def train(
    recipe: Recipe,
    course: Course,
    state_file: Path,
    progress: Callable[[int, int, float], None] | None = None,
    snapshot: Callable[[int, CircuitGPT], None] | None = None,
    snapshot_steps: Collection[int] = (),
) -> Trained:
    """Train to the end of the recipe, resuming from ``state_file`` if it exists.

    Ctrl-C writes the state and raises KeyboardInterrupt. The same call then resumes, and ends with the same weights as
    a run that wasn't stopped.

    Args:
        recipe: What decides the run.
        course: The text and its loss.
        state_file: Where the state of an unfinished run is kept.
        progress: Called with (step, steps, loss in nats) after each step.
        snapshot: Called with (steps done, model) when the number of steps done is in ``snapshot_steps``; it must not
            change the model. A resumed run doesn't call it again for steps before its state. If a run was killed
            between a snapshot and the next state, it is called a second time with the same weights.
        snapshot_steps: The numbers of steps at which ``snapshot`` is called; 0 is before the first step.

    Raises:
        ValueError: If the state belongs to another recipe.
        FloatingPointError: If the loss is not finite.
    """
    model = CircuitGPT(recipe.config(), seed=recipe.seed)
    if not recipe.positions:
        model.transformer.wpe.weight.requires_grad_(False).zero_()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    others = [parameter for parameter in parameters if parameter.dim() != 2]
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
                if (
                    snapshot is not None and step in snapshot_steps
                ):  # before the state, which says that the snapshot was made
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
    with Pieces(path.parent).writing(path.name) as temporary:
        torch.save(state, temporary)


def _fields(recipe: str) -> dict[str, Any]:
    """The fields of a recipe, from its ``repr``, which is what the file of a stopped training holds."""
    call = ast.parse(recipe, mode="eval").body
    return {field.arg: ast.literal_eval(field.value) for field in call.keywords if field.arg}  # type: ignore[attr-defined]


def _restore(path: Path, recipe: Recipe, optimizer: torch.optim.Optimizer, result: Trained) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != repr(recipe):
        raise another_work(path, _fields(state["recipe"]), _fields(repr(recipe)), _WAY_OUT)
    result.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    result.loss, result.longest, result.seconds = state["loss"], state["longest"], state["seconds"]
    return int(state["step"])
