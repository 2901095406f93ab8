"""Text to token ids and back: a thin wrapper over the Rust ``tokenizers`` library."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

# tokenizer.json is what save writes; the pairs are how byte-level BPEs are published (GPT-2's two namings).
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = ("tokenizer.json",)

# A pair of files doesn't say how text is cut before merging; its name does. tinypython_2k is the tokenizer of
# Gao et al. 2025: cl100k's cut, and one special token.
_TINYPYTHON_CUT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TINYPYTHON_END = "<|endoftext|>"


class Tokenizer:
    """A tokenizer with the few calls that the library needs.

    ``encode`` adds no special tokens and ``decode`` drops none, so that a byte-level BPE gives its text back
    exactly. ``Tokenizer(inner)`` wraps a ``tokenizers.Tokenizer``; :meth:`from_folder` reads one.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner

    @classmethod
    def from_folder(cls, folder: str | Path, name: str = "tinypython_2k") -> "Tokenizer | None":
        """The tokenizer that lies in ``folder``, or None where there is none.

        ``tokenizer.json`` comes first; ``encoder.json`` with ``vocab.bpe`` (or ``vocab.json`` with
        ``merges.txt``) is read where ``name`` is one whose cut into words is known. ValueError for a file
        that can't be read.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
            for vocabulary, merges in [(folder / one, folder / other) for one, other in _PAIRS]:
                if name == "tinypython_2k" and vocabulary.is_file() and merges.is_file():
                    return cls(_tinypython(vocabulary, merges))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"the tokenizer in {folder} can't be read: {error}") from error
        return None

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. TypeError if it isn't a str, ValueError if it is empty or has no token."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}; it must be a str")
        if not text:
            raise ValueError("the text is empty; a model needs at least one token")
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"the tokenizer has no token for {text!r}; was it made for such text?")
        return ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a flat sequence of ids. ValueError for an id that the vocabulary lacks."""
        flat = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        if isinstance(ids, Tensor) and ids.dim() != 1:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; decode one row at a time")
        for i in flat:
            self.id_to_token(i)
        return str(self.inner.decode(flat, skip_special_tokens=False))

    def token_to_id(self, token: str) -> int:
        """The id of a token in the vocabulary's spelling, which may not be how the text looks."""
        found = self.inner.token_to_id(token)
        if found is None:
            raise ValueError(f"{token!r} is not in the vocabulary; for a piece of text use single()")
        return int(found)

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's spelling of an id. ValueError where there is none."""
        found = self.inner.id_to_token(token_id) if token_id >= 0 else None
        if found is None:
            raise ValueError(f"no token has the id {token_id}; the vocabulary has {self.vocab_size}")
        return str(found)

    def single(self, text: str) -> int:
        """The id of ``text`` if it is one token; otherwise a ValueError that shows how it was split."""
        ids = self.encode(text)
        if len(ids) != 1:
            pieces = ", ".join(f"{self.inner.decode([i], skip_special_tokens=False)!r} ({i})" for i in ids)
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {pieces}")
        return ids[0]

    def batch(self, texts: Sequence[str], side: str = "right") -> tuple[Tensor, Tensor]:
        """Padded ``(input_ids, attention_mask)``, both int64 (number of texts, longest).

        ``side``: where the padding stands; generation needs "left". The mask has 1 at real tokens. The
        padding's id (the tokenizer's own, else 0) doesn't matter: no masked token enters any head.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}; allowed: 'left', 'right'")
        if isinstance(texts, str):
            raise TypeError("texts is a str; give a list of texts")
        rows = [self.encode(text) for text in texts]
        if not rows:
            raise ValueError("texts is empty; give at least one")
        width = max(map(len, rows))
        padding = self.inner.padding or {}
        ids = torch.full((len(rows), width), int(padding.get("pad_id", 0)), dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, where] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[i, where] = 1
        return ids, mask

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into an existing folder."""
        self.inner.save(str(Path(folder) / "tokenizer.json"))


def _tinypython(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    table, pairs = models.BPE.read_file(str(vocabulary), str(merges))
    # a word that is a token is that token, whatever the merges would make of it: so tiktoken reads these
    # files
    inner = tokenizers.Tokenizer(models.BPE(vocab=table, merges=pairs, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TINYPYTHON_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    if inner.token_to_id(_TINYPYTHON_END) is not None or len(table) == 2047:
        inner.add_special_tokens([_TINYPYTHON_END])
    return inner
