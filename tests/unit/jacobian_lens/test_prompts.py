"""Prompts in every form that they may have, and tokenizers of every kind, against ids written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

import scalpel
from scalpel.jacobian_lens.fits.prompts import read_prompts
from scalpel.jacobian_lens.words import Words, words_of

A, B = [3, 4, 5, 6], [7, 8, 9]


def read(prompts: Any, words: Words | None = None, most: int = 3) -> list[list[int]]:
    found = list(read_prompts(prompts, words, most))
    assert all(each.shape[0] == 1 and each.dtype == torch.int64 for each in found)
    return [each[0].tolist() for each in found]


def words_with(special: bool = False) -> Words:
    vocabulary = {letter: i for i, letter in enumerate("<>abcdefgh ")}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    if special:
        inner.add_special_tokens(["<", ">"])
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="< $A >", special_tokens=[("<", 0), (">", 1)]
        )
    return Words(inner)


padded = torch.tensor([[0, *B], A])
FORMS = {
    "lists": [A, B],
    "tuples": (tuple(A), tuple(B)),
    "tensors": [torch.tensor(A), torch.tensor([B])],
    "int32": [torch.tensor(A, dtype=torch.int32), torch.tensor([B])],
    "batches": [{"input_ids": padded.flip(0), "attention_mask": (padded.flip(0) > 0).long()}],
    "one batch": {"input_ids": padded.flip(0), "attention_mask": (padded.flip(0) > 0).long()},
    "a generator": (ids for ids in (A, B)),
    "arrays": [np.array(A), np.array([B], dtype=np.uint16)],
    "lists of numpy's integers": [list(np.array(A)), tuple(np.array(B))],
    "what a tokenizer gives of texts of two lengths": {"input_ids": [A, B], "attention_mask": [[1] * 4, [1] * 3]},
    "the same without a mask": {"input_ids": [A, B]},
    "rows of a data set": [{"text": "bcde", "title": "b"}, {"text": "fgh", "title": "f"}],
    "texts": ["bcde", "fgh"],
    "texts and ids": ["bcde", B],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    assert read(FORMS[form], words_with()) == [A[:3], B]


def test_one_prompt_alone() -> None:
    assert read(A) == read(torch.tensor(A)) == read([A]) == read(np.array(A)) == [A[:3]]
    assert read(torch.tensor([A, A])) == read(np.array([A, A])) == [A[:3]] * 2


def test_files(tmp_path: Path) -> None:
    words = words_with(special=True)
    lines, rows, text = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.txt"
    lines.write_text('{"text": "bc"}\n\n"d"\n{"input_ids": [7]}\n')
    rows.write_text(json.dumps(["bc", [7, 8]]))
    text.write_text("abcde")
    assert read(lines, words) == [[0, 3, 4], [0, 5], [7]]
    assert read(str(rows), words) == [[0, 3, 4], [7, 8]]
    assert read(text, words) == [[0, 2, 3], [0, 4, 5], [0, 6]]  # each stretch begins as a text does
    assert read(text, words_with()) == [[2, 3, 4], [5, 6]]
    for name, content, message in (
        ("b.jsonl", "{", "no JSON"),
        ("c.json", '{"a": 1}', "holds a list"),
        ("d.jsonl", '{"tex": "a"}', "neither 'text' nor 'input_ids'"),
        ("e.txt", " \n", "is empty"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, words)
    (tmp_path / "f.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        read(tmp_path / "f.txt", words)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="single string"):
        read("abc", words_with())
    with pytest.raises(ValueError, match="no tokenizer of its own"):
        read(["abc"])
    with pytest.raises(TypeError, match="prompts is int"):
        read(7)
    with pytest.raises(TypeError, match="no integers"):
        read([[1.5]])
    with pytest.raises(ValueError, match="hides tokens"):
        read([{"input_ids": torch.tensor([A]), "attention_mask": torch.tensor([[1, 0, 1, 1]])}])
    assert read([" "], words_with()) == [[]]  # which a fit counts as too short


def test_words() -> None:
    words = words_with(special=True)
    assert (words.opening, words.encode("ab"), words.encode_alone("ab")) == ([0], [0, 2, 3], [2, 3])
    assert [words.piece(i) for i in (2, 3, 99)] == ["a", "b", "<99>"]
    with pytest.raises(ValueError, match="no token for"):
        words.encode("")
    with pytest.raises(TypeError, match="no tokenizer that is known"):
        Words(object())


def test_the_tokenizer_of_a_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    own = words_of(model)
    assert own is not None and own.encode("x = [") == model.tokenizer.encode("x = [")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.inner, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path)
    for given in (fast, tmp_path, str(tmp_path / "tokenizer.json"), model.tokenizer, model.tokenizer.inner, own):
        found = words_of(model, given)
        assert found is not None and found.encode("x = [") == own.encode("x = [")
        assert [found.piece(i) for i in own.encode("x = [")] == ["x", " ", "=", " ", "["]
    assert words_of(tmp_path) is not None
    assert words_of(torch.nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="no tokenizer at"):
        words_of(model, tmp_path / "nowhere")


def test_a_space_before_a_word_is_shown() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"▁a": 0, "b": 1}, merges=[]))
    assert [Words(inner).piece(i) for i in (0, 1)] == [" a", "b"]
