"""Cutting a text into chunks of one length: plain, with a first token in front of each, or each as a conversation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..models.tokenizer import Tokenizer

__all__ = ["Chunk", "Conversations", "cut"]

_MARK = "\ue000the text\ue001"  # private characters, so that no template has it
_SLACK = 32  # tokens by which more text is given to the template than a chunk holds


@dataclass(frozen=True)
class Chunk:
    """A chunk of a text.

    Attributes:
        start: The token of the text at which it begins.
        ids: Its token ids, those that were put in front included.
    """

    start: int
    ids: tuple[int, ...]


def cut(ids: Sequence[int], length: int, most: int, bos: int | None) -> list[Chunk]:
    """Cut token ids into chunks of ``length``, one after the other.

    Args:
        ids: The token ids of the text.
        length: The tokens of a chunk.
        most: The largest number of chunks.
        bos: The token that is put in front of each chunk that does not begin with it; the chunk then holds one token
            less of the text. None puts nothing in front.

    Returns:
        The chunks that the text fills.
    """
    chunks: list[Chunk] = []
    begin = 0
    while len(chunks) < most and begin < len(ids):
        front = _front(ids[begin], bos)
        end = begin + length - len(front)
        if end > len(ids) or end == begin:
            break
        chunks.append(Chunk(begin, (*front, *ids[begin:end])))
        begin = end
    return chunks


def _front(first: int, bos: int | None) -> tuple[int, ...]:
    return () if bos is None or first == bos else (bos,)


class Conversations:
    """Chunks that are each the beginning of a conversation, whose first message is the text from some place on.

    What stands before the message is the opening. It depends on the template alone and is the same in each chunk. A
    character of several tokens that the end of a chunk cuts off is not repeated in the next.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        write: Writes a text as a user's message, as the chat template does.

    Raises:
        ValueError: If the template does not keep the text.

    Attributes:
        opening: How many characters stand before the message.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, write: Callable[[str], str]) -> None:
        self._text, self._tokenizer, self._write = text, tokenizer, write
        self._ends = [end for _, end in tokenizer.inner.encode(text, add_special_tokens=False).offsets]
        self.opening = write(_MARK).find(_MARK)
        if self.opening < 0:
            raise ValueError("the chat template does not contain the text of a user's message as it is")

    def cut(self, length: int, most: int, bos: int | None) -> list[Chunk]:
        """Cut the text into chunks of ``length`` tokens; the arguments are those of :func:`cut`.

        Raises:
            ValueError: If the opening leaves no token for the text.
        """
        chunks: list[Chunk] = []
        at = 0
        while len(chunks) < most and at < len(self._text):
            start = bisect_right(self._ends, at)  # the first token that ends beyond this place
            message = self._message(at, start, length)
            if not message.strip():  # a template may strip it to nothing
                at += len(message)
                continue
            ids, ends = self._encoded(message)
            front = _front(ids[0], bos)
            of_message = length - len(front)
            if len(ids) < of_message:
                break
            if ends[of_message - 1] <= 0:
                raise ValueError(
                    f"the chat template puts {len(front) + sum(end <= 0 for end in ends)} tokens in front of a "
                    f"message, so chunks of {length} have none of the text: give a larger --length"
                )
            chunks.append(Chunk(start, (*front, *ids[:of_message])))
            at += min(ends[of_message - 1], len(message))
        return chunks

    def begins_with(self, token_id: int | None) -> bool:
        """Tell whether conversations begin with a token by themselves."""
        ids, _ = self._encoded(self._message(0, 0, 1))
        return ids[0] == token_id

    def tokens(self, length: int, bos: int | None) -> tuple[int, int]:
        """Count the tokens of the opening, and of a conversation with the text, which may be cut off beyond ``length``.

        Both counts include the token that is put in front.
        """
        ids, ends = self._encoded(self._message(0, 0, length))
        front = len(_front(ids[0], bos))
        return front + sum(end <= 0 for end in ends), front + len(ids)

    def _message(self, at: int, start: int, length: int) -> str:
        """Return the text from a place on: more than ``length`` tokens of it, so that no chunk sees where it ends."""
        last = start + 2 * length + _SLACK
        return self._text[at : self._ends[last] if last < len(self._ends) else len(self._text)]

    def _encoded(self, message: str) -> tuple[list[int], list[int]]:
        """Write and encode a message: the ids, and where each of them ends, in characters of the message."""
        written = self._write(message)
        kept = message if written.startswith(message, self.opening) else message.strip()
        if not written.startswith(kept, self.opening):
            raise ValueError(
                "the chat template changes the text of a user's message, so nothing says which tokens are the text's"
            )
        stripped = 0 if kept == message else len(message) - len(message.lstrip())
        encoded = self._tokenizer.inner.encode(written, add_special_tokens=False)
        return encoded.ids, [end - self.opening + (stripped if end > self.opening else 0) for _, end in encoded.offsets]
