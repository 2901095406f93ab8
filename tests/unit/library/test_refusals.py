"""A model that does not fit an operation is refused with the reason, and other errors are not mistaken for refusals."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import models

import scalpel
from bracket_fixtures import small_tokenizer
from circuitgpt_cases import build, one_thread
from scalpel import experiments
from scalpel.circuits import CannotDoTask, bracket_counting
from scalpel.circuits.task import check_able
from scalpel.experiments import Refused, abilities, suite
from scalpel.experiments.brackets.constructed import threshold_circuit
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.models.tokenizer import Tokenizer
from scalpel.tasks.held_out import NoHeldOutText

__all__ = ["one_thread"]

EVERY = [name for name in experiments.names() if name != "minimal_simulator"]
TEXT = ["dilution", "distractors", "agreement", "causes", "guard", "machine", "mapping", "alignment"]


def small(context: int = 192, layers: int = 2, vocab: int | None = None, tokenizer: Any = "small") -> CircuitGPT:
    tokenizer = small_tokenizer() if tokenizer == "small" else tokenizer
    torch.manual_seed(0)
    config = CircuitGPTConfig(
        block_size=context,
        vocab_size=vocab or (tokenizer.vocab_size if tokenizer else 40),
        n_layer=layers,
        d_model=12,
        d_head=4,
        n_head=3,
    )
    model = CircuitGPT(config).eval()
    model.tokenizer = tokenizer
    return model


@cache
def characters() -> Tokenizer:
    signs = ["\n", *map(chr, range(32, 127))]
    return Tokenizer(Inner(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[])))


def spoiled(value: float, parameter: str) -> CircuitGPT:
    model = small()
    with torch.no_grad():
        model.get_parameter(parameter).fill_(value)
    return model


def empty() -> CircuitGPT:
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


# The fault of a model, the text of the refusal, and the experiments that refuse.
MODELS: dict[str, tuple[Callable[[], CircuitGPT], str, list[str]]] = {
    "no tokenizer": (lambda: small(tokenizer=None), "no tokenizer.*text", TEXT),
    "an answer that is split": (lambda: small(tokenizer=characters()), r"splits an answer.*2 tokens", TEXT),
    "a short context": (lambda: small(40), "context holds 40 tokens", ["dilution", "causes", "mapping", "alignment"]),
    "a middling context": (
        lambda: small(100),
        r"context holds 100.*from 0 to 36",
        ["distractors", "agreement", "guard"],
    ),
    "a context of one": (lambda: small(1), "context holds 1 token", ["depth", "orbits", "mapping"]),
    "no layer": (lambda: small(layers=0), "no layer", EVERY),
    "too many tokens": (lambda: small(vocab=50), f"tokenizer has {small_tokenizer().vocab_size} tokens.* 50", EVERY),
    "NaN": (lambda: spoiled(float("nan"), "transformer.h.1.mlp.c_proj.weight"), "aren't finite", EVERY),
    "infinity": (lambda: spoiled(float("inf"), "lm_head.weight"), "aren't finite", ["dilution", "orbits"]),
    "no direction": (empty, "all blocks.*zero or not finite", ["orbits"]),
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, (*_, names) in MODELS.items() for name in names])
def test_what_lies_in_the_model_is_refused(what: str, name: str) -> None:
    make, says, _ = MODELS[what]
    with pytest.raises(Refused, match=says) as caught:
        experiments.run(name, make())
    assert isinstance(caught.value, ValueError)


def test_what_no_model_could_be_asked_is_no_refusal() -> None:
    for name, options in (
        ("dilution", {"prompts": 1}),
        ("dilution", {"offsets": -1}),
        ("mapping", {"amounts": (1, 2)}),
    ):
        with pytest.raises(ValueError) as caught:
            experiments.run(name, small(), **options)
        assert not isinstance(caught.value, Refused)
    with pytest.raises(TypeError, match="model is Linear"):
        experiments.run("dilution", torch.nn.Linear(2, 2))


def test_a_model_without_weights_can_be_asked_for_directions() -> None:
    result = experiments.run("alignment", empty(), prompts=4, resamples=20, draws=99, nulls=())
    assert result.verdict == "not testable here"


def test_extractions_and_circuits_refuse_with_the_same_exception() -> None:
    alphabet, answers = ["a", "b"], ["]\n", "]]\n"]
    for model, says in (
        (small(tokenizer=None), "no tokenizer"),
        (small(tokenizer=characters()), "splits the answer"),
        (small(8), "context holds"),
        (spoiled(float("nan"), "lm_head.weight"), "aren't finite"),
    ):
        with pytest.raises(Refused, match=says):
            scalpel.semigroup.extract(model, alphabet, answers, prefix="x = ", horizon=2, nulls=False)
    for model in (small(tokenizer=None), small(tokenizer=characters())):
        with pytest.raises(Refused):
            bracket_counting(model, 8, 0)
    assert issubclass(CannotDoTask, Refused)
    with pytest.raises(CannotDoTask, match="accuracy"):
        check_able(small(), bracket_counting(small(), 8, 0))


# ---- the suite ---------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """What each experiment does with the model, by name; experiments without an entry give a result."""
    instead: dict[str, Callable[[], Any]] = {}
    found = experiments.run("minimal_simulator", None, k_max=3, n_max=30, samples=3)

    def run(name: str, model: Any, **_: Any) -> Any:
        return instead[name]() if name in instead else found

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(suite, "_accuracy", lambda _: {})
    return instead


def refuse() -> None:
    raise Refused("this one can't be asked")


def broken() -> np.ndarray:
    return np.zeros(3) + np.zeros(4)


def test_the_suite_goes_on_after_a_refusal(told: dict[str, Callable[[], Any]]) -> None:
    told |= {"causes": refuse, "orbits": refuse}
    found = suite.run_suite(small())
    assert found.refused == {"causes": "this one can't be asked", "orbits": "this one can't be asked"}
    assert len(found.results) == len(experiments.names()) - 2


@pytest.mark.parametrize(
    "bug", [broken, lambda: int("x"), lambda: {}["x"], lambda: scalpel.topk_mask(torch.ones(2), 3)]
)
def test_the_suite_raises_what_is_no_refusal(told: dict[str, Callable[[], Any]], bug: Callable[[], Any]) -> None:
    told |= {"causes": refuse, "mapping": bug}
    with pytest.raises((ValueError, KeyError)) as caught:
        suite.run_suite(small())
    assert caught.value.__notes__ == ["in the experiment 'mapping'"]
    assert bug.__name__ in [entry.name for entry in caught.traceback]


def test_accuracy_that_can_not_be_asked_is_told_from_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    mini = import_module("scalpel.training.bracket_mini")
    monkeypatch.setattr(mini, "held_out_questions", lambda: ([("x = [[a, b", 2), ("x = [a, b", 1)], {}))
    for model, says in ((small(tokenizer=None), "no tokenizer"), (small(8), "context holds 8")):
        assert says in suite._accuracy(model)["not_asked"]
    assert suite._accuracy(small())["prompts_depth_2"] == 1
    for error, known in ((NoHeldOutText("numpy is not installed"), True), (ValueError("bug"), False)):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(mini, "held_out_questions", fail)
        if known:
            assert suite._accuracy(small()) == {"not_asked": "numpy is not installed"}
        else:
            with pytest.raises(ValueError, match="bug"):
                suite._accuracy(small())


# ---- parts of experiments that go on without what is refused -----------------------------------------


def circuit() -> CircuitGPT:
    return threshold_circuit(small_tokenizer(), 0.05, block_size=192)


PARTS = {
    "experiments.brackets.dilution": ("read_short", lambda module: module._short_contexts(circuit(), (2, 3), 0)[1]),
    "experiments.brackets.agreement": ("read_short", lambda module: module._short_contexts(circuit(), (2, 3), 0)[1]),
    "experiments.brackets.guard": ("calibrate", lambda module: module._weighted(circuit(), 40.0, 0)[1]),
    "experiments.depth.cascade": ("bracket_counting", lambda module: module.short_prompts(circuit(), 4, 0, 8)[1]),
    "experiments.collapse.model": ("bracket_counting", lambda module: collapse_texts(module)),
    "experiments.abilities": (
        "closing_questions",
        lambda module: [module.accuracies(circuit(), 8)["bracket_counting"]["reason"]],
    ),
}


def collapse_texts(module: Any) -> list[str]:
    left_out: list[str] = []
    module._sample(circuit(), 256, 0, left_out)
    return left_out


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_refused_is_left_out_and_a_bug_is_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"scalpel.{name}")
    part, go = PARTS[name]
    others = {"quote_questions", "set_or_string_questions"} if module is abilities else set()
    for other in others:  # these two read many files
        monkeypatch.setattr(module, other, lambda *_: refuse())
    monkeypatch.setattr(module, part, lambda *_, **__: refuse())
    assert any("this one can't be asked" in note for note in go(module))
    monkeypatch.setattr(module, part, lambda *_, **__: broken())
    with pytest.raises(ValueError, match="broadcast"):
        go(module)


def test_only_products_that_are_not_finite_cost_the_sweeps_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalpel.jacobians import svd
    from scalpel.jacobians.depth import products

    model, ids = build("plain"), torch.tensor([[1, 2, 3, 4]])
    found = scalpel.lyapunov(model, ids, 3).exponents
    monkeypatch.setattr(products, "is_small", lambda *_: False)  # a product of any size is searched
    for error in (svd.NotFinite("out of range"), ValueError("bug")):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(products._Walk, "_search", fails)
        if isinstance(error, svd.NotFinite):
            torch.testing.assert_close(scalpel.lyapunov(model, ids, 3).exponents, found, rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(ValueError, match="bug"):
                scalpel.lyapunov(model, ids, 3)
