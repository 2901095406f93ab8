"""What a model can do: its accuracy at each task, on files that it was not trained on."""

from typing import Any

import numpy as np
import torch

from ..circuits.task import Task, answer_logits
from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.held_out import Questions, balanced, closing_questions, versions
from ..tasks.quotes import quote_questions
from ..tasks.refused import Refused
from ..tasks.set_or_string import set_or_string_questions
from .statistics import bootstrap

__all__ = ["accuracies"]


def accuracies(model: CircuitGPT, prompts: int = 512, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Measure how well a model does each task on held-out files, for its card or a report.

    Args:
        model: The model; it needs a tokenizer.
        prompts: How many prompts are asked in each task.
        seed: Decides which prompts.

    Returns:
        For each task: ``accuracy``, the mean over answers; ``by_answer`` and ``prompts``, by the answer's text;
        ``interval``, the 95 % bootstrap interval over files; ``files``, their number; ``real``, the share of prompts
        into which nothing was put; and ``held_out``, the versions of the packages. A task that can't be asked has
        ``reason`` instead: no tokenizer, a split answer, or too few prompts. Chance is one half everywhere.
    """
    makers = {
        "bracket_counting": closing_questions,
        "single_double_quote": quote_questions,
        "set_or_string": set_or_string_questions,
    }
    balanced(prompts, seed=seed)
    by_task: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        if model.tokenizer is None:
            by_task[name] = {"reason": "the model has no tokenizer, and the prompts are text"}
            continue
        try:
            by_task[name] = _accuracy(model, model.tokenizer, name, make(model.tokenizer, prompts, seed))
        except Refused as error:
            by_task[name] = {"reason": str(error)}
    return by_task


def _accuracy(model: CircuitGPT, tokenizer: Tokenizer, name: str, questions: Questions) -> dict[str, Any]:
    task = Task.of(name, questions.rows, questions.labels, questions.answers, questions.groups)
    if task.ids.shape[1] > model.config.block_size:
        return {"reason": f"prompts have up to {task.ids.shape[1]} tokens, and the context {model.config.block_size}"}
    with torch.no_grad():
        right = (answer_logits(model, task).argmax(-1) == task.labels).numpy()
    labels, files = task.labels.numpy(), np.unique(questions.groups, return_inverse=True)[1]
    texts = [tokenizer.decode([answer]) for answer in task.answers]
    return {
        "accuracy": float(np.mean([right[labels == i].mean() for i in range(len(texts))])),
        "by_answer": {text: float(right[labels == i].mean()) for i, text in enumerate(texts)},
        "prompts": {text: int((labels == i).sum()) for i, text in enumerate(texts)},
        "interval": list(by_file(right, labels, files)),
        "files": int(files.max()) + 1,
        "real": float(np.mean(questions.real)),
        "held_out": versions(),
    }


def by_file(right: np.ndarray, labels: np.ndarray, files: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the accuracy averaged over answers, drawing whole files."""
    answers = range(int(labels.max()) + 1)
    sizes = np.array([np.bincount(files[labels == a], minlength=files.max() + 1) for a in answers])
    hits = np.array([np.bincount(files[(labels == a) & right], minlength=files.max() + 1) for a in answers])

    def accuracy(drawn: np.ndarray) -> float:
        asked = sizes[:, drawn].sum(1)
        return float((hits[:, drawn].sum(1) / asked).mean()) if asked.all() else float("nan")

    return bootstrap(accuracy, int(files.max()) + 1, np.random.default_rng([seed, 44]))
