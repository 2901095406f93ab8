"""Reading a text file, and cutting it into chunks of token ids for a model."""

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
    """The token ids of a text, and the facts about it that the report shows."""

    ids: tuple[int, ...]
    facts: dict[str, Any]

    def chunk(self, number: int, step: int, length: int) -> Tensor:
        """Return the first ``length`` ids of chunk ``number``, (1, length); a chunk begins every ``step`` tokens."""
        begin = number * step
        return torch.tensor(self.ids[begin : begin + length], dtype=torch.int64, device="cpu")[None]


def read_text(path: str | Path, source: Source, tokenizer: str | Path | None, length: int) -> Text:
    """Read the file at ``path`` and cut it into tokens with ``tokenizer``, or with the model's own.

    Raises:
        ValueError: The text is empty, not UTF-8, shorter than ``length`` tokens, or has a token that the model lacks.
        OSError: The file can't be read.
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
        chosen, origin = read_tokenizer(Path(tokenizer), source.pair), str(tokenizer)
    elif source.tokenizer is not None:
        chosen, origin = source.tokenizer, "the model's own"
    else:
        why = source.no_tokenizer or f"{source.facts['name']} comes without a tokenizer.json"
        raise ValueError(f"{why}; give --tokenizer: a tokenizer.json, or an encoder.json with its vocab.bpe beside it")
    try:
        chosen.inner.no_truncation()  # a tokenizer.json may ask for both, which are meant for batches
        chosen.inner.no_padding()
        ids = chosen.encode(text)
    except ValueError:
        raise ValueError(f"the tokenizer ({origin}) has no token for the text in {path}; was it made for it?") from None
    if len(ids) < length:
        raise ValueError(
            f"{path} has {len(ids)} tokens and a chunk needs {length}: give a longer text, or --length {len(ids)}"
        )
    largest = max(range(len(ids)), key=ids.__getitem__)
    if ids[largest] >= source.vocab_size:
        raise ValueError(
            f"token {ids[largest]} ({chosen.id_to_token(ids[largest])!r}) of {path} is beyond the model's vocabulary "
            f"of {source.vocab_size}: give --tokenizer the one that the model was trained with"
        )
    facts = {
        "file": path.name,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "tokenizer": origin,
        "tokens": len(ids),
        "special tokens": "none added",
        "tokens_sha256": hashlib.sha256(
            torch.tensor(ids, dtype=torch.int64, device="cpu").numpy().tobytes()
        ).hexdigest(),
    }
    return Text(tuple(ids), facts)


def read_tokenizer(path: Path, pair: str | None) -> Tokenizer:
    """Read a tokenizer.json, or a pair of files given by the path of either file or of their folder.

    ``pair`` says how text is cut into words before the merges of a pair of files, "tinypython" or "gpt2"; None where
    that is not known.
    """
    if path.is_dir():
        names = ["tokenizer.json", *_PAIRS]
        file_in_folder = next((path / name for name in names if (path / name).is_file()), None)
        if file_in_folder is None:
            raise ValueError(f"{path} holds no tokenizer: none of {', '.join(names)}")
        path = file_in_folder
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}; give a tokenizer.json, or an encoder.json with vocab.bpe")
    partners = _PAIRS | {second: second for second in _PAIRS.values()}
    try:
        if path.name not in partners:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        first, second = next(item for item in _PAIRS.items() if path.name in item)
        for name in (first, second):
            if not (path.parent / name).is_file():
                raise ValueError(f"{path.parent} lacks {name}, which goes with {path.name}")
        return _of_pair(path.parent / first, path.parent / second, pair)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the tokenizer {path} can't be read: {error}") from error


def _of_pair(vocabulary: Path, merges: Path, pair: str | None) -> Tokenizer:
    """Build a byte-level BPE from its vocabulary and its merges."""
    if pair is None:
        raise ValueError("two files don't say how text is cut into words before merging; give a tokenizer.json")
    if pair == "tinypython":
        from ..models.tokenizer import _tinypython

        return Tokenizer(_tinypython(vocabulary, merges))
    vocab, merge_rules = models.BPE.read_file(str(vocabulary), str(merges))
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merge_rules))
    # ByteLevel cuts text into words by the pattern of GPT-2
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)
