"""python-small: a weight-sparse model of real Python code, several times as large as bracket-mini, and its control."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._info import __version__
from ..models.circuitgpt.ablation import hook_means
from ..models.circuitgpt.checkpoint import save_pretrained
from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.brackets import closers
from ..tasks.corpus import DEPTH_PROBABILITIES, MAX_ELEMENTS, MEAN_ELEMENTS, interpreter_sources
from .bracket_mini import accuracy_card
from .commit import commit
from .loop import state_file_in, train
from .python_text import LIST_SHARE, PAIR_SHARE, PythonCourse, PythonText, training_files
from .recipe import Recipe, density_table
from .tokenizer import PROSE_PIECES, train_tokenizer

NAME = "python-small"
CONTROLS: dict[str, dict[str, Any]] = {"none": {}, "no-positions": {"positions": False}}
TOKENIZER_WINDOWS = 3000
STEPS = 1800


def recipe_of(control: str = "none", seed: int = 0, steps: int = STEPS) -> Recipe:
    """Return the recipe: three layers of width 192 with eight heads. ValueError for an unknown control."""
    if control not in CONTROLS:
        raise ValueError(f"control is {control!r}; python-small has {', '.join(CONTROLS)}")
    return Recipe(
        d_model=192,
        n_layer=3,
        d_head=24,
        vocab_size=2048,
        batch=16,
        steps=steps,
        tokenizer_name=NAME,
        seed=seed,
        **CONTROLS[control],
    )


def python_tokenizer(text: PythonText, vocab_size: int) -> Tokenizer:
    """Learn the tokenizer from windows of the training text; it is the same for the same sources."""
    rng = np.random.default_rng(20_000)
    windows = (text.window(rng, 2000)[0] for _ in range(TOKENIZER_WINDOWS))
    return Tokenizer(train_tokenizer(windows, vocab_size, PROSE_PIECES))


def train_python(
    out: Path,
    task_accuracies: Callable[[CircuitGPT], dict[str, Any]],
    *,
    control: str = "none",
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train python-small, or its twin without positions, into a folder.

    Training that was stopped goes on from ``out``/training-state.pt when it is called again.

    Args:
        out: The folder of the model.
        task_accuracies: Measures how well the trained model does its tasks; what it returns stands in the card under
            "tasks". It is :func:`scalpel.experiments.abilities.accuracies` on the command line.
        control: "none", or "no-positions" for the twin whose position table is zero.
        seed: Decides the initial weights and the order of the text.
        steps: Optimizer steps; those of the recipe by default.
        progress: Called with (step, steps, loss in nats).

    Returns:
        The card.

    Raises:
        ValueError: For an unknown control, for fewer than one step, or where ``out`` holds a finished model.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more")
    recipe = recipe_of(control, seed)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    state_file = state_file_in(out)
    trained_at = commit()  # now, because the source tree may change while the model trains
    text = PythonText(training_files(), interpreter_sources())
    tokenizer = python_tokenizer(text, recipe.vocab_size)
    trained = train(recipe, PythonCourse(recipe, text, tokenizer), state_file, progress)
    model = trained.model.eval()
    model.tokenizer = tokenizer
    model.card = {
        "name": NAME if control == "none" else f"{NAME}-{control}",
        "control": control,
        "controls": {c: f"{NAME}-{c}" for c in CONTROLS if c != "none"} if control == "none" else {},
        "recipe": recipe.to_dict(),
        "text": text_facts(text),
        "commit": trained_at,
        "scalpel": __version__,
        "torch": torch.__version__,
        "loss_nats": trained.loss,
        "longest_list_trained_on_elements": trained.longest,
        "training_seconds": round(trained.seconds, 1),
        "matrices": density_table(model),
        "accuracy": accuracy_card(model),
        "tasks": task_accuracies(model),
        "hook_means": _stored_means(model, text),
    }
    save_pretrained(model, out)
    state_file.unlink(missing_ok=True)
    return model.card


def _stored_means(model: CircuitGPT, text: PythonText, count: int = 128) -> dict[str, list[float]]:
    """Average each hook's activations over windows of the training text, to six digits."""
    assert model.tokenizer is not None
    rng = np.random.default_rng(30_000)
    start = closers(model.tokenizer).start
    rows = [[*start, *model.tokenizer.encode(text.window(rng, 1500)[0])][:256] for _ in range(count)]
    means = hook_means(model, rows)
    return {name: [float(f"{value:.6g}") for value in mean.tolist()] for name, mean in means.items()}


def text_facts(text: PythonText) -> dict[str, Any]:
    """Say what the training text was made of."""
    import platform

    return {
        "interpreter": platform.python_version(),
        "packages": {"torch": torch.__version__},
        "files": len(text.files),
        "statements": sum(len(file.places) for file in text.files),
        "list_share": LIST_SHARE,
        "pair_share": PAIR_SHARE,
        "depth_probabilities": list(DEPTH_PROBABILITIES),
        "mean_elements": MEAN_ELEMENTS,
        "max_elements": MAX_ELEMENTS,
    }
