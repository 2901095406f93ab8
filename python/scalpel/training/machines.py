"""Small models that imitate small machines (a mod-3 counter, a flip-flop, parity), in which to find the machines.

A model reads letters and says after each letter which state the machine is in, as in B. Liu et al. 2023 (*Transformers
learn shortcuts to automata*). The training uses nothing of the machine but these answers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from .._info import __version__
from ..models.circuitgpt.checkpoint import save_pretrained
from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..semigroup.machine import MooreMachine
from ..tasks.brackets import START
from .commit import commit
from .loop import state_file_in, train
from .recipe import Recipe, density_table

__all__ = ["MACHINES", "MachineCourse", "MachineModel", "machine_tokenizer", "train_machine"]

LONGEST = 36  # letters of the longest words in training


@dataclass(frozen=True)
class MachineModel:
    """A machine, the name of its semigroup, and how many training steps it needs."""

    machine: MooreMachine
    known_as: str
    steps: int


MACHINES = {
    "mod3-mini": MachineModel(MooreMachine(("a", "b"), ((1, 0), (2, 1), (0, 2)), ("0", "1", "2")), "Z_3", 12000),
    "flip-flop-mini": MachineModel(
        MooreMachine(("s", "r", "h"), ((1, 0, 0), (1, 0, 1)), ("0", "1")), "flip-flop", 6000
    ),
    "parity-mini": MachineModel(MooreMachine(("a", "b"), ((1, 0), (0, 1)), ("0", "1")), "Z_2", 12000),
}


def machine_recipe(machine: MooreMachine, steps: int, seed: int) -> Recipe:
    """Return the recipe: four layers of width 64, with half of the weights and of the activations.

    Smaller models failed on words of 30 letters.
    """
    return Recipe(
        d_model=64,
        n_layer=4,
        block_size=LONGEST + 1,
        vocab_size=1 + len(machine.letters) + len(machine.outputs),
        afrac=0.5,
        steps=steps,
        batch=64,
        density=0.5,
        sparse_embeddings=False,
        closer_weight=1.0,
        tokenizer_name="machine",
        seed=seed,
    )


def machine_tokenizer(machine: MooreMachine) -> Tokenizer:
    """Return a tokenizer with one token per character: the start, the letters, the outputs."""
    symbols = [START, *machine.letters, *map(str, machine.outputs)]
    inner = tokenizers.Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=START))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner)


@dataclass(frozen=True)
class Words:
    """A batch of words.

    ``ids`` is (batch, 1 + letters) and begins with the start token; ``answers`` has the same shape and holds the token
    to predict after each.
    """

    ids: Tensor
    answers: Tensor
    longest: int


class MachineCourse:
    """The course of a machine: random words whose length grows over the first third of the steps."""

    def __init__(self, recipe: Recipe, machine: MooreMachine) -> None:
        self.recipe, self.machine = recipe, machine
        self._delta = np.array(machine.transitions)

    def batches(self, start: int) -> Iterator[Words]:
        for step in count(start):
            done = min(1.0, 3 * (step + 1) / self.recipe.steps)
            yield self.words(round(2 + done * (LONGEST - 2)), np.random.default_rng([self.recipe.seed, step]))

    def words(self, length: int, rng: np.random.Generator, count: int | None = None) -> Words:
        """Draw ``count`` words (a batch of the recipe by default); in half of them letters are not equally frequent."""
        rows, letters = count or self.recipe.batch, len(self.machine.letters)
        weights = np.where(rng.random((rows, 1)) < 0.5, rng.dirichlet(np.full(letters, 0.5), rows), 1 / letters)
        drawn = (rng.random((rows, length, 1)) > weights.cumsum(1)[:, None, :-1]).sum(-1)
        states = np.empty((rows, length + 1), dtype=np.int64)
        states[:, 0] = self.machine.start
        for t in range(length):
            states[:, t + 1] = self._delta[states[:, t], drawn[:, t]]
        ids = np.concatenate([np.zeros((rows, 1), dtype=np.int64), 1 + drawn], 1)
        return Words(torch.from_numpy(ids), torch.from_numpy(1 + letters + states), length)

    def loss(self, model: CircuitGPT, batch: Words) -> Tensor:
        return F.cross_entropy(model(batch.ids).flatten(0, 1), batch.answers.flatten())


def train_machine(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train the model of a machine into a folder. If it is stopped, the same call resumes.

    Args:
        name: A name in MACHINES.
        out: The folder of the model.
        seed: Decides the initial weights and the words.
        steps: Optimizer steps; by default as many as the machine needs.
        progress: Called with (step, steps, loss in nats).

    Returns:
        The card.

    Raises:
        ValueError: For an unknown name, or if ``out`` holds a finished model.
    """
    if name not in MACHINES:
        raise ValueError(f"there is no machine named {name!r}; there are {', '.join(MACHINES)}")
    kind = MACHINES[name]
    recipe = machine_recipe(kind.machine, kind.steps, seed)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    state_file = state_file_in(out)
    trained_at = commit()
    course = MachineCourse(recipe, kind.machine)
    trained = train(recipe, course, state_file, progress)
    model = trained.model.eval()
    model.tokenizer = machine_tokenizer(kind.machine)
    model.card = {
        "name": name,
        "machine": kind.machine.to_dict() | {"known_as": kind.known_as},
        "recipe": recipe.to_dict(),
        "commit": trained_at,
        "scalpel": __version__,
        "torch": torch.__version__,
        "loss_nats": trained.loss,
        "longest_word_trained_on_letters": trained.longest,
        "training_seconds": round(trained.seconds, 1),
        "matrices": density_table(model),
        "accuracy": _accuracy(model, course),
    }
    save_pretrained(model, out)
    state_file.unlink(missing_ok=True)
    return model.card


@torch.no_grad()
def _accuracy(model: CircuitGPT, course: MachineCourse, words: int = 2000) -> dict[str, Any]:
    """Measure the share of right answers, and of words with every answer right, on new words of the longest length."""
    batch = course.words(LONGEST, np.random.default_rng([course.recipe.seed, 10**6]), words)
    right = model(batch.ids).argmax(-1) == batch.answers
    return {"all": float(right.float().mean()), "whole_words": float(right.all(1).float().mean()), "words": words}
