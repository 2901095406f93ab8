"""What a model's tokenizer says about whole texts: the token that begins them, and the template of a conversation.

transformers' own tokenizer says it. A chat template is a program that comes with a checkpoint, so it runs in the
sandbox that transformers keeps for it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .weight_files import CheckpointError

__all__ = ["Conventions", "conventions_in", "tokenizer_in"]

_HOW_TO_INSTALL = "pip install 'semigroup-scalpel[transformers]'"


class Conventions:
    """The conventions of one tokenizer.

    Args:
        inner: The tokenizer of transformers.
        where: What messages call it, such as its folder.

    Example:
        >>> import tokenizers, transformers
        >>> from scalpel.models.conventions import Conventions
        >>> inner = transformers.PreTrainedTokenizerFast(
        ...     tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "a": 1}, merges=[])),
        ...     bos_token="<s>",
        ...     chat_template="{% for m in messages %}{{ bos_token + '[' + m['content'] + ']' }}{% endfor %}",
        ... )
        >>> Conventions(inner, "here").bos, Conventions(inner, "here").conversation("a")
        ('<s>', '<s>[a]')
    """

    def __init__(self, inner: Any, where: str) -> None:
        self._inner, self._where = inner, where

    @property
    def bos(self) -> str | None:
        """The token that begins a text, as the vocabulary spells it; None if the tokenizer names none."""
        bos = self._inner.bos_token
        return None if bos is None else str(bos)

    def template_mark(self) -> str:
        """Return the SHA-256 of the chat template.

        Raises:
            CheckpointError: If there is none, or there are several and none of them is the default.
        """
        return hashlib.sha256(self._template().encode()).hexdigest()

    def conversation(self, text: str) -> str:
        """Write a text as a user's message, the first of a conversation, without a prompt for the answer.

        Raises:
            CheckpointError: If there is no chat template, or it fails.
        """
        template = self._template()
        messages = [{"role": "user", "content": text}]
        try:
            return str(self._inner.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception as error:  # a template may raise anything
            raise CheckpointError(
                f"the chat template of {self._where} fails on a single message of the user: {type(error).__name__}: "
                f"{error}"
            ) from error

    def _template(self) -> str:
        found = self._inner.chat_template
        if isinstance(found, dict):
            found = found.get("default")
            if found is None:
                names = ", ".join(sorted(self._inner.chat_template))
                raise CheckpointError(f"{self._where} has the chat templates {names}, and none is named 'default'")
        if not found:
            raise CheckpointError(
                f"{self._where} has no chat template: leave out --chat-template, or put one beside its tokenizer, as "
                "chat_template.jinja or in tokenizer_config.json"
            )
        return str(found)


def conventions_in(folder: Path) -> Conventions:
    """Read the conventions of the tokenizer in a folder in transformers' format.

    Raises:
        CheckpointError: If transformers is not installed, or can't read the tokenizer.
    """
    return Conventions(tokenizer_in(folder), str(folder))


def tokenizer_in(folder: Path) -> Any:
    """Read the tokenizer in a folder by transformers.

    Raises:
        CheckpointError: If transformers is not installed, or can't read the tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"what begins a text, and the chat template in {folder}, are read by transformers: {_HOW_TO_INSTALL}"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds; each means that it can't be read
        raise CheckpointError(
            f"transformers can't read the tokenizer in {folder}: {type(error).__name__}: {error}"
        ) from error
