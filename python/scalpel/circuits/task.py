"""Tasks for circuits: prompts, each with one question and the answers that it is between."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.brackets import closers
from ..tasks.corpus import layout
from ..tasks.held_out import Questions
from ..tasks.quotes import quote_questions
from ..tasks.refused import Refused
from ..tasks.set_or_string import set_or_string_questions

__all__ = ["TASKS", "CannotDoTask", "Task", "answer_logits", "bracket_counting", "check_able", "nonsense", "task_named"]

LEAST_ACCURACY = 0.9
_HEADS = ("x = ", "rows = ", "data = ", "a = ", "names = ", "return ", "foo = ", "self.args = ")
_LEAVES = ("0", "1", "2", "3", "5", "7", "9", "a", "b", "x", "y", "foo", "data", "None", "True", "12", "40")


@dataclass(frozen=True)
class Task:
    """``ids`` int64 and ``mask`` bool (prompts, length), padded on the right; ``asked`` (prompts,): the place of each
    question's last token; ``answers``: token ids to choose among; ``labels`` (prompts,): the right answer's number;
    ``groups`` (prompts,): prompts of one number were made from one draw, and are resampled together.
    """

    name: str
    ids: Tensor
    mask: Tensor
    asked: Tensor
    answers: tuple[int, ...]
    labels: Tensor
    groups: Tensor

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
            self.groups[rows],
        )

    def relabelled(self, labels: Tensor, name: str) -> "Task":
        """The same prompts with other labels."""
        return replace(self, labels=labels, name=name)

    def prompt(self, row: int) -> tuple[int, ...]:
        """A prompt's token ids, without padding."""
        return tuple(self.ids[row, : int(self.asked[row]) + 1].tolist())

    def unseen(self, *others: "Task") -> "Task":
        """Without the groups that have a prompt of another task's, and without repeats."""
        seen = {other.prompt(row) for other in others for row in range(len(other))}
        bad: set[int] = set()
        for row in range(len(self)):
            prompt, group = self.prompt(row), int(self.groups[row])
            if prompt in seen:
                bad.add(group)
            seen.add(prompt)
        kept = torch.tensor(
            [row for row in range(len(self)) if int(self.groups[row]) not in bad], dtype=torch.long, device="cpu"
        )
        if len(kept) == 0:
            raise ValueError(f"every prompt of {self.name} was seen before; give another seed or more prompts")
        return self.part(kept)

    def digest(self) -> str:
        """SHA-256 of prompts, questions, answers and labels."""
        content = [self.ids.tolist(), self.asked.tolist(), list(self.answers), self.labels.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def of(
        cls,
        name: str,
        rows: Sequence[Sequence[int]],
        labels: Sequence[int],
        answers: Sequence[int],
        groups: Sequence[int] | None = None,
    ) -> "Task":
        """From prompts as token ids; each a group of its own if not given. ValueError where they don't fit together."""
        if len(rows) != len(labels) or not rows:
            raise ValueError(f"{len(rows)} prompts and {len(labels)} labels; give one label a prompt, and at least one")
        if len(answers) < 2 or not all(0 <= label < len(answers) for label in labels):
            raise ValueError(f"labels must be numbers of the {len(answers)} answers, and there must be two or more")
        if not all(rows):
            raise ValueError("a prompt is empty; each needs at least one token")
        if len(set(answers)) != len(answers):
            raise ValueError(f"answers {list(answers)} are not all different tokens")
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows], batch_first=True
        )
        mask = torch.arange(ids.shape[1], device="cpu") < lengths[:, None]
        own = list(range(len(rows))) if groups is None else list(groups)
        return cls(
            name,
            ids,
            mask,
            lengths - 1,
            tuple(answers),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
            torch.tensor(own, dtype=torch.int64, device="cpu"),
        )


def answer_logits(model: CircuitGPT, task: Task, batch: int = 64) -> Tensor:
    """Logits of the answers at each question, (prompts, answers), on the CPU. Refused where one isn't finite."""
    if max(task.answers) >= model.config.vocab_size:
        raise Refused(f"answer {max(task.answers)} is no token; the vocabulary has {model.config.vocab_size}")
    found = []
    for i in range(0, len(task), batch):
        part = task.part(slice(i, i + batch))
        logits = model(part.ids)  # causality hides the padding on the right
        found.append(logits[torch.arange(len(part), device="cpu"), part.asked][:, list(task.answers)].cpu())
    every = torch.cat(found)
    if not bool(torch.isfinite(every).all()):
        raise Refused(f"the model's logits of the answers of {task.name} aren't finite; it has no answer")
    return every


def nonsense(task: Task, seed: int) -> Task:
    """The same prompts with labels that have nothing to do with the task, and yet could be learned.

    Each token at the first place where prompts differ gets an answer at random, the same in every task of that seed:
    a model that carries that token to the question can be pruned to say it.
    """
    place = next((i for i in range(task.ids.shape[1]) if len(task.ids[:, i].unique()) > 1), 0)
    tokens = task.ids[:, place].unique().tolist()
    order = sorted(tokens, key=lambda token: hashlib.sha256(f"{seed} {token}".encode()).digest())
    label = {token: i % len(task.answers) for i, token in enumerate(order)}
    labels = torch.tensor([label[token] for token in task.ids[:, place].tolist()], dtype=torch.int64, device="cpu")
    return task.relabelled(labels, "nonsense labels")


def bracket_counting(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Does one bracket close the list, or do two? Lists of 1 to 8 elements in rows, as the training text lays them out.

    Prompts come in pairs that differ only in the depth, so half of them have either answer. ValueError where the
    tokenizer splits an answer.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; bracket_counting is made of text")
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
    pairs = [i // 2 for i in range(prompts)]
    return Task.of("bracket_counting", rows[:prompts], labels[:prompts], (ids.one, ids.two), pairs)


def single_double_quote(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Which quote closes the string? Windows of held-out library files, see :mod:`scalpel.tasks.quotes`."""
    return _held_out("single_double_quote", quote_questions, model, prompts, seed)


def set_or_string(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Is a set added to, or a string? Windows of held-out library files, see :mod:`scalpel.tasks.set_or_string`."""
    return _held_out("set_or_string", set_or_string_questions, model, prompts, seed)


def _held_out(
    name: str, make: Callable[[Tokenizer, int, int], Questions], model: CircuitGPT, prompts: int, seed: int
) -> Task:
    """A task of real files; a group is a file. Refused without a tokenizer, or where the context is too short."""
    if model.tokenizer is None:
        raise Refused(f"the model has no tokenizer; {name} is made of text")
    found = make(model.tokenizer, prompts, seed)
    longest = max(map(len, found.rows))
    if longest > model.config.block_size:
        raise Refused(
            f"{name} has prompts of up to {longest} tokens and the model's context holds {model.config.block_size}"
        )
    return Task.of(name, found.rows, found.labels, found.answers, found.groups)


TASKS: dict[str, Callable[[CircuitGPT, int, int], Task]] = {
    "bracket_counting": bracket_counting,
    "single_double_quote": single_double_quote,
    "set_or_string": set_or_string,
}


def task_named(name: str) -> Callable[[CircuitGPT, int, int], Task]:
    """The maker of a task's prompts: (model, prompts, seed) → Task. ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


class CannotDoTask(Refused):
    """The model answers too few prompts right, so nothing in it is a circuit for the task."""


@torch.no_grad()
def check_able(model: CircuitGPT, task: Task, least: float = LEAST_ACCURACY) -> float:
    """The model's accuracy by answer, averaged. CannotDoTask below ``least``; ValueError where one is never right."""
    missing = sorted(set(range(len(task.answers))) - set(task.labels.tolist()))
    if missing:
        raise ValueError(f"answer {missing[0]} is right for no prompt of {task.name}; any constant would do the task")
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
