"""How a text is put to the model: with the token that begins a text, or as a conversation, and what is said of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.conventions import Conventions
from ..models.tokenizer import Tokenizer
from .cutting import Chunk, Conversations, cut

__all__ = ["Putting"]

_SAMPLE = 64  # characters of the text that show what the tokenizer itself puts in front


class Putting:
    """The chunks of a text, and what the report says about how they were made.

    Args:
        text: The text.
        ids: Its token ids.
        tokenizer: The tokenizer that made them.
        origin: What messages call the tokenizer.
        conventions: Reads what begins a text, and the chat template; None where nothing says so.
        prepend_bos: Whether the token that begins a text is put in front of each chunk.
        chat_template: Whether each chunk is the beginning of a conversation.

    Raises:
        ValueError: If there is no such token or no such template where it is wanted.

    Attributes:
        special: Ids of special tokens beside those that the tokenizer marks.
    """

    def __init__(
        self,
        text: str,
        ids: Sequence[int],
        tokenizer: Tokenizer,
        origin: str,
        conventions: Callable[[], Conventions] | None,
        prepend_bos: bool,
        chat_template: bool,
    ) -> None:
        self._ids, self._tokenizer, self._origin = ids, tokenizer, origin
        self._own = _put_in_front(tokenizer, text[:_SAMPLE])
        stated = None
        if conventions is not None and (chat_template or (prepend_bos and self._own is None)):
            stated = conventions()
        self._bos = self._begin(stated) if prepend_bos else None
        self.special = [bos for bos in (self._bos, self._own) if bos is not None]
        self._conversations = None
        if chat_template:
            if stated is None:
                raise ValueError(
                    f"the tokenizer ({origin}) comes without a chat template: leave out --chat-template, or give "
                    "--tokenizer a folder of transformers with chat_template.jinja or tokenizer_config.json"
                )
            self._template = stated.template_mark()
            self._conversations = Conversations(text, tokenizer, stated.conversation)

    def _begin(self, stated: Conventions | None) -> int:
        """Return the id of the token that begins a text."""
        if self._own is not None:
            return self._own
        named = None if stated is None else stated.bos
        bos = None if named is None else self._tokenizer.inner.token_to_id(named)
        if bos is None:
            what = "names no token that begins a text" if named is None else f"does not know its BOS token {named!r}"
            raise ValueError(
                f"the tokenizer ({self._origin}) {what}: leave out --bos, write the token that the model was trained "
                "with into the text, or give --tokenizer a folder whose tokenizer_config.json has a bos_token of its "
                "vocabulary"
            )
        return int(bos)

    @property
    def included(self) -> str:
        """What the count of tokens includes beside those of the text, for a message."""
        parts = ["BOS"] if self._bos is not None else []
        parts += ["the chat template"] if self._conversations is not None else []
        return f" with {' and '.join(parts)}" if parts else ""

    def cut(self, length: int, most: int) -> list[Chunk]:
        """Cut the text into at most ``most`` chunks of ``length`` tokens."""
        if self._conversations is not None:
            return self._conversations.cut(length, most, self._bos)
        if self._bos is not None and length < 2:
            raise ValueError(f"length is {length}; with --bos a chunk needs 2 tokens or more, one of them of the text")
        return cut(self._ids, length, most, self._bos)

    def count(self, length: int) -> int:
        """Count the tokens of the text and of what is put around it, where they are fewer than ``length``."""
        if self._conversations is not None:
            return self._conversations.tokens(length, self._bos)[1]
        return len(self._ids) + (self._bos is not None and self._ids[0] != self._bos)

    def opening(self, length: int) -> int:
        """Count the tokens that stand before the text in a chunk."""
        if self._conversations is not None:
            return self._conversations.tokens(length, self._bos)[0]
        return int(self._bos is not None)

    def facts(self, length: int, chunks: Sequence[Chunk]) -> dict[str, str]:
        """Say what was put in front of the text, and around it, in lines short enough for the report's list."""
        facts = {"special tokens": self._special(chunks)}
        if self._conversations is None:
            return facts | {"chat template": "not used"}
        return facts | {
            "chat template": f"the tokenizer's own ({self._template[:12]}); {self.opening(length)} of a chunk's "
            f"{length} tokens stand before the message"
        }

    def key(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Return plain data that differs where the chunks of the same text do."""
        key: dict[str, Any] = {} if self._bos is None else {"bos": self._bos}
        if self._conversations is not None:  # a template may write the date, so that its text alone does not say enough
            first = torch.tensor(chunks[0].ids, dtype=torch.int64, device="cpu").numpy().tobytes()
            key |= {"chat_template": self._template, "first_chunk": hashlib.sha256(first).hexdigest()}
        return key

    def _special(self, chunks: Sequence[Chunk]) -> str:
        if self._bos is None:
            around = "none added" if self._conversations is None else "those of the chat template"
            if self._own is None or all(chunk.ids[0] == self._own for chunk in chunks):
                return around
            return f"{around}; the tokenizer itself would add {self._named(self._own)}: see --bos"
        had = self._beginning_with_it(chunks)
        if had == len(chunks):
            return f"none added: each chunk has {self._named(self._bos)} already"
        said = f"{self._named(self._bos)} in front of each chunk"
        return said if not had else f"{said}; {had} of {len(chunks)} had it already"

    def _beginning_with_it(self, chunks: Sequence[Chunk]) -> int:
        """Count the chunks that begin with the token by themselves."""
        if self._conversations is not None:  # every conversation begins with the same token
            return len(chunks) if self._conversations.begins_with(self._bos) else 0
        return sum(self._ids[chunk.start] == self._bos for chunk in chunks)

    def _named(self, token_id: int) -> str:
        return f"{self._tokenizer.id_to_token(token_id)!r} ({token_id})"


def _put_in_front(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the one token that a tokenizer puts in front of a text when it is asked for special tokens, or None."""
    plain = tokenizer.inner.encode(text, add_special_tokens=False).ids
    added = tokenizer.inner.encode(text, add_special_tokens=True).ids
    return added[0] if plain and added[1 : 1 + len(plain)] == plain else None
