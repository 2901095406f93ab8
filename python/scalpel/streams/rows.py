"""Which tokens of a text give a row to the statistics, while the model attends to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._integers import integer
from ..hooks.inputs import Inputs
from .marks import function_mark

__all__ = ["Rows", "RowsAsGiven", "counted", "key_of", "read_rows", "rows_at", "without_mask"]

_READ_BY_MODELS = ("input_ids", "attention_mask", "position_ids")
_OF_DECODER = "decoder_"  # what stands before the name of an entry about the text of a decoder, as in transformers


@dataclass(frozen=True)
class Rows:
    """Which tokens count as rows: those that nothing here leaves out.

    The model attends to all tokens as before, and the loss whose gradients are taken covers all of them; only the rows
    are left out. Padding never counts.

    Attributes:
        skip_first: How many tokens at the beginning of each text are left out, after padding in front: 1 leaves out a
            BOS token that the tokenizer added.
        skip_ids: Token ids that are left out wherever they stand, as integers or an integer tensor of one dimension:
            ``[tokenizer.bos_token_id]``, or ``tokenizer.all_special_ids``.
        mask: A mask of your own: the name of an entry of each batch, or a function of the batch. It is a tensor (B, L),
            True or 1 where a token counts. An entry of this name is not handed to the model. For hooks in the decoder
            of an encoder-decoder model the entry's name has ``decoder_`` before it.

    Raises:
        TypeError: If ``skip_first`` or a token id is not an integer, or ``mask`` is neither a name nor a function.
        ValueError: If ``skip_first`` or a token id is negative, or ``mask`` is an entry that means something else.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids = torch.arange(64).reshape(2, 32)
        >>> rows = scalpel.Rows(skip_first=1, skip_ids=[5, 40])
        >>> scalpel.collect(model, [ids], ["final_resid"], rows=rows, progress=False)["final_resid"].count
        60
    """

    skip_first: int = 0
    skip_ids: Iterable[int] | Tensor = ()
    mask: str | Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        first = integer(self.skip_first, "skip_first")
        if first < 0:
            raise ValueError(f"skip_first is {first}; it must be 0 or more")
        object.__setattr__(self, "skip_first", first)
        object.__setattr__(self, "skip_ids", _token_ids(self.skip_ids))
        if not (self.mask is None or isinstance(self.mask, str) or callable(self.mask)):
            raise TypeError(
                f"mask is {type(self.mask).__name__}; it must be the name of an entry of each batch, or a function of "
                "the batch"
            )
        if self.mask in _READ_BY_MODELS:
            raise ValueError(f"mask is {self.mask!r}, which the model itself reads: give the mask an entry of its own")
        if self.mask == "special_tokens_mask":
            raise ValueError(
                "mask is 'special_tokens_mask', which is 1 at special tokens, so that only these would count. To leave "
                "them out, give mask=lambda batch: batch['special_tokens_mask'] == 0, or their ids as skip_ids="
            )


RowsAsGiven = Rows | str | Callable[[Any], Tensor] | None


def read_rows(rows: RowsAsGiven) -> Rows | None:
    """Read what a user gives as ``rows``: a name or a function stands for the mask.

    Raises:
        TypeError: If it is anything else, such as a number, of which nobody can say whether it is an id or a count.
    """
    if rows is None or isinstance(rows, Rows):
        return rows
    if isinstance(rows, str) or callable(rows):
        return Rows(mask=rows)
    raise TypeError(
        f"rows is {rows!r}; it must be None, the name of a mask in each batch, a function of a batch that returns one, "
        "or scalpel.Rows: Rows(skip_first=1) leaves out the first token of each text, Rows(skip_ids=[...]) token ids"
    )


def key_of(rows: Rows) -> dict[str, Any]:
    """Return plain data that differs between different choices."""
    mask = function_mark(rows.mask) if callable(rows.mask) else rows.mask
    return {"skip_first": rows.skip_first, "skip_ids": list(rows.skip_ids), "mask": mask}


def without_mask(rows: Rows | None, batch: Any) -> Any:
    """Return the batch as the model takes it, without the entries of the mask."""
    if rows is None or not isinstance(rows.mask, str) or not isinstance(batch, Mapping):
        return batch
    entries = (rows.mask, _OF_DECODER + rows.mask)
    return {name: value for name, value in batch.items() if name not in entries}


def counted(rows: Rows, batch: Any, inputs: Inputs, of_decoder: bool = False) -> Tensor:
    """Tell which tokens count, bool (B, L).

    Args:
        rows: The choice.
        batch: The batch as the user gave it.
        inputs: What was read from it.
        of_decoder: Whether the tokens are those that the decoder of an encoder-decoder model reads.

    Raises:
        TypeError: If the mask is not a tensor.
        ValueError: If the batch has no such mask or it does not fit the tokens, or token ids are to be left out
            where there are none.
    """
    ids = inputs.others.get("decoder_input_ids") if of_decoder else inputs.ids
    shape = (inputs.ids if ids is None else ids).shape[:2]
    if len(shape) < 2:
        raise ValueError(f"the model's input has shape {tuple(shape)}, so it has no tokens of which some can count")
    real = inputs.real_of_decoder if of_decoder else inputs.real
    counts = torch.ones(shape, dtype=torch.bool, device=inputs.ids.device) if real is None else real
    if rows.skip_first:
        counts = counts & (counts.cumsum(dim=1) > rows.skip_first)
    if rows.skip_ids:
        if ids is None:
            raise ValueError(
                "skip_ids leaves out tokens of the decoder's text, which the model makes itself: give "
                "decoder_input_ids in the batch"
            )
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise ValueError(
                f"skip_ids leaves out token ids, and the model's input is {ids.dtype} of shape {tuple(ids.shape)}: "
                "leave it out, or give a mask"
            )
        counts = counts & ~torch.isin(ids, torch.tensor(rows.skip_ids, dtype=torch.int64, device=ids.device))
    if rows.mask is not None:
        counts = counts & _own_mask(rows.mask, batch, tuple(shape), of_decoder).to(counts.device)
    return counts


def _own_mask(given: str | Callable[[Any], Tensor], batch: Any, shape: tuple[int, ...], of_decoder: bool) -> Tensor:
    """Read the user's own mask, bool (B, L)."""
    if isinstance(given, str):
        name = _OF_DECODER + given if of_decoder else given
        if not isinstance(batch, Mapping) or name not in batch:
            keys = f"has the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "is a tensor of ids"
            raise ValueError(
                f"rows takes the mask {name!r} from each batch, and the batch {keys}: give a mapping with "
                f"input_ids and {name}, (batch, length), 1 where a token counts"
            )
        mask, where = batch[name], f"the mask {name!r}"
    else:
        if of_decoder:
            raise ValueError(
                "the function of rows chooses tokens of input_ids, and this hook has those that the decoder reads: "
                "give mask= the name of an entry, NAME, and put the mask of the decoder's tokens into "
                f"{_OF_DECODER}NAME"
            )
        mask, where = given(batch), "what the function of rows returns"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{where} is {type(mask).__name__}; it must be a tensor (batch, length)")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{where} has shape {tuple(mask.shape)}; it must be {shape}, like the tokens")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"{where} holds {float(mask.min()):g} to {float(mask.max()):g}; it must hold True or 1 where a token "
            "counts, and False or 0 elsewhere"
        )
    return mask.bool()


def rows_at(value: Tensor, real: Tensor | None, *, exactly: bool = False) -> Tensor:
    """Select the rows of a value that belong to chosen tokens, such as those that are not padding.

    Args:
        value: A value of shape (B, L, width) or (B·L, width). Of a value of another shape, all rows are returned.
        real: Where a token is chosen, bool (B, L); None if every token is.
        exactly: Whether a value of another shape is refused instead.

    Returns:
        The rows, (n, width).

    Raises:
        ValueError: If rows are to be left out of a value that is (L, B, width), or, with ``exactly``, of another shape.
    """
    if real is not None:
        real = real.to(value.device)
        if value.dim() > 2 and value.shape[:2] == real.shape:
            value = value[real]
        elif value.dim() > 2 and value.shape[:2] == real.T.shape:
            raise ValueError(
                f"the value has shape {tuple(value.shape)}, its length before its batch, so rows "
                + ("of single tokens" if exactly else "at padding")
                + " can't be left out: give "
                + ("no rows=, or leave this hook out" if exactly else "texts without padding, one length a batch")
            )
        elif value.dim() == 2 and len(value) == real.numel():  # a mixture of experts joins batch and length
            value = value[real.flatten()]
        elif exactly:
            raise ValueError(
                f"the value has shape {tuple(value.shape)}, without a row for each of the {tuple(real.shape)} tokens, "
                "so it can't be said which rows count: give no rows=, or leave this hook out"
            )
    return value.reshape(-1, value.shape[-1] if value.dim() else 1)


def _token_ids(given: Iterable[int] | Tensor) -> tuple[int, ...]:
    """Return token ids in ascending order, each once."""
    if isinstance(given, Tensor):
        if given.dim() != 1 or given.dtype.is_floating_point or given.dtype == torch.bool:
            raise TypeError(
                f"skip_ids is a tensor of {given.dtype} and shape {tuple(given.shape)}; it must hold integers along "
                "one dimension"
            )
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"skip_ids is {given!r}; it must be a collection of token ids, such as [0]")
    ids = sorted({integer(entry, "an id in skip_ids") for entry in given})
    if ids and ids[0] < 0:
        raise ValueError(f"skip_ids holds {ids[0]}; token ids begin at 0")
    return tuple(ids)
