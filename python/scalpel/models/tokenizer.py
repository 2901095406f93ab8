"""Text to token ids and back: a thin wrapper over the Rust ``tokenizers`` library."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

# Tokenizer.save writes tokenizer.json. Byte-level BPEs are also published as a vocabulary and its merges, under either
# of the two pairs of names that GPT-2's files have had.
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
TOKENIZER_FILES = ("tokenizer.json",)

# A pair of files doesn't say how text is split before pieces are merged, so the tokenizer's name has to. tinypython_2k
# is the tokenizer of Gao et al. 2025, which splits text as cl100k does and has one special token.
_TINYPYTHON_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TINYPYTHON_END = "<|endoftext|>"


class Tokenizer:
    """A tokenizer with the few methods that the library needs.

    ``encode`` adds no special tokens and ``decode`` drops none, so that a byte-level BPE returns its text exactly.

    Args:
        inner: The ``tokenizers.Tokenizer`` that does the work.

    Example:
        >>> import scalpel
        >>> tokenizer = scalpel.CircuitGPT.from_pretrained("bracket-mini").tokenizer
        >>> tokenizer.decode(tokenizer.encode("x = [1, 2"))
        'x = [1, 2'
        >>> ids, mask = tokenizer.batch(["x", "x = ["])
        >>> mask
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 1, 1, 1]])
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner

    @classmethod
    def from_folder(cls, folder: str | Path, name: str = "tinypython_2k") -> "Tokenizer | None":
        """Read the tokenizer in ``folder``.

        Args:
            folder: Where its files are. ``tokenizer.json`` is preferred; otherwise ``encoder.json`` with
                ``vocab.bpe``, or ``vocab.json`` with ``merges.txt``, is read.
            name: The tokenizer's name. A pair of files doesn't say how text is split into words, so it is read only
                if the name is "tinypython_2k".

        Returns:
            The tokenizer, or None if the folder holds none.

        Raises:
            ValueError: If a file can't be read.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
            for vocabulary_name, merges_name in _PAIRS:
                vocabulary, merges = folder / vocabulary_name, folder / merges_name
                if name == "tinypython_2k" and vocabulary.is_file() and merges.is_file():
                    return cls(_tinypython(vocabulary, merges))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"the tokenizer in {folder} can't be read: {error}") from error
        return None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> list[int]:
        """The ids of the tokens that the tokenizer marks as special, such as those that begin or end a text."""
        added = self.inner.get_added_tokens_decoder()
        return sorted(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``.

        Raises:
            TypeError: If ``text`` isn't a str.
            ValueError: If it is empty, or the tokenizer has no token for it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}; it must be a str")
        if not text:
            raise ValueError("the text is empty; a model needs at least one token")
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"the tokenizer has no token for {text!r}; check that it is the tokenizer for such text")
        return ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the text of a flat sequence of ids.

        Raises:
            ValueError: If an id is not in the vocabulary, or ``ids`` has more than one row.
        """
        flat = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        if isinstance(ids, Tensor) and ids.dim() != 1:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; decode one row at a time")
        for i in flat:
            self.id_to_token(i)
        return str(self.inner.decode(flat, skip_special_tokens=False))

    def token_to_id(self, token: str) -> int:
        """Return the id of a token as the vocabulary spells it, which may differ from the text that it stands for.

        Raises:
            ValueError: If the vocabulary has no such token.
        """
        token_id = self.inner.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{token!r} is not in the vocabulary; for a piece of text use single()")
        return int(token_id)

    def id_to_token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it.

        Raises:
            ValueError: If no token has this id.
        """
        token = self.inner.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"no token has the id {token_id}; the vocabulary has {self.vocab_size} tokens")
        return str(token)

    def single(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ValueError: If the text is several tokens, which the message lists.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            pieces = ", ".join(f"{self.inner.decode([i], skip_special_tokens=False)!r} ({i})" for i in ids)
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {pieces}")
        return ids[0]

    def batch(self, texts: Sequence[str], side: str = "right") -> tuple[Tensor, Tensor]:
        """Encode texts and pad them to the same length.

        Args:
            texts: A list of texts.
            side: Where the padding goes, "right" or "left"; generation needs "left".

        Returns:
            ``(input_ids, attention_mask)``, both int64 (texts, most tokens of a text). The mask is 1 at real tokens
            and 0 at padding. Which id stands at padding (the tokenizer's own, otherwise 0) doesn't matter, because
            no attention head reads a masked token.

        Raises:
            TypeError: If ``texts`` is a str.
            ValueError: If ``texts`` or one of its texts is empty, or ``side`` is neither "right" nor "left".
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
            columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, columns] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[i, columns] = 1
        return ids, mask

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into an existing folder."""
        self.inner.save(str(Path(folder) / "tokenizer.json"))


def _tinypython(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    ids_of_tokens, pairs = models.BPE.read_file(str(vocabulary), str(merges))
    # As in tiktoken, a word that is itself a token becomes that token, even if the merges would give others.
    inner = tokenizers.Tokenizer(models.BPE(vocab=ids_of_tokens, merges=pairs, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TINYPYTHON_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    if inner.token_to_id(_TINYPYTHON_END) is not None or len(ids_of_tokens) == 2047:
        inner.add_special_tokens([_TINYPYTHON_END])
    return inner
