"""Text to token ids and back, by whatever tokenizer a model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from ..hooks.standing import as_analysed
from ..models.conventions import tokenizer_in
from ..models.gguf.model import tokenizer as gguf_tokenizer
from ..models.gguf_files import gguf_in
from ..models.tokenizer import Tokenizer

__all__ = ["Words", "words_of"]

_SPACE = "▁"  # how SentencePiece's vocabularies write the space before a word
_HOW = "give tokenizer=: one of transformers or of tokenizers, scalpel's own, or the path of a tokenizer.json"


class Words:
    """What a lens needs of a tokenizer.

    Args:
        inner: A tokenizer of transformers, a ``tokenizers.Tokenizer``, or scalpel's :class:`Tokenizer`.

    Attributes:
        opening: The ids that the tokenizer puts before each text by itself, such as that of BOS.

    Example:
        >>> import scalpel
        >>> from scalpel.jacobian_lens.words import Words
        >>> words = Words(scalpel.CircuitGPT.from_pretrained("bracket-mini").tokenizer)
        >>> [words.piece(i) for i in words.encode("x = [")]
        ['x', ' ', '=', ' ', '[']
    """

    def __init__(self, inner: Any) -> None:
        if isinstance(inner, Tokenizer):
            inner = inner.inner
        if not isinstance(inner, tokenizers.Tokenizer) and not callable(getattr(inner, "convert_ids_to_tokens", None)):
            raise TypeError(f"{type(inner).__name__} is no tokenizer that is known here: {_HOW}")
        self._inner = inner
        plain, whole = self._ids("a", False), self._ids("a", True)
        places = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
        self.opening: list[int] = whole[: places[0]] if places else []

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, after :attr:`opening`. Nothing is added at its end, which would close the text.

        Raises:
            ValueError: If the tokenizer has no token for the text.
        """
        return [*self.opening, *self.encode_alone(text)]

    def encode_alone(self, text: str) -> list[int]:
        """Return the ids of a text without :attr:`opening`.

        Raises:
            ValueError: If the tokenizer has no token for the text.
        """
        ids = self._ids(text, False)
        if not ids:
            raise ValueError(f"the tokenizer has no token for {text!r}: give a text that it was made for")
        return ids

    def piece(self, token: int) -> str:
        """Return the text of one token, with the space before it where it has one."""
        if isinstance(self._inner, tokenizers.Tokenizer):
            spelled = self._inner.id_to_token(token)
        else:
            spelled = self._inner.convert_ids_to_tokens(token)
        if spelled is None:
            return f"<{token}>"
        if _SPACE in spelled:
            return str(spelled).replace(_SPACE, " ")
        return str(self._inner.decode([token], skip_special_tokens=False))

    def _ids(self, text: str, special: bool) -> list[int]:
        if isinstance(self._inner, tokenizers.Tokenizer):
            return list(self._inner.encode(text, add_special_tokens=special).ids)
        return list(self._inner(text, add_special_tokens=special, verbose=False)["input_ids"])


def words_of(model: Any, tokenizer: Any = None) -> Words | None:
    """Find the tokenizer of a model, or of the folder or GGUF file that holds it.

    Args:
        model: The model, or the path of its folder or file.
        tokenizer: The tokenizer to take instead: as :class:`Words` takes it, or the path of a tokenizer.json, of a
            folder with a tokenizer, or of a GGUF file.

    Returns:
        The tokenizer; None where the model has none.

    Raises:
        ValueError: A file can't be read.
        TypeError: ``tokenizer`` is no tokenizer.
    """
    if isinstance(tokenizer, Words):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        found = _at(Path(tokenizer).expanduser())
        if found is None:
            raise ValueError(f"there is no tokenizer at {str(tokenizer)!r}: {_HOW}")
        return found
    if tokenizer is not None:
        return Words(tokenizer)
    if isinstance(model, str | Path):
        return _at(Path(model).expanduser())
    own = getattr(as_analysed(model), "tokenizer", None)
    if isinstance(own, Tokenizer):
        return Words(own)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return _at(Path(name)) if name and Path(name).is_dir() else None


def _at(path: Path) -> Words | None:
    """Read the tokenizer at a path; None where there is none."""
    if path.is_file() and path.name.endswith(".json"):
        return Words(tokenizers.Tokenizer.from_file(str(path)))
    if (file := gguf_in(path)) is not None:
        return Words(gguf_tokenizer(file))
    if not path.is_dir():
        return None
    try:
        return Words(tokenizer_in(path))
    except ValueError:
        own = Tokenizer.from_folder(path)
        return None if own is None else Words(own)
