"""Which tokens of a prompt a lens is computed at: padding doesn't count, nor do the first tokens and the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["text_alone", "valid_tokens"]


def text_alone(batch: Any) -> Any:
    """Cut the padding off a batch of one text with an attention mask; anything else stays as it is.

    A padded text has the values that it has without padding, as :mod:`scalpel.hooks.inputs` says, and costs more.

    Raises:
        ValueError: Where no token is real, or padding stands between tokens that are.
    """
    if not isinstance(batch, Mapping):
        return batch
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape and len(ids) == 1):
        return batch
    places = mask[0].nonzero()[:, 0].tolist()
    if not places:
        raise ValueError("the attention_mask is zero at every token: give a prompt of at least one real token")
    first, stop = places[0], places[-1] + 1
    if len(places) < stop - first:
        raise ValueError(
            f"the attention_mask hides tokens between {first} and {stop - 1}, which are real; a lens takes a prompt "
            "with padding at its ends alone: leave the hidden tokens out"
        )
    of_text = {name: isinstance(value, Tensor) and value.shape == ids.shape for name, value in batch.items()}
    return {name: value[:, first:stop] if of_text[name] else value for name, value in batch.items()}


def valid_tokens(length: int, skip_first: int) -> slice:
    """The tokens ``skip_first`` … ``length`` - 2 of a prompt of ``length`` real tokens.

    Raises:
        ValueError: Where the prompt has no such token.
    """
    if length < skip_first + 2:
        raise ValueError(
            f"the prompt has {length} tokens, and with skip_first={skip_first} a lens needs {skip_first + 2} or more, "
            "since the last token is left out too: give a longer prompt, or a smaller skip_first"
        )
    return slice(skip_first, length - 1)
