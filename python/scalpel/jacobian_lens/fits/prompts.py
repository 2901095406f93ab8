"""The prompts that a lens is fitted on, one after the other, from whatever a user has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sweeps.positions import text_alone
from ..words import Words

__all__ = ["length_of", "mark_of", "read_prompts"]

_ALLOWED = "a list of strings or of token ids, the path of a file, or any iterable of these"


def read_prompts(prompts: Any, words: Words | None, max_tokens: int) -> Iterator[Any]:
    """Read prompts one by one, each cut to its first ``max_tokens`` tokens.

    Args:
        prompts: Strings; ids, (S,) or (N, S), as lists, tensors or arrays; batches with an attention mask; mappings
            with "text"; or the path of a file. A .jsonl file has a prompt in each line, a string or an object with
            "text" or "input_ids"; a .json file has a list of them. Any other file is one text: it is cut into stretches
            of ``max_tokens`` tokens, each of which is a prompt, and each begins with what the tokenizer puts before a
            text, such as BOS.
        words: The tokenizer, for strings.
        max_tokens: The most tokens of a prompt.

    Yields:
        Ids (1, S), int64; or a tensor that holds no ids as it was given, for models that take other inputs.

    Raises:
        ValueError: No tokenizer for a string, an empty file, or a prompt without a token.
        TypeError: Something else was given.
    """
    if isinstance(prompts, str) and Path(prompts).expanduser().is_file():
        prompts = Path(prompts)
    if isinstance(prompts, str):
        raise TypeError(
            f"prompts is a single string, and no file has that name: give [{prompts[:20]!r}] to use it as one prompt"
        )
    if isinstance(prompts, Path):
        yield from _of_file(prompts.expanduser(), words, max_tokens)
        return
    if isinstance(prompts, np.ndarray):
        prompts = torch.from_numpy(prompts) if prompts.dtype.kind in "iu" else list(prompts)
    if isinstance(prompts, Mapping):
        prompts = [prompts]
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is {type(prompts).__name__}; allowed: {_ALLOWED}")
    if _is_one(prompts):
        prompts = [prompts]
    for prompt in prompts:
        yield from _of_one(prompt, words, max_tokens)


def length_of(prompt: Any) -> int:
    """How many tokens a prompt has that :func:`read_prompts` gave."""
    return int(prompt.shape[1])


def mark_of(prompt: Tensor) -> bytes:
    """Bytes that distinguish a prompt from others."""
    raw = prompt.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(prompt.shape)} {prompt.dtype} ".encode() + raw).digest()


def _is_one(prompts: Iterable[Any]) -> bool:
    """Whether the ids of a single prompt were given, rather than several prompts."""
    if isinstance(prompts, Tensor):
        return prompts.dim() == 1
    return isinstance(prompts, list | tuple) and bool(prompts) and all(map(_is_id, prompts))


def _is_id(entry: Any) -> bool:
    return isinstance(entry, int | np.integer) and not isinstance(entry, bool)


def _of_one(prompt: Any, words: Words | None, max_tokens: int) -> Iterator[Any]:
    """The prompt or prompts that one entry holds."""
    if isinstance(prompt, np.ndarray):
        prompt = torch.from_numpy(prompt)
    if isinstance(prompt, Mapping) and "input_ids" not in prompt and isinstance(prompt.get("text"), str):
        prompt = prompt["text"]
    if isinstance(prompt, str):
        if not prompt.strip():
            yield torch.zeros(1, 0, dtype=torch.int64, device="cpu")  # it is counted as too short
            return
        yield _ids(_needed(words).encode(prompt)[:max_tokens])
    elif isinstance(prompt, Mapping):
        yield from _of_batch(prompt, max_tokens)
    elif isinstance(prompt, Tensor):
        if not prompt.dtype.is_floating_point and prompt.dim() == 1:
            prompt = prompt[None]
        if prompt.dtype.is_floating_point or prompt.dtype in (torch.bool, torch.complex64, torch.complex128):
            yield prompt
            return
        if prompt.dim() != 2:
            raise ValueError(f"a prompt has shape {tuple(prompt.shape)}; token ids are (S,) or (N, S)")
        yield from (row[None, :max_tokens].to(torch.int64) for row in prompt)
    elif isinstance(prompt, Iterable):
        ids = list(prompt)
        if not all(map(_is_id, ids)):
            raise TypeError(f"a prompt is a list with entries that are no integers; allowed: {_ALLOWED}")
        yield _ids([int(token) for token in ids[:max_tokens]])
    else:
        raise TypeError(f"a prompt is {type(prompt).__name__}; allowed: {_ALLOWED}")


def _of_batch(batch: Mapping[str, Any], max_tokens: int) -> Iterator[Tensor]:
    """The texts of a batch, without their padding."""
    ids = batch.get("input_ids")
    if isinstance(ids, list) and ids and isinstance(ids[0], list):  # a tokenizer's texts of several lengths
        masks = batch.get("attention_mask") or [[1] * len(row) for row in ids]
        for row, real in zip(ids, masks, strict=True):
            yield from _of_batch({"input_ids": _ids(row), "attention_mask": _ids(list(real))}, max_tokens)
        return
    if isinstance(ids, list | np.ndarray):
        ids = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2):
        raise TypeError("a batch needs 'input_ids', a tensor (S,) or (N, S) of token ids")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, dtype=torch.int64, device=ids.device)
    ids, mask = (value if value.dim() == 2 else value[None] for value in (ids, mask))
    for row, real in zip(ids, mask, strict=True):
        alone = text_alone({"input_ids": row[None], "attention_mask": real[None]})
        yield alone["input_ids"][:, :max_tokens].to(torch.int64)


def _of_file(path: Path, words: Words | None, max_tokens: int) -> Iterator[Any]:
    """The prompts of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} can't be read") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text")
    if path.suffix in (".json", ".jsonl"):
        try:
            lines = [line for line in text.splitlines() if line.strip()]
            entries = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path} holds {type(entries).__name__}; a .json file of prompts holds a list")
        for entry in entries:
            if isinstance(entry, dict) and "input_ids" not in entry:
                if not isinstance(entry.get("text"), str):
                    raise ValueError(f"an entry of {path} has neither 'text' nor 'input_ids'")
                entry = entry["text"]
            yield from _of_one(entry, words, max_tokens)
        return
    words = _needed(words)
    opening, ids = words.opening, words.encode_alone(text)
    room = max_tokens - len(opening)
    if room < 1:
        raise ValueError(f"max_tokens is {max_tokens}, and the tokenizer puts {len(opening)} tokens before a text")
    for first in range(0, len(ids), room):
        yield _ids([*opening, *ids[first : first + room]])


def _needed(words: Words | None) -> Words:
    if words is None:
        raise ValueError("prompts are text, and the model has no tokenizer of its own: give tokenizer=, or token ids")
    return words


def _ids(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.int64, device="cpu")
