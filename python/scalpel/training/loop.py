"""Train a weight-sparse CircuitGPT, step by step, so that a stop at any moment loses at most a few seconds."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import replacing
from ..models.circuitgpt import CircuitGPT
from ..models.tokenizer import Tokenizer
from .corpus import Sources, documents
from .recipe import Recipe, clip_rms_, prune_, sparse_matrices
from .tokenizer import CLOSERS, START

POOL_BATCHES = 16
SAVE_EVERY_SECONDS = 20.0


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
            yield _batch(rows, recipe.block_size, np.random.default_rng([recipe.seed, pool, int(i)]))
        pool, skip = pool + 1, 0


def _batch(rows: list[tuple[list[int], int]], block_size: int, rng: np.random.Generator) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    offset = torch.from_numpy(rng.integers(block_size - length + 1, size=(len(rows), 1)))
    return Batch(ids, offset + torch.arange(length), mask, max(n for _, n in rows))


def loss_of(model: CircuitGPT, batch: Batch, token_weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token over real tokens, in nats; ``token_weight`` (vocab,) weights targets."""
    logits = model(batch.ids, position_ids=batch.positions)[:, :-1]
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=token_weight)


def closer_weights(recipe: Recipe, tokenizer: Tokenizer) -> Tensor:
    """Weights (vocab,) of the loss: ``recipe.closer_weight`` at the tokens that close a list, else 1."""
    weights = torch.ones(recipe.vocab_size)
    for text in CLOSERS:
        weights[tokenizer.single(text)] = recipe.closer_weight
    return weights


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
    """What a run gives: the model, the training loss, the longest list seen, seconds of computing.

    ``loss`` is in nats, smoothed over about 100 steps and weighted as the recipe says, closing tokens above the others:
    it is no plain cross-entropy a token, and comparable between runs of one ``closer_weight`` only.
    """

    model: CircuitGPT
    loss: float
    longest: int
    seconds: float


def train(
    recipe: Recipe,
    sources: Sources,
    tokenizer: Tokenizer,
    state_file: Path,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train to the end of the recipe, from ``state_file`` where one is there.

    ``progress(step, steps, loss)`` is called after each step. Ctrl-C writes the state and raises
    KeyboardInterrupt; the same call then resumes and ends with the same weights as a run that wasn't stopped.
    ValueError if the state belongs to another recipe.
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
    weights = closer_weights(recipe, tokenizer)
    saved = begun = time.monotonic()
    before = result.seconds
    try:
        with _interrupt_between_steps() as raise_pending:
            for batch in islice(batches(recipe, sources, tokenizer, step), recipe.steps - step):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step)
                loss = loss_of(model, batch, weights)
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
    state = torch.load(path, weights_only=True)
    if state["recipe"] != repr(recipe):
        raise ValueError(
            f"{path} was written by another recipe:\n  {state['recipe']}\nand this one is\n  {recipe!r}\n"
            "Give another folder, or remove the state to start anew."
        )
    result.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    result.loss, result.longest, result.seconds = state["loss"], state["longest"], state["seconds"]
    return int(state["step"])
