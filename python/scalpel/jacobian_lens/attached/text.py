"""A text as a lens reads it: strings become ids, padding is cut off, and a space at the end is taken away.

A tokenizer that puts a space before each word makes a token of its own of a space at the end of a text. What the model
has at that token is seldom what somebody asks for who wants to know how the text goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sweeps.positions import text_alone
from ..words import Words

__all__ = ["Text", "text_of", "token_id"]


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        batch: What the model is given.
        ids: Its tokens; None for a model that takes something else.
        stripped: Whether spaces at its end were taken away.
    """

    batch: Any
    ids: tuple[int, ...] | None
    stripped: bool = False


def text_of(text: Any, words: Words | None) -> Text:
    """Read one text.

    Args:
        text: A string; ids, (S,) or (1, S), as a list, a tensor or an array; a batch of one text, whose attention mask
            may say that it is padded; or a tensor of another dtype, for models that take no ids.
        words: The tokenizer, for strings.

    Raises:
        ValueError: For a string without a tokenizer, an empty text, or several texts.
        TypeError: For anything else.
    """
    stripped = False
    if isinstance(text, str):
        if words is None:
            raise ValueError(
                "text is a string, and the model has no tokenizer of its own: give tokenizer= to attach, or token ids"
            )
        bare = text.rstrip(" ")
        if not bare:
            raise ValueError(f"text is {text!r}; give a text of at least one token")
        stripped, text = bare != text, words.encode(bare)
    if isinstance(text, Mapping):
        batch = text_alone(text)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
            raise ValueError(f"a batch for a readout holds one text, input_ids (1, S); it has the keys {sorted(text)}")
        return Text(batch, tuple(ids[0].tolist()), stripped)
    if isinstance(text, np.ndarray):
        text = torch.from_numpy(text)
    if isinstance(text, list | tuple) and len(text) == 1 and isinstance(text[0], list | tuple):
        text = text[0]  # (1, S)
    if isinstance(text, list | tuple) and all(
        isinstance(token, int | np.integer) and not isinstance(token, bool) for token in text
    ):
        text = torch.tensor([int(token) for token in text], dtype=torch.int64, device="cpu")
    if not isinstance(text, Tensor):
        raise TypeError(f"text is {type(text).__name__}; give a string, token ids, or a batch of one text")
    if text.dtype.is_floating_point:
        return Text(text, None)
    text = text[None] if text.dim() == 1 else text
    if text.dim() != 2 or len(text) != 1 or not text.numel():
        raise ValueError(f"text has shape {tuple(text.shape)}; token ids are those of one text, (S,) or (1, S)")
    return Text(text.long(), tuple(text[0].tolist()), stripped)


def token_id(token: Any, words: Words | None) -> int:
    """Return the id of a token that is given as an id or as the text of a single token.

    Raises:
        ValueError: For a string that is several tokens, of which the first alone would be another word; or without a
            tokenizer.
        TypeError: For anything else.
    """
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        return int(token)
    if isinstance(token, Tensor) and not token.dim() and not token.dtype.is_floating_point:
        return int(token)
    if not isinstance(token, str):
        raise TypeError(f"a token is {token!r}; give its id, or its text with the space before it if it has one")
    if words is None:
        raise ValueError(f"the token is {token!r}, and the model has no tokenizer: give tokenizer= to attach, or an id")
    ids = words.encode_alone(token)
    if len(ids) != 1:
        pieces = ", ".join(f"{words.piece(i)!r} ({i})" for i in ids)
        raise ValueError(
            f"{token!r} is {len(ids)} tokens, {pieces}, and a lens has a direction for each single token: give one of "
            "these, or another spelling, such as with a space before it"
        )
    return ids[0]
