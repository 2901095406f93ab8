"""Tasks on held-out library files: questions match the file, and a model that cannot answer is at chance."""

import re
from functools import cache

import pytest

from bracket_fixtures import small_tokenizer
from circuitgpt_cases import one_thread
from scalpel.circuits.task import TASKS, CannotDoTask, check_able, task_named
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.circuitgpt.model import CircuitGPT
from scalpel.models.tokenizer import Tokenizer
from scalpel.tasks import held_out, set_or_string
from scalpel.tasks.held_out import Source, window
from scalpel.tasks.quotes import quote_questions
from scalpel.tasks.set_or_string import real_share, set_or_string_questions

__all__ = ["one_thread"]

PLAIN = """
import os


def first(rows):
    seen = set()
    for row in rows:
        if row not in seen:
            seen.add(row)
    return seen


def second(rows):
    text = ''
    other = set()
    other = None
    for row in rows:
        text += row
        other.add(row)
    print("a", 'it is "b"', "it's", r'raw', 'c\\n', '', 'd' 'e', f"{rows}", '''long''')
    return [text, 'f']
"""
DOUBLE = 'import sys\n\nnames = [\'one\']\nnames = ["two", "three"]\nvalue = names[0]\nprint(names, value)\n'


@pytest.fixture
def files(monkeypatch):
    """Two small files in place of the installed packages."""
    monkeypatch.setattr(held_out, "sources", lambda: (Source("a.py", PLAIN), Source("b.py", DOUBLE)))
    set_or_string._uses.cache_clear()
    yield
    set_or_string._uses.cache_clear()


@cache
def tiny(block_size=256):
    model = CircuitGPT(CircuitGPTConfig(block_size, small_tokenizer().vocab_size, 1, 1, d_model=16, d_mlp=16))
    model.tokenizer = small_tokenizer()
    return model.eval()


def texts(found):
    start = held_out.start_of(small_tokenizer())
    assert all(row[: len(start)] == list(start) for row in found.rows)
    return [small_tokenizer().decode(row[len(start) :]) for row in found.rows]


# ---- windows ----------------------------------------------------------------------------------------


def test_a_window_begins_in_front_of_a_statement_and_ends_at_the_question():
    lines = PLAIN.split("\n")
    starts = held_out.statement_lines(held_out.parsed(Source("a.py", PLAIN)))
    line = next(i for i, one in enumerate(lines) if "seen.add" in one)
    end = (line, lines[line].index("seen") + 4)
    sizes = []
    for tokens in range(4, 90, 5):
        row = window(lines, starts, end, line, small_tokenizer(), tokens)
        if row is None:
            continue
        text = small_tokenizer().decode(row)
        assert len(row) <= tokens and text.endswith("seen") and ("\n" + text) in PLAIN
        assert any(lines[i].startswith(text.split("\n")[0]) for i in starts)
        sizes.append(len(row))
    assert sizes == sorted(sizes) and len(set(sizes)) > 3  # a longer window has more lines
    assert window(lines, starts, end, line, small_tokenizer(), 1) is None


# ---- quotes -----------------------------------------------------------------------------------------


def test_only_plain_strings_are_asked(files):
    found = quote_questions(small_tokenizer(), 4, 0)
    said = set()
    for text, label in zip(texts(found), found.labels, strict=True):
        opened = re.search(r"(['\"])([^'\"]*)$", text)
        assert opened and opened[1] == "'\""[label]
        said.add(opened[2])
    assert found.labels == [0, 1, 0, 1] and said <= {"a", "f", "one", "two", "three"}
    with pytest.raises(ValueError, match="2 prompts of ' and 3 of \", and 50"):
        quote_questions(small_tokenizer(), 100, 0)


def test_real_strings_go_on_with_their_quote():
    found = quote_questions(small_tokenizer(), 40, 1)
    assert found.labels == [0, 1] * 20 and all(found.real) and len(set(found.groups)) >= 10
    for text, label, group in zip(texts(found), found.labels, found.groups, strict=True):
        assert text + "'\""[label] in held_out.sources()[group].text
    assert quote_questions(small_tokenizer(), 40, 1) == found != quote_questions(small_tokenizer(), 40, 2)


def test_a_tokenizer_without_the_quote_is_refused_and_says_how_it_splits():
    import tokenizers

    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("ab-q")}, []))
    bytes_only.normalizer = tokenizers.normalizers.Replace("'", "-q")
    with pytest.raises(ValueError, match="2 tokens, not one"):
        quote_questions(Tokenizer(bytes_only), 4, 0)


# ---- sets and strings -------------------------------------------------------------------------------


def test_real_uses_are_the_first_that_add_to_what_was_made(files):
    lines = PLAIN.split("\n")
    uses = [
        (lines[made].strip(), lines[end[0]][: end[1]].strip(), label) for _, made, end, label in set_or_string._uses()
    ]
    assert sorted(uses) == [("seen = set()", "seen", 0), ("text = ''", "text", 1)]  # other was assigned again


def test_prompts_of_sets_and_strings_end_with_the_name_that_was_made():
    found = set_or_string_questions(small_tokenizer(), 120, 0)
    assert found.labels == [0, 1] * 60
    share = real_share(found)
    assert share["real sets"] > 5 and share["real strings"] > 5 and share["put in"] > 20
    assert sum(share.values()) == 120
    for text, label in zip(texts(found), found.labels, strict=True):
        name = re.search(r"(\w+)$", text)[1]
        values = [r"set\(\)", "(''|\"\")"]
        assert re.search(rf"\b{name} = *{values[label]}", text)


def test_what_is_put_in_comes_in_pairs_that_differ_in_the_value_alone():
    found = set_or_string_questions(small_tokenizer(), 120, 0)
    kinds = [set(), set()]
    for text, label, real in zip(texts(found), found.labels, found.real, strict=True):
        if not real:
            kinds[label].add(re.sub(r"= (set\(\)|''|\"\")\n", "= \n", text, count=0))
    assert len(kinds[0] & kinds[1]) >= 20
    assert kinds[0] <= kinds[1] or kinds[1] <= kinds[0]


def test_the_same_first_token_is_refused(monkeypatch):
    monkeypatch.setattr(set_or_string, "APPEND", ".extend(")
    with pytest.raises(ValueError, match="same token"):
        set_or_string_questions(small_tokenizer(), 4, 0)


# ---- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single_double_quote", "set_or_string"])
def test_a_model_that_can_not_is_refused_with_its_accuracy(name):
    task = task_named(name)(tiny(), 32, 0)
    assert task.name == name and task.labels.bincount().tolist() == [16, 16] and name in TASKS
    with pytest.raises(CannotDoTask, match=f"can't do {name}: accuracy .* over 32 prompts"):
        check_able(tiny(), task)
    with pytest.raises(ValueError, match="context holds 8"):
        task_named(name)(tiny(8), 8, 0)
    with pytest.raises(ValueError, match="2 or more"):
        task_named(name)(tiny(), 1, 0)
