"""A text file as chunks of token ids that a model takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from ..models.tokenizer import Tokenizer
from .source import Source

_PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}


@dataclass(frozen=True)
class Text:
    """Token ids of a text, and the facts about it that the report shows."""

    ids: tuple[int, ...]
    facts: dict[str, Any]

    def chunk(self, number: int, step: int, length: int) -> Tensor:
        """(1, length): chunk ``number`` of ``step`` tokens, or its first ``length``."""
        begin = number * step
        return torch.tensor(self.ids[begin : begin + length], dtype=torch.int64, device="cpu")[None]


def read_text(path: str | Path, source: Source, tokenizer: str | Path | None, length: int) -> Text:
    """Read the file at ``path`` and cut it into tokens with ``tokenizer``, or with the model's own.

    ValueError for a text that is empty, not UTF-8, shorter than ``length`` tokens, or has a token that the model
    lacks; OSError where it can't be read.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text of {length} tokens or more")
    if tokenizer is not None:
        chosen, of = read_tokenizer(Path(tokenizer), source.pair), str(tokenizer)
    elif source.tokenizer is not None:
        chosen, of = source.tokenizer, "the model's own"
    else:
        why = source.no_tokenizer or f"{source.facts['name']} comes without a tokenizer.json"
        raise ValueError(f"{why}; give --tokenizer: a tokenizer.json, or an encoder.json with its vocab.bpe beside it")
    try:
        chosen.inner.no_truncation()  # what a tokenizer.json may ask for is meant for a model's batches
        chosen.inner.no_padding()
        ids = chosen.encode(text)
    except ValueError:
        raise ValueError(f"the tokenizer ({of}) has no token for the text in {path}; was it made for it?") from None
    if len(ids) < length:
        raise ValueError(
            f"{path} has {len(ids)} tokens and a chunk needs {length}: give a longer text, or --length {len(ids)}"
        )
    worst = max(range(len(ids)), key=ids.__getitem__)
    if ids[worst] >= source.vocab_size:
        raise ValueError(
            f"token {ids[worst]} ({chosen.id_to_token(ids[worst])!r}) of {path} is beyond the model's vocabulary of "
            f"{source.vocab_size}: give --tokenizer the one that the model was trained with"
        )
    facts = {
        "file": path.name,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "tokenizer": of,
        "tokens": len(ids),
        "special tokens": "none added",
        "tokens_sha256": hashlib.sha256(
            torch.tensor(ids, dtype=torch.int64, device="cpu").numpy().tobytes()
        ).hexdigest(),
    }
    return Text(tuple(ids), facts)


def read_tokenizer(path: Path, pair: str | None) -> Tokenizer:
    """A tokenizer.json, or a pair of files named by either of them or by their folder.

    ``pair``: whose cut of text into words goes with a pair, "tinypython" or "gpt2"; None where nothing says.
    """
    if path.is_dir():
        names = ["tokenizer.json", *_PAIRS]
        inside = next((path / name for name in names if (path / name).is_file()), None)
        if inside is None:
            raise ValueError(f"{path} holds no tokenizer: none of {', '.join(names)}")
        path = inside
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}; give a tokenizer.json, or an encoder.json with vocab.bpe")
    pairs = _PAIRS | {second: second for second in _PAIRS.values()}
    try:
        if path.name not in pairs:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        first, second = next(item for item in _PAIRS.items() if path.name in item)
        for name in (first, second):
            if not (path.parent / name).is_file():
                raise ValueError(f"{path.parent} lacks {name}, which goes with {path.name}")
        return _of_pair(path.parent / first, path.parent / second, pair)
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"the tokenizer {path} can't be read: {error}") from error


def _of_pair(vocabulary: Path, merges: Path, pair: str | None) -> Tokenizer:
    if pair is None:
        raise ValueError("two files don't say how text is cut into words before merging; give a tokenizer.json")
    if pair == "tinypython":
        from ..models.tokenizer import _tinypython

        return Tokenizer(_tinypython(vocabulary, merges))
    table, rules = models.BPE.read_file(str(vocabulary), str(merges))
    inner = tokenizers.Tokenizer(models.BPE(vocab=table, merges=rules))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's cut is its own
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)
