"""Tasks for circuits: prompts, each with one question and the answers that it is between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.circuitgpt import CircuitGPT
from ..tasks.brackets import closers
from ..training.corpus import layout

__all__ = ["TASKS", "CannotDoTask", "Task", "answer_logits", "bracket_counting", "check_able", "task_named"]

LEAST_ACCURACY = 0.9
_HEADS = ("x = ", "rows = ", "data = ", "a = ", "names = ", "return ", "foo = ", "self.args = ")
_LEAVES = ("0", "1", "2", "3", "5", "7", "9", "a", "b", "x", "y", "foo", "data", "None", "True", "12", "40")


@dataclass(frozen=True)
class Task:
    """``ids`` int64 and ``mask`` bool (prompts, length), padded on the right; ``asked`` (prompts,): the place of each
    question's last token; ``answers``: token ids to choose among; ``labels`` (prompts,): the right answer's number.
    """

    name: str
    ids: Tensor
    mask: Tensor
    asked: Tensor
    answers: tuple[int, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: Tensor | slice) -> "Task":
        """Some of the prompts, no wider than they need to be."""
        width = int(self.asked[rows].max()) + 1
        return Task(
            self.name,
            self.ids[rows, :width],
            self.mask[rows, :width],
            self.asked[rows],
            self.answers,
            self.labels[rows],
        )

    def relabelled(self, labels: Tensor, name: str) -> "Task":
        """The same prompts with other labels."""
        return Task(name, self.ids, self.mask, self.asked, self.answers, labels)

    @classmethod
    def of(cls, name: str, rows: Sequence[Sequence[int]], labels: Sequence[int], answers: Sequence[int]) -> "Task":
        """From prompts as token ids. ValueError where they don't fit together."""
        if len(rows) != len(labels) or not rows:
            raise ValueError(f"{len(rows)} prompts and {len(labels)} labels; give one label a prompt, and at least one")
        if len(answers) < 2 or not all(0 <= label < len(answers) for label in labels):
            raise ValueError(f"labels must be numbers of the {len(answers)} answers, and there must be two or more")
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return cls(name, ids, mask, lengths - 1, tuple(answers), torch.tensor(labels))


def answer_logits(model: CircuitGPT, task: Task, batch: int = 64) -> Tensor:
    """Logits of the answers at each question, (prompts, answers)."""
    found = []
    for i in range(0, len(task), batch):
        part = task.part(slice(i, i + batch))
        logits = model(part.ids)  # causality hides the padding on the right
        found.append(logits[torch.arange(len(part)), part.asked][:, list(task.answers)])
    return torch.cat(found)


def bracket_counting(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Does one bracket close the list, or do two? Lists of 1 to 8 elements in rows, as the training text lays them out.

    Prompts come in pairs that differ only in the depth, so half of them have either answer. ValueError where the
    tokenizer splits an answer.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; bracket_counting is made of text")
    ids = closers(model.tokenizer)
    rng = np.random.default_rng([seed, 41])
    rows, labels = [], []
    for _ in range(-(-prompts // 2)):
        head = _HEADS[rng.integers(len(_HEADS))]
        leaves = [str(leaf) for leaf in rng.choice(_LEAVES, size=int(rng.integers(1, 9)))]
        state = rng.bit_generator.state
        for depth in (1, 2):
            rng.bit_generator.state = state
            text = head + layout(leaves, depth, len(head), rng)
            rows.append([*ids.start, *model.tokenizer.encode(text[: len(text) - depth])])
            labels.append(depth - 1)
    return Task.of("bracket_counting", rows[:prompts], labels[:prompts], (ids.one, ids.two))


TASKS: dict[str, Callable[[CircuitGPT, int, int], Task]] = {"bracket_counting": bracket_counting}


def task_named(name: str) -> Callable[[CircuitGPT, int, int], Task]:
    """The maker of a task's prompts: (model, prompts, seed) → Task. ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


class CannotDoTask(ValueError):
    """The model answers too few prompts right, so nothing in it is a circuit for the task."""


@torch.no_grad()
def check_able(model: CircuitGPT, task: Task, least: float = LEAST_ACCURACY) -> float:
    """The model's accuracy by answer, averaged. CannotDoTask below ``least``."""
    right = answer_logits(model, task).argmax(-1) == task.labels
    by_answer = {
        answer: float(right[task.labels == answer].float().mean())
        for answer in range(len(task.answers))
        if bool((task.labels == answer).any())
    }
    accuracy = sum(by_answer.values()) / len(by_answer)
    if accuracy < least:
        shown = ", ".join(f"answer {answer}: {share:.0%}" for answer, share in by_answer.items())
        raise CannotDoTask(
            f"the model can't do {task.name}: accuracy {accuracy:.0%} over {len(task)} prompts ({shown}), and "
            f"{least:.0%} is asked. A circuit for what a model doesn't do is an artefact."
        )
    return accuracy
