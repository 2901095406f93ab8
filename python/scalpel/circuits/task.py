"""Tasks for circuits: prompts, each with one question and the possible answers."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..hooks.standing import stood_for
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
    """Prompts that each end in a question, with its possible answers and the right one.

    Attributes:
        name: The name of the task.
        ids: Token ids, int64 (prompts, length), padded on the right.
        mask: Where ids are not padding, bool (prompts, length).
        asked: The position of each question's last token, (prompts,).
        answers: The token ids to choose among.
        labels: The number of the right answer, (prompts,).
        groups: The group of each prompt, (prompts,). Prompts of one group come from one draw and are resampled
            together.

    Example:
        >>> task = scalpel.circuits.Task.of("echo", rows=[[5, 6], [7]], labels=[0, 1], answers=[6, 7])
        >>> task.prompt(0), task.part(slice(1, 2)).ids.tolist()
        ((5, 6), [[7]])
        >>> task.relabelled(torch.tensor([1, 0]), "opposite").labels
        tensor([1, 0])
        >>> len(task.unseen(task.part(slice(0, 1)))), len(task.digest())
        (1, 64)
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
        """Select some of the prompts, and cut the padding that they do not need.

        Args:
            rows: Their numbers, as a slice or a tensor.

        Returns:
            A task with these prompts.
        """
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
        """Replace the labels and the name, and keep the prompts.

        Args:
            labels: The new labels, int64 (prompts,).
            name: The new name.

        Returns:
            The new task.
        """
        return replace(self, labels=labels, name=name)

    def prompt(self, row: int) -> tuple[int, ...]:
        """Return a prompt's token ids without padding.

        Args:
            row: The number of the prompt.

        Returns:
            The ids.
        """
        return tuple(self.ids[row, : int(self.asked[row]) + 1].tolist())

    def unseen(self, *others: "Task") -> "Task":
        """Remove repeated prompts, and groups that share a prompt with other tasks.

        Args:
            *others: The other tasks.

        Returns:
            A task with the remaining prompts.

        Raises:
            ValueError: If no prompt remains.
        """
        seen = {other.prompt(row) for other in others for row in range(len(other))}
        repeated: set[int] = set()
        for row in range(len(self)):
            prompt, group = self.prompt(row), int(self.groups[row])
            if prompt in seen:
                repeated.add(group)
            seen.add(prompt)
        kept = torch.tensor(
            [row for row in range(len(self)) if int(self.groups[row]) not in repeated], dtype=torch.long, device="cpu"
        )
        if len(kept) == 0:
            raise ValueError(f"every prompt of {self.name} was seen before; use another seed or more prompts")
        return self.part(kept)

    def digest(self) -> str:
        """Compute the SHA-256 of prompts, questions, answers and labels.

        Returns:
            The digest, in hexadecimal.
        """
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
        """Build a task from prompts as lists of token ids.

        Args:
            name: The name of the task.
            rows: The prompts.
            labels: The number of the right answer of each prompt.
            answers: The token ids to choose among, at least two.
            groups: The group of each prompt; None makes each prompt a group of its own.

        Returns:
            The task.

        Raises:
            ValueError: If the lengths do not fit, a prompt is empty, a label is not the number of an answer, or answers
                repeat.

        Example:
            >>> scalpel.circuits.Task.of("echo", rows=[[5, 6], [7]], labels=[0, 1], answers=[6, 7]).ids
            tensor([[5, 6],
                    [7, 0]])
        """
        if len(rows) != len(labels) or not rows:
            raise ValueError(
                f"{len(rows)} prompts and {len(labels)} labels; one label per prompt is needed, and at least one prompt"
            )
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
        group_of_row = list(range(len(rows))) if groups is None else list(groups)
        return cls(
            name,
            ids,
            mask,
            lengths - 1,
            tuple(answers),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
            torch.tensor(group_of_row, dtype=torch.int64, device="cpu"),
        )


def answer_logits(model: CircuitGPT, task: Task, batch: int = 64) -> Tensor:
    """Compute the logits of the answers at each question, (prompts, answers), on the CPU.

    Raises:
        Refused: If an answer is not in the vocabulary, or a logit is not finite.
    """
    if max(task.answers) >= model.config.vocab_size:
        raise Refused(f"answer {max(task.answers)} is not a token; the vocabulary has {model.config.vocab_size}")
    logits_of_parts = []
    for i in range(0, len(task), batch):
        part = task.part(slice(i, i + batch))
        logits = model(part.ids)  # causality hides the padding on the right
        logits_of_parts.append(logits[torch.arange(len(part), device="cpu"), part.asked][:, list(task.answers)].cpu())
    all_logits = torch.cat(logits_of_parts)
    if not bool(torch.isfinite(all_logits).all()):
        raise Refused(f"the model's logits of the answers of {task.name} aren't finite; it has no answer")
    return all_logits


def nonsense(task: Task, seed: int) -> Task:
    """Relabel the prompts in a way that has nothing to do with the task, but could be learned.

    Each token at the first position where prompts differ is assigned a random answer, the same in every task with that
    seed. A model that carries this token to the question can be pruned to give that answer.
    """
    position = next((i for i in range(task.ids.shape[1]) if len(task.ids[:, i].unique()) > 1), 0)
    tokens = task.ids[:, position].unique().tolist()
    order = sorted(tokens, key=lambda token: hashlib.sha256(f"{seed} {token}".encode()).digest())
    label = {token: i % len(task.answers) for i, token in enumerate(order)}
    labels = torch.tensor([label[token] for token in task.ids[:, position].tolist()], dtype=torch.int64, device="cpu")
    return task.relabelled(labels, "nonsense labels")


def bracket_counting(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Make prompts that ask whether one bracket closes a list or two.

    The lists have 1 to 8 elements in rows, laid out as in the training text. Prompts come in pairs that differ only in
    the depth of the list, so each answer is right for half of them.

    Args:
        model: The model, whose tokenizer is used.
        prompts: How many prompts to make.
        seed: The seed of all random choices.

    Returns:
        The task.

    Raises:
        Refused: If the model has no tokenizer.
        ValueError: If the tokenizer splits an answer.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> task = scalpel.circuits.bracket_counting(model, prompts=4, seed=0)
        >>> model.tokenizer.decode(task.prompt(0)), task.labels.tolist()
        ('<s>a = [3, None, x', [0, 1, 0, 1])
    """
    model = stood_for(model)
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
    """Make prompts from library files that ask which quote closes a string; see :mod:`scalpel.tasks.quotes`."""
    return _held_out("single_double_quote", quote_questions, model, prompts, seed)


def set_or_string(model: CircuitGPT, prompts: int, seed: int) -> Task:
    """Make prompts that ask whether a set is added to or a string; see :mod:`scalpel.tasks.set_or_string`."""
    return _held_out("set_or_string", set_or_string_questions, model, prompts, seed)


def _held_out(
    name: str, make: Callable[[Tokenizer, int, int], Questions], model: CircuitGPT, prompts: int, seed: int
) -> Task:
    """Make a task from real files, each of which is a group."""
    if model.tokenizer is None:
        raise Refused(f"the model has no tokenizer; {name} is made of text")
    questions = make(model.tokenizer, prompts, seed)
    longest = max(map(len, questions.rows))
    if longest > model.config.block_size:
        raise Refused(
            f"{name} has prompts of up to {longest} tokens and the model's context holds {model.config.block_size}"
        )
    return Task.of(name, questions.rows, questions.labels, questions.answers, questions.groups)


TASKS: dict[str, Callable[[CircuitGPT, int, int], Task]] = {
    "bracket_counting": bracket_counting,
    "single_double_quote": single_double_quote,
    "set_or_string": set_or_string,
}


def task_named(name: str) -> Callable[[CircuitGPT, int, int], Task]:
    """Return the function (model, prompts, seed) → Task that makes a task's prompts.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


class CannotDoTask(Refused):
    """The model answers too few prompts correctly, so no part of it is a circuit for the task."""


@torch.no_grad()
def check_able(model: CircuitGPT, task: Task, least: float = LEAST_ACCURACY) -> float:
    """Check that the model does the task, and return its accuracy averaged over the answers.

    Raises:
        CannotDoTask: If the accuracy is below ``least``.
        ValueError: If an answer is right for no prompt.
    """
    missing = sorted(set(range(len(task.answers))) - set(task.labels.tolist()))
    if missing:
        raise ValueError(
            f"answer {missing[0]} is right for no prompt of {task.name}; a constant answer would do the task"
        )
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
            f"{least:.0%} is required. A circuit for what a model doesn't do is an artefact."
        )
    return accuracy
