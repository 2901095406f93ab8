"""bracket-mini: the weight-sparse model that Scalpel ships to be cut open, and its controls."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from .._info import __version__
from ..models.circuitgpt.ablation import hook_means
from ..models.circuitgpt.checkpoint import save_pretrained
from ..models.circuitgpt.model import CircuitGPT
from ..models.tokenizer import Tokenizer
from ..tasks.brackets import Answers, answer, questions_from
from ..tasks.corpus import (
    DEPTH_PROBABILITIES,
    MAX_ELEMENTS,
    MEAN_ELEMENTS,
    Sources,
    documents,
    interpreter_sources,
    reference_prompts,
)
from ..tasks.held_out import NoHeldOutText
from ..tasks.literals import harvest, python_files
from .commit import commit
from .loop import state_file_in, train
from .recipe import Recipe, density_table
from .text import TextCourse
from .tokenizer import train_tokenizer

NAME = "bracket-mini"
CONTROLS: dict[str, dict[str, Any]] = {
    "none": {},
    "no-positions": {"positions": False},
    "no-topk": {"afrac": None},
}
HELD_OUT = ("numpy", "scipy")
CHOSEN = (
    "Recipe and size were chosen after nine trial runs on other sizes, densities and layouts of the text, by the "
    "accuracy on these held-out prompts and by whether the model fails inside its context. That it fails there is "
    "therefore no evidence that such models do, and the accuracy is a little flattered by the choice."
)
SHORT_TOKENS = 48
TOKENIZER_TEXTS = 20_000


def train_model(
    out: Path,
    *,
    control: str = "none",
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train bracket-mini, or one of its controls, into a folder.

    Ctrl-C leaves ``out``/training-state.pt, from which the same call resumes; the file is removed at the end.

    Args:
        out: The folder of the model.
        control: "none", "no-positions" (the position table is zero) or "no-topk" (no activation sparsity).
        seed: Decides the initial weights and the order of the text.
        steps: Optimizer steps; those of the recipe by default.
        progress: Called with (step, steps, loss in nats).

    Returns:
        The card.

    Raises:
        ValueError: For an unknown control, for fewer than one step, or if ``out`` holds a finished model.
    """
    if control not in CONTROLS:
        raise ValueError(f"control is {control!r}; allowed: {', '.join(CONTROLS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more")
    recipe = Recipe(seed=seed, **CONTROLS[control])
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    state_file = state_file_in(out)
    trained_at = commit()  # now, because the source tree may change while the model trains
    sources = interpreter_sources()
    tokenizer = bracket_tokenizer(sources, recipe.vocab_size)
    trained = train(recipe, TextCourse(recipe, sources, tokenizer), state_file, progress)
    model = trained.model.eval()
    model.tokenizer = tokenizer
    model.card = {
        "name": NAME if control == "none" else f"{NAME}-{control}",
        "control": control,
        "controls": {c: f"{NAME}-{c}" for c in CONTROLS if c != "none"} if control == "none" else {},
        "recipe": recipe.to_dict(),
        "chosen": CHOSEN,
        "text": text_facts(sources),
        "commit": trained_at,
        "scalpel": __version__,
        "torch": torch.__version__,
        "loss_nats": trained.loss,
        "longest_list_trained_on_elements": trained.longest,
        "training_seconds": round(trained.seconds, 1),
        "matrices": density_table(model),
        "accuracy": accuracy_card(model),
        "hook_means": stored_means(model, sources),
    }
    save_pretrained(model, out)
    state_file.unlink(missing_ok=True)
    return model.card


def bracket_tokenizer(sources: Sources, vocab_size: int) -> Tokenizer:
    """Learn the tokenizer from generated training texts; it is the same for the same sources."""
    rng = np.random.default_rng(20_000)
    texts = (document.text for document in islice(documents(sources, rng), TOKENIZER_TEXTS))
    return Tokenizer(train_tokenizer(texts, vocab_size))


def stored_means(model: CircuitGPT, sources: Sources) -> dict[str, list[float]]:
    """Average each hook's activations over the training text, to six digits, for ``model.ablate(kind="mean")``."""
    means = hook_means(model, reference_prompts(model, sources))
    return {name: [float(f"{value:.6g}") for value in mean.tolist()] for name, mean in means.items()}


def held_out_questions() -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Return bracket prompts from packages that weren't trained on, and the versions of these packages.

    Raises:
        NoHeldOutText: If a package is missing.
    """
    literals, versions = [], {}
    for package in HELD_OUT:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise NoHeldOutText(f"the package {package} is not installed; its sources are the held-out text")
        literals += list(harvest(python_files(Path(spec.origin).parent)))
        versions[package] = version(package)
    return questions_from(literals), versions


def accuracy_card(model: CircuitGPT) -> dict[str, Any]:
    """Measure the accuracy on short held-out prompts from real library sources, with the number of prompts."""
    questions, versions = held_out_questions()
    answers = answer(model, questions, SHORT_TOKENS)
    return {
        "held_out": versions,
        "most_tokens": SHORT_TOKENS,
        "all": answers.accuracy(),
        "all_interval": _interval(answers),
        "depth_1": answers.accuracy(1),
        "depth_2": answers.accuracy(2),
        "balanced": (answers.accuracy(1) + answers.accuracy(2)) / 2,
        "prompts_depth_1": int((answers.depth == 1).sum()),
        "prompts_depth_2": int((answers.depth == 2).sum()),
        "longer_prompts_left_out": answers.skipped_too_long,
    }


def _interval(answers: Answers, resamples: int = 1000) -> list[float]:
    drawn = bootstrap(
        (answers.right,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return [float(end) for end in drawn.confidence_interval]


def text_facts(sources: Sources) -> dict[str, Any]:
    """Say what the training text was made of."""
    import platform

    return {
        "interpreter": platform.python_version(),
        "heads": len(sources.heads),
        "element_runs": len(sources.runs),
        "depth_probabilities": list(DEPTH_PROBABILITIES),
        "mean_elements": MEAN_ELEMENTS,
        "max_elements": MAX_ELEMENTS,
    }
