"""Reading a text file, and cutting it into chunks of token ids for a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from ..hooks.inputs import Inputs
from ..models.tokenizer import Tokenizer
from ..streams.rows import Rows, counted, key_of
from .cutting import Chunk
from .putting import Putting
from .source import Source, conventions_beside

_PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}


@dataclass(frozen=True)
class Choice:
    """How a text is put to the model, and which of its tokens count.

    Args:
        prepend_bos: Whether the token that begins a text is put in front of each chunk that does not begin with it.
        chat_template: Whether each chunk is the beginning of a conversation, with the text as the user's message.
        skip_first: How many tokens at the beginning of each chunk don't count.
        skip_special: Whether the tokenizer's special tokens don't count.
    """

    prepend_bos: bool = False
    chat_template: bool = False
    skip_first: int = 0
    skip_special: bool = False


@dataclass(frozen=True)
class Text:
    """The token ids of a text, its chunks, and the facts about it that the report shows.

    Attributes:
        ids: The ids of the text alone.
        facts: What the report says.
        chunks: Its chunks, in order, as many as were wanted or as the text fills.
        rows: Which tokens of a chunk count; None if all do.
        least: The fewest tokens to which a chunk can be shortened so that one of the text counts.
        key: What beside the text and the length decides the chunks and what counts, as plain data; empty by default.
    """

    ids: tuple[int, ...]
    facts: dict[str, Any]
    chunks: tuple[Chunk, ...]
    rows: Rows | None = None
    least: int = 1
    key: dict[str, Any] = field(default_factory=dict)

    def chunk(self, number: int, length: int) -> Tensor:
        """Return the first ``length`` ids of chunk ``number``, (1, length)."""
        return torch.tensor(self.chunks[number].ids[:length], dtype=torch.int64, device="cpu")[None]

    def counted(self, ids: Tensor) -> list[int] | None:
        """Return the positions of the tokens of a chunk (1, length) that count; None if all do.

        Raises:
            ValueError: If none does.
        """
        if self.rows is None:
            return None
        counts = counted(self.rows, ids, Inputs(ids))[0]
        if not bool(counts.any()):
            raise ValueError(
                f"in a chunk of {ids.shape[1]} tokens none counts: give a larger --length, a smaller --skip-first, or "
                "no --skip-special"
            )
        return None if bool(counts.all()) else counts.nonzero()[:, 0].tolist()


def read_text(
    path: str | Path,
    source: Source,
    tokenizer: str | Path | None,
    length: int,
    choice: Choice | None = None,
    most: int | None = None,
) -> Text:
    """Read the file at ``path``, and cut it into tokens with ``tokenizer``, or with the model's own, and into chunks.

    Args:
        path: The file.
        source: The model.
        tokenizer: The path of a tokenizer, or None.
        length: The tokens of a chunk.
        choice: How the text is put to the model, and which tokens count; by default as it is, and all.
        most: The largest number of chunks; None cuts the whole text.

    Raises:
        ValueError: The text is empty, not UTF-8, shorter than ``length`` tokens, or has a token that the model lacks;
            or there is no token that begins a text or no chat template where it is wanted.
        OSError: The file can't be read.
    """
    choice = choice or Choice()
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
        conventions = conventions_beside(Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent)
    elif source.tokenizer is not None:
        chosen, origin = source.tokenizer, "the model's own"
        conventions = source.conventions
    else:
        why = source.no_tokenizer or f"{source.facts['name']} comes without a tokenizer.json"
        raise ValueError(f"{why}; give --tokenizer: a tokenizer.json, or an encoder.json with its vocab.bpe beside it")
    try:
        chosen.inner.no_truncation()  # a tokenizer.json may ask for both, which are meant for batches
        chosen.inner.no_padding()
        ids = chosen.encode(text)
    except ValueError:
        raise ValueError(f"the tokenizer ({origin}) has no token for the text in {path}; was it made for it?") from None
    put = Putting(text, ids, chosen, origin, conventions, choice.prepend_bos, choice.chat_template)
    chunks = put.cut(length, len(ids) if most is None else most)
    if not chunks:
        count = put.count(length)
        raise ValueError(
            f"{path} has {count} tokens{put.included} and a chunk needs {length}: give a longer text, or --length "
            f"{count}"
        )
    for found in (ids, *(chunk.ids for chunk in chunks)):
        largest = max(found)
        if largest >= source.vocab_size:
            raise ValueError(
                f"token {largest} ({chosen.id_to_token(largest)!r}) of {path} is beyond the model's vocabulary of "
                f"{source.vocab_size}: give --tokenizer the one that the model was trained with"
            )
    skip_ids = sorted({*chosen.special_ids, *put.special}) if choice.skip_special else []
    rows = Rows(choice.skip_first, skip_ids) if choice.skip_first or skip_ids else None
    first = "token" if choice.skip_first == 1 else f"{choice.skip_first} tokens"
    left_out = [f"the first {first} of each chunk"] if choice.skip_first else []
    if choice.skip_special:
        left_out.append(
            f"special tokens ({len(skip_ids)} ids)" if skip_ids else "special tokens, of which the tokenizer has none"
        )
    facts = {
        "file": path.name,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "tokenizer": origin,
        "tokens": len(ids),
        **put.facts(length, chunks),
        "tokens that count": "all" if not left_out else f"all but {' and '.join(left_out)}",
        "tokens_sha256": hashlib.sha256(
            torch.tensor(ids, dtype=torch.int64, device="cpu").numpy().tobytes()
        ).hexdigest(),
    }
    key = {**put.key(chunks), **({} if rows is None else {"rows": key_of(rows)})}
    found_text = Text(tuple(ids), facts, tuple(chunks), rows, max(put.opening(length), choice.skip_first) + 1, key)
    for chunk in range(len(chunks)):
        found_text.counted(found_text.chunk(chunk, length))
    return found_text


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
