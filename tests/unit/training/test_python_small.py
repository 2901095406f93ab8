"""python-small: real windows with statements in which only the brackets reveal the depth, fused attention, and a
card.
"""

import ast
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from bracket_fixtures import SOURCES, small_tokenizer
from scalpel.models.circuitgpt.attention import fused_training
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.tasks.literals import literals_of
from scalpel.tasks.source_files import source_file
from scalpel.training import python_small
from scalpel.training.python_text import PythonCourse, PythonText

SOURCE = '''"""A module."""

import os

# an unmatched [ in a comment
TABLE = [[1, 2], [3, 4]]


class Thing:
    names = ["a", "b"]

    def method(self, x):
        if x:
            y = x[0]
            return y
        elif x is None:
            return [1, 2]
        return {"k": [1]}
'''


@pytest.fixture(scope="module")
def text():
    one = source_file(SOURCE)
    assert one is not None
    return PythonText((one,), SOURCES)


def test_places_stand_between_statements_and_lists_are_known():
    one = source_file(SOURCE)
    lines = SOURCE.split("\n")
    assert {lines[n].strip() for n in one.lists} == {"TABLE = [[1, 2], [3, 4]]", 'names = ["a", "b"]', "return [1, 2]"}
    for place in one.places:
        assert place.line not in one.lists
        assert len(lines[place.line]) - len(lines[place.line].lstrip()) == place.indent
    assert not any(lines[place.line].lstrip().startswith("elif") for place in one.places)
    assert source_file("x = (") is None and source_file("") is None


def test_windows_hold_no_real_list_statement_and_parse_where_they_begin_at_the_top(text):
    seen = 0
    for seed in range(60):
        window, longest = text.window(np.random.default_rng(seed), 10_000)
        assert "TABLE" not in window and "names" not in window
        if window.startswith('"""A module'):
            # From "if x" only the list may be removed; the rest is valid Python up to the emptied elif.
            head = window.split("class Thing")[0]
            ast.parse(head)
            seen += 1
        assert longest <= 64
    assert seen


def test_depth_is_drawn_independently_of_the_number_of_elements(text):
    """P(depth | elements) is the same for short and long lists, so the length does not reveal the depth."""
    rng = np.random.default_rng(0)
    counts = {True: Counter(), False: Counter()}
    for _ in range(2500):
        window, _ = text.window(rng, 3000)
        for literal in literals_of(_dedented(window)):
            counts[literal.elements > 4][literal.depth] += 1
    long, short = ({d: n / sum(c.values()) for d, n in c.items()} for c in (counts[True], counts[False]))
    assert min(sum(c.values()) for c in counts.values()) > 1000
    for depth in (1, 2, 3):
        assert long[depth] == pytest.approx(short[depth], abs=0.04)


def _dedented(window):
    """The statements of a window that end in a list, separated so that each parses wherever the window begins."""
    lines, found = window.split("\n"), []
    for i, line in enumerate(lines):
        for end in range(i + 1, min(i + 40, len(lines)) + 1):
            piece = "\n".join(one[len(line) - len(line.lstrip()) :] for one in lines[i:end])
            try:
                tree = ast.parse(piece)
            except SyntaxError:
                continue
            if tree.body and piece.endswith("]"):
                found.append(piece)
            break
    return "\n".join(found) + "\n"


def test_any_step_can_be_reached_and_windows_fill_their_length(text):
    recipe = python_small.recipe_of()
    course = PythonCourse(recipe, text, small_tokenizer())
    first = list(islice(course.batches(0), 4))
    (again,) = islice(course.batches(3), 1)
    assert torch.equal(first[3].ids, again.ids) and torch.equal(first[3].positions, again.positions)
    lengths = {batch.ids.shape[1] for batch in first}
    assert len(lengths) > 1 and all(batch.ids[:, 0].eq(0).all() for batch in first)
    assert int(max(batch.positions.max() for batch in first)) < recipe.block_size


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_fused_training_has_the_same_values_and_gradients(sink, masked):
    config = CircuitGPTConfig(
        block_size=12, vocab_size=11, n_layer=2, n_head=2, d_head=3, d_model=6, sink=sink, rms_norm=True
    )
    model = CircuitGPT(config, seed=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sink" in name:
                parameter.normal_()
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9)
    mask[0, 6:] = 0
    inputs = {"attention_mask": mask} if masked else {}
    found = []
    for fused in (False, True):
        model.zero_grad()
        if fused:
            with fused_training():
                logits = model(ids, **inputs)
        else:
            logits = model(ids, **inputs)
        logits[:, :6].square().sum().backward()
        found.append([logits.detach()[:, :6], *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


def test_training_leaves_a_folder_with_its_card(text, tmp_path, monkeypatch):
    monkeypatch.setattr(python_small, "training_files", lambda: text.files)
    monkeypatch.setattr(python_small, "interpreter_sources", lambda: SOURCES)
    monkeypatch.setattr(python_small, "python_tokenizer", lambda text, vocab_size: small_tokenizer())
    monkeypatch.setattr(python_small, "accuracy_card", lambda model: {"all": 0.5})
    card = python_small.train_python(
        tmp_path / "m", lambda trained: {"a task": {"accuracy": 0.25}}, control="no-positions", steps=1
    )
    model = CircuitGPT.from_pretrained(tmp_path / "m")
    assert card["name"] == "python-small-no-positions" and model.card["text"]["files"] == 1
    assert model.card["tasks"] == {"a task": {"accuracy": 0.25}}
    assert not bool(model.transformer.wpe.weight.any()) and not (tmp_path / "m" / "training-state.pt").exists()
    with pytest.raises(ValueError, match="finished model"):
        python_small.train_python(tmp_path / "m", dict)


def test_an_unknown_control_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no-topk.*python-small has none, no-positions"):
        python_small.recipe_of("no-topk")
