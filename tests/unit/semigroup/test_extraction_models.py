"""Extraction from CircuitGPTs: the shipped machine models, swapped caches, and models that cannot be queried."""

import numpy as np
import pytest
import torch

from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.semigroup import MooreMachine, extract
from scalpel.semigroup.extraction.interchange import after_swap
from scalpel.semigroup.extraction.questions import ModelQuestions


@pytest.fixture(scope="module")
def mod3():
    return CircuitGPT.from_pretrained("mod3-mini")


@pytest.mark.parametrize("name", ["flip-flop-mini", "parity-mini"])  # mod3-mini: the README's example
def test_the_shipped_models_are_their_machines(name):
    model = CircuitGPT.from_pretrained(name)
    card = model.card["machine"]
    trained_on = MooreMachine(tuple(card["letters"]), tuple(map(tuple, card["transitions"])), tuple(card["outputs"]))
    found = extract(model, card["letters"], card["outputs"], prefixes=64, pairs=112, nulls=False)
    assert found.verdict == "finite", found.reasons
    assert found.machine.equivalent(trained_on)
    semigroup = found.semigroup()
    groups = sorted(group.name for group in semigroup.groups())
    assert (semigroup.size, groups) == {
        "Z_2": (2, ["Z_2"]),
        "flip-flop": (3, ["trivial", "trivial"]),
    }[card["known_as"]]


def test_swapped_caches_are_the_other_prefix(mod3):
    """With its cache replaced by that of v, a causal model answers as after v: the cache is the whole state."""
    questions = ModelQuestions(mod3, ["a", "b"], ["0", "1", "2"])
    rng = np.random.default_rng(1)
    triples = [tuple(tuple(rng.integers(2, size=n).tolist()) for n in (6, 6, 4)) for _ in range(20)]
    swapped = after_swap(questions, triples)
    assert swapped == questions.ask([v + w for _, v, w in triples]).tolist()
    before = questions.ask([u + w for u, _, w in triples]).tolist()
    assert swapped != before


def test_a_model_is_asked_after_prefix_word_and_suffix(mod3):
    questions = ModelQuestions(mod3, {"one": "a", "two": "aa"}, {"zero": "0", "1": "1", "2": "2"}, prefix="a")
    words = [(), (0,), (1,), (0, 1, 1), (1, 1, 1, 0)]
    counts = [1 + sum(1 + letter for letter in word) for word in words]
    said = [questions.output(number) for number in questions.ask(words)]
    assert said == [["zero", "1", "2"][count % 3] for count in counts]
    with torch.no_grad():
        logits = mod3(torch.tensor([questions.ids((0, 1))]))[0, -1]
    assert questions.choose(logits) == questions.ask([(0, 1)])[0]
    along = ModelQuestions(mod3, ["a", "b"], ["0", "1", "2"]).ask([(0, 0, 1), (0,), (0, 0)])
    apart = [ModelQuestions(mod3, ["a", "b"], ["0", "1", "2"]).ask([w])[0] for w in [(0, 0, 1), (0,), (0, 0)]]
    assert along.tolist() == apart == [2, 1, 2]


def test_what_a_model_can_not_be_asked(mod3):
    with pytest.raises(ValueError, match="splits the answer 'ab'"):
        extract(mod3, ["a", "b"], ["0", "ab"])
    with pytest.raises(ValueError, match="at least two"):
        extract(mod3, ["a", "b"], ["0"])
    with pytest.raises(ValueError, match="answers is missing"):
        extract(mod3, ["a", "b"])
    with pytest.raises(ValueError, match="a horizon of at most 4"):
        extract(mod3, ["a", "b"], ["0", "1", "2"], horizon=5)
    with pytest.raises(ValueError, match="not all different"):
        extract(mod3, ["a", "b"], {"x": "0", "y": "0"})
    bare = CircuitGPT(mod3.config)
    with pytest.raises(ValueError, match="no tokenizer"):
        extract(bare, ["a"], ["0", "1"])


def test_a_model_whose_logits_are_no_numbers_has_no_answer(mod3):
    broken = CircuitGPT.from_pretrained("mod3-mini")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="aren't finite"):
        extract(broken, ["a", "b"], ["0", "1", "2"])


def test_a_letter_without_text(mod3):
    with pytest.raises(ValueError, match="letter 'nothing' has no text"):
        extract(mod3, {"a": "a", "nothing": ""}, ["0", "1"])
