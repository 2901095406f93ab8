"""The items of an evaluation: prompts with the tokens that a model should think of on its way, and where to look."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attached.model import AttachedModel
from ..attached.text import Text
from ..words import Words

__all__ = ["Item", "read_items"]

_ALLOWED = 'the path of a file {"items": [{"name", "prompt", "intermediates", "target"?}]}, or a list of such items'
READ_AT = ("last", "newline")


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        name: Its name.
        text: The prompt, cut behind the token that is read.
        position: The place of this token.
        tokens: For each intermediate, the tokens that count as it: its spellings of one token each.
        excluded: The intermediates without such a spelling, which aren't scored.
    """

    name: str
    text: Text
    position: int
    tokens: tuple[tuple[int, ...], ...]
    excluded: tuple[str, ...]


def read_items(items: Any, model: AttachedModel, read_at: str) -> list[Item]:
    """Read items in the published form.

    The token that is read is the one just before ``target``: the last one of the prompt without white space at its end,
    and without the target if the prompt ends with it. With ``read_at="newline"`` it is the token of the prompt's last
    newline, which in a couplet ends the first line.

    An intermediate is a string, or a list of spellings of one thing. A spelling counts if it is one token, with a space
    before it or without; the first fragment of a longer one never counts as the whole.

    Raises:
        ValueError: There are no items, an item lacks something, or nothing can be read of it.
        TypeError: Something else was given.
    """
    if read_at not in READ_AT:
        raise ValueError(f"read_at is {read_at!r}; allowed: {', '.join(map(repr, READ_AT))}")
    if isinstance(items, str | Path):
        try:
            items = json.loads(Path(items).expanduser().read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"the file of items is no JSON: {error}") from error
    if isinstance(items, Mapping):
        items = items.get("items")
    if not isinstance(items, Iterable) or isinstance(items, str | bytes):
        raise TypeError(f"items is {type(items).__name__}; allowed: {_ALLOWED}")
    found = [_item(entry, number, model, read_at) for number, entry in enumerate(items)]
    if not found:
        raise ValueError(f"there are no items; allowed: {_ALLOWED}")
    return found


def _item(entry: Any, number: int, model: AttachedModel, read_at: str) -> Item:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str) or "intermediates" not in entry:
        raise ValueError(f"item {number} has no prompt, or no intermediates; allowed: {_ALLOWED}")
    name, prompt = str(entry.get("name", number)), entry["prompt"]
    target = entry.get("target")
    if read_at == "newline":
        if "\n" not in prompt:
            raise ValueError(f'item {name!r} has a prompt without a newline, and read_at="newline" reads the last one')
        cut = prompt[: prompt.rindex("\n") + 1]
    else:
        cut = prompt.rstrip()
        if isinstance(target, str) and target.strip() and cut.endswith(f" {target.strip()}"):
            cut = cut.removesuffix(target.strip()).rstrip()
    if not cut:
        raise ValueError(f"item {name!r} has nothing before what is read: its prompt is {prompt!r}")
    words = model.words
    if words is None:
        raise ValueError("items are texts, and the model has no tokenizer of its own: give tokenizer= to attach")
    text = model.text(words.encode(cut))
    tokens, excluded = [], []
    for intermediate in entry["intermediates"]:
        spellings = [intermediate] if isinstance(intermediate, str) else list(intermediate)
        single: list[int] = []
        for spelling in spellings:
            for form in (f" {spelling.strip()}", spelling.strip()):
                single += _alone(words, form)
        if single:
            tokens.append(tuple(dict.fromkeys(single)))
        else:
            excluded.append(" / ".join(spellings))
    assert text.ids is not None
    return Item(name, text, len(text.ids) - 1, tuple(tokens), tuple(excluded))


def _alone(words: Words, form: str) -> list[int]:
    """The token that a spelling is; none where it is several, or the tokenizer has none for it."""
    try:
        ids = words.encode_alone(form)
    except ValueError:
        return []
    return ids if len(ids) == 1 else []
