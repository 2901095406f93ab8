"""Reading what a user gives a model: token ids, masks, positions, and padding on either side.

Every function that runs a model on a user's text reads the text here, so padding means the same everywhere: a padded
row has the values that its text has without padding. Positions start at the first real token, and no statistic counts
rows at padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Inputs",
    "Limits",
    "checked_ids",
    "holds_ids",
    "limits_of",
    "positions_after_padding",
    "read_inputs",
    "real_tokens",
]

_BY_PRODUCTS = ("labels", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")
# An additive mask forbids a key from this value down: models add -10000, -inf or the least number of the dtype.
_BLOCKED = -9999.0
_POSITION_TABLES = ("wpe", "positions_embed", "position_embeddings", "embed_positions", "position_embedding")


@dataclass(frozen=True)
class Limits:
    """Which token ids a model takes, as far as the model says.

    Args:
        vocab_size: Ids run from 0 to ``vocab_size - 1``; None where the model does not take token ids, or does not say.
        context: The most tokens that a row may have; None where there is no limit.
        device: Where the inputs must be; None where they stay where they are.
        takes_positions: Whether positions that follow from padding are given to the model. A CircuitGPT derives them
            itself, and some models take none.
        others: Whether the model takes anything besides ids, mask and positions.
        dtype: Of the model's values, in which a mask is added to scores.
    """

    vocab_size: int | None = None
    context: int | None = None
    device: torch.device | None = None
    takes_positions: bool = False
    others: bool = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch in the form that every function uses; all tensors are on the model's device.

    Args:
        ids: Token ids (B, L), int64. For a model that takes no token ids, its input, of any shape.
        mask: (B, L) with 1 at real tokens, or which keys each query may read: for a model of transformers what is added
            to the scores (B or 1, heads or 1, L, L), for a CircuitGPT (B, L, L). None if there is none.
        positions: (B, L) or (1, L), int64: those that the user gave, or those that follow from padding. None if the
            model's own default (0, 1, 2 and so on) is right.
        others: What else the batch holds for the model, by keyword.
    """

    ids: Tensor
    mask: Any = None
    positions: Tensor | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def real(self) -> Tensor | None:
        """(B, L) bool: True at real tokens, False at padding; None if all tokens are real."""
        if self.mask is None:
            return None
        real = real_tokens(self.ids, self.mask)
        return None if bool(real.all()) else real

    @cached_property
    def real_of_decoder(self) -> Tensor | None:
        """The same for ``decoder_input_ids``, the text that the decoder of an encoder-decoder model reads."""
        ids, mask = self.others.get("decoder_input_ids"), self.others.get("decoder_attention_mask")
        if ids is None:
            return self.real
        return None if mask is None else real_tokens(ids, mask)

    def keywords(self) -> dict[str, Any]:
        """Return the inputs as keyword arguments of the model."""
        named = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        return {name: value for name, value in named.items() if value is not None} | self.others


def read_inputs(batch: Any, limits: Limits, *, attention_mask: Any = None, position_ids: Any = None) -> Inputs:
    """Read and check what a user gives as a model's input.

    Args:
        batch: Token ids (B, L) as an integer tensor, or a batch as transformers' tokenizers make it: a mapping with
            ``input_ids`` and, optionally, ``attention_mask``, ``position_ids`` and what else the model takes.
        limits: What the model takes, from :func:`limits_of`.
        attention_mask: The mask, if it is not in the batch.
        position_ids: The positions, if they are not in the batch.

    Returns:
        The inputs, on the model's device and usable outside inference mode.

    Raises:
        TypeError: For ids, a mask or positions that are not tensors, or ids that are not integers.
        ValueError: For a wrong shape, an id outside the vocabulary, a text longer than the model's context, a mask
            that is not made of zeros and ones, or anything that is given twice.
    """
    if isinstance(batch, Mapping):
        values = {str(name): value for name, value in batch.items() if value is not None and name not in _BY_PRODUCTS}
        if "input_ids" not in values:
            raise ValueError(f"the batch has the keys {sorted(map(str, batch))}; it must have input_ids, a tensor")
    elif isinstance(batch, Tensor) or limits.vocab_size is not None:
        values = {"input_ids": batch}
    else:
        raise TypeError(
            f"a batch is {type(batch).__name__}; give token ids (B, L) as a tensor, or a batch from a tokenizer, which "
            "is a mapping with input_ids"
        )
    for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if value is not None:
            if name in values:
                raise ValueError(f"{name} is given twice, in the batch and beside it: give it once")
            values[name] = value
    ids = checked_ids(values.pop("input_ids"), limits.vocab_size, limits.context)
    device = limits.device or ids.device
    values = {name: _usable(value, device) for name, value in values.items()}
    ids = _usable(ids, device)
    mask, positions = values.pop("attention_mask", None), values.pop("position_ids", None)
    if not limits.others and values:
        values = {name: value for name, value in values.items() if name != "token_type_ids"}
        if values:
            raise ValueError(
                f"the batch has {min(values)!r} too; this model takes input_ids and, optionally, attention_mask and "
                "position_ids"
            )
    if mask is not None and limits.vocab_size is not None:
        _check_mask(mask, ids)
        mask = _added(mask, limits.dtype) if limits.others else mask
    if positions is None and mask is not None and limits.takes_positions:
        positions = positions_after_padding(real_tokens(ids, mask))
    elif positions is not None and limits.vocab_size is not None:
        positions = _checked_positions(positions, ids, limits.context)
    return Inputs(ids, mask, positions, values)


def holds_ids(inputs: Any) -> bool:
    """Tell whether ``inputs`` are token ids, and not a model's own arguments.

    A model's own arguments are a tuple, or keywords without ``input_ids`` (embeddings, for example).
    """
    if isinstance(inputs, Mapping):
        return inputs.get("input_ids") is not None
    return not isinstance(inputs, tuple)


def checked_ids(ids: Any, vocab_size: int | None, context: int | None) -> Tensor:
    """Check token ids against a vocabulary and a context, and return them as int64 (B, L).

    For a model that takes no token ids (``vocab_size`` is None) any tensor of at least two dimensions is allowed.

    Raises:
        TypeError: For anything but an integer tensor.
        ValueError: For a wrong shape, no token, too many tokens, or an id outside the vocabulary.
    """
    if vocab_size is None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids is {type(ids).__name__}; it must be a tensor (batch, length)")
        if ids.dim() < 2:
            raise ValueError(
                f"input_ids has shape {tuple(ids.shape)}; it must be (batch, length): one text is input_ids[None]"
            )
        return ids
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        how = ": torch.tensor(ids)[None] is one text" if isinstance(ids, (list, tuple)) else ""
        raise TypeError(f"input_ids is {kind}; it must be an int64 tensor (batch, length){how}")
    if ids.dim() != 2:
        hint = ": one text is input_ids[None]" if ids.dim() == 1 else ""
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; it must be (batch, length){hint}")
    if ids.numel() == 0:
        raise ValueError(f"input_ids is empty, shape {tuple(ids.shape)}: give at least one token")
    if context is not None and ids.shape[1] > context:
        raise ValueError(
            f"the text has {ids.shape[1]} tokens and the model's context holds {context}; shorten it or split it"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids holds {low if low < 0 else high}; ids run from 0 to {vocab_size - 1}: was the text encoded "
            "with this model's tokenizer?"
        )
    return ids.long()


def real_tokens(ids: Tensor, mask: Any) -> Tensor:
    """Tell which tokens are text and not padding, as (B, L) bool.

    A mask (B, L) says so directly. In a mask with an axis for the queries, (B, L, L) or (B or 1, heads or 1, L, L), a
    token is padding if no query reads it. Some libraries let the query of a padding token read every key, including
    later keys and other padding, to keep its softmax finite; such a query says nothing about what is real.
    """
    batch, length = ids.shape[:2]
    if isinstance(mask, Mapping):  # transformers' models of mixed layers take a mask for each kind of layer
        by_kind = torch.stack([real_tokens(ids, of_kind) for of_kind in mask.values() if of_kind is not None])
        return by_kind.any(dim=0)
    if mask.dim() == 2:
        return mask.bool().expand(batch, -1) if mask.shape[1] == length else torch.ones_like(ids, dtype=torch.bool)
    allowed = mask > _BLOCKED if mask.dtype.is_floating_point else mask.bool()
    if allowed.dim() == 4:
        allowed = allowed.any(dim=1)
    allowed = allowed.expand(batch, length, length)
    if mask.dim() == 3:  # a CircuitGPT's, in which causality always holds
        return allowed.tril().any(dim=1)
    open_to_all = allowed.all(dim=-1)
    open_to_all[:, -1] = False  # the last token of a causal model may read every key anyway
    reads = allowed & ~open_to_all[:, :, None]
    read = reads.any(dim=1)
    of_padding = (~read | ~open_to_all).all(dim=-1, keepdim=True)  # no query of a real token is open to all
    real = torch.where(of_padding & read.any(dim=-1, keepdim=True), read, allowed.any(dim=1))
    # In a batch that is otherwise causal, a row of nothing but padding has only queries that are open to all.
    whole = allowed.all(dim=2).all(dim=1, keepdim=True)
    causal = not bool((reads & ~whole[:, :, None]).triu(1).any()) and not bool(whole.all())
    return real & ~whole if causal and length > 1 else real


def positions_after_padding(real: Tensor) -> Tensor | None:
    """Return positions (B, L), int64, that start at the first real token of each row.

    Padding in front gets position 0. Masked tokens further on keep their place, as in the row without padding. Returns
    None if every row starts with a real token.
    """
    before = real.long().cummax(dim=1).values.eq(0).sum(dim=1, keepdim=True)
    if not bool(before.any()):
        return None
    return (torch.arange(real.shape[1], device=real.device)[None] - before).clamp_min(0)


def limits_of(model: nn.Module) -> Limits:
    """Find out which token ids a model takes.

    A CircuitGPT says so itself (``token_limits``), and a language model of transformers through its embeddings. Nothing
    is known of other modules, and nothing is checked for them.
    """
    own = getattr(model, "token_limits", None)
    if isinstance(own, Limits):
        return own
    device = next((parameter.device for parameter in model.parameters()), None)
    table = _token_table(model)
    if table is not None:
        device = table.weight.device
    if device is not None and device.type == "meta":  # offloaded weights, whose hooks also move the inputs
        device = None
    tables = _position_tables(model, table)
    takes_positions = _takes(model, "position_ids") and not _counts_positions_itself(model, tables)
    if table is None:
        return Limits(device=device, takes_positions=takes_positions)
    return Limits(table.num_embeddings, _context(tables), device, takes_positions, dtype=table.weight.dtype)


def _token_table(model: nn.Module) -> nn.Embedding | None:
    """Return the embeddings of the model's ``input_ids``; None if it is no language model."""
    ask = getattr(model, "get_input_embeddings", None)
    if not callable(ask) or not _takes(model, "input_ids"):
        return None
    try:
        table = ask()
    except (AttributeError, NotImplementedError):
        return None
    table = getattr(table, "base_layer", table)  # PEFT's adapters wrap it
    return table if isinstance(table, nn.Embedding) else None


def _takes(model: nn.Module, name: str) -> bool:
    """Tell whether the model, or a module that it hands its keywords on to, has that argument."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        return True
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return hands_on and any(_takes(child, name) for child in model.children())


def _position_tables(model: nn.Module, tokens: nn.Embedding | None) -> list[nn.Embedding]:
    """List the tables of token positions: those beside the table of tokens. Others count the patches of images."""
    beside = ""
    for name, module in model.named_modules():
        if module is tokens:
            beside = name.removesuffix(".base_layer").rpartition(".")[0]
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in _POSITION_TABLES
        and name.startswith(f"{beside}." if beside else "")
    ]


def _counts_positions_itself(model: nn.Module, tables: list[nn.Embedding]) -> bool:
    """Tell whether the model makes its own positions: after a padding index as RoBERTa, or with three axes."""
    if any(table.padding_idx is not None for table in tables):
        return True
    return any(hasattr(module, "get_rope_index") for module in model.modules())


def _context(tables: list[nn.Embedding]) -> int | None:
    """Return how many positions a learned table has for tokens; None if positions are computed."""
    sizes = []
    for table in tables:
        shift = 0 if table.padding_idx is None else table.padding_idx + 1
        sizes.append(table.num_embeddings - getattr(table, "offset", shift))
    return min(sizes, default=None)


def _usable(value: Any, device: torch.device) -> Any:
    """Move tensors to the device, and copy those made in inference mode, which autograd can't keep."""
    if isinstance(value, Mapping):
        return {name: _usable(entry, device) for name, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.clone() if value.is_inference() else value


def _check_mask(mask: Any, ids: Tensor) -> None:
    batch, length = ids.shape
    if isinstance(mask, Mapping):
        for of_kind in mask.values():
            if of_kind is not None:
                _check_mask(of_kind, ids)
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is {type(mask).__name__}; it must be a tensor")
    shape = tuple(mask.shape)
    fits = shape in ((batch, length), (batch, length, length)) or (
        mask.dim() == 4 and shape[0] in (1, batch) and shape[2:] == (length, length)
    )
    if not fits:
        raise ValueError(
            f"attention_mask has shape {shape}; it must be {(batch, length)} with 1 at real tokens, or say which keys "
            f"each query reads: {(batch, length, length)}, or ({batch} or 1, heads or 1, {length}, {length})"
        )
    zeros_and_ones = bool(((mask == 0) | (mask == 1)).all())
    if mask.dim() > 2 and not mask.dtype.is_floating_point and not zeros_and_ones:
        raise ValueError(
            f"attention_mask of shape {shape} holds {int(mask.min())} to {int(mask.max())}; as integers it is made of "
            "zeros and ones, 1 where a query may read a key"
        )
    if mask.dim() == 4 and mask.dtype.is_floating_point and zeros_and_ones and bool(mask.any()):
        raise ValueError(
            f"attention_mask of shape {shape} is {mask.dtype} and made of zeros and ones: such a mask is added to the "
            "scores, so it would forbid nothing. Give it as bool, or with 0 where a query may read and -inf elsewhere"
        )
    if mask.dim() == 2 and not zeros_and_ones:
        raise ValueError(
            f"attention_mask of shape {shape} holds {float(mask.min()):g} to {float(mask.max()):g}; a mask (batch, "
            "length) is made of zeros, at padding, and ones"
        )


def _added(mask: Any, dtype: torch.dtype) -> Any:
    """Turn a mask with an axis for queries into what is added to the scores, (B or 1, heads or 1, L, L).

    A model's attention may otherwise add the zeros and ones of a bool mask to its scores.
    """
    if isinstance(mask, Mapping):
        return {kind: None if of_kind is None else _added(of_kind, dtype) for kind, of_kind in mask.items()}
    if mask.dim() == 2:
        return mask
    mask = mask[:, None] if mask.dim() == 3 else mask
    if mask.dtype.is_floating_point:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask.bool(), torch.finfo(dtype).min)


def _checked_positions(positions: Any, ids: Tensor, context: int | None) -> Tensor:
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int64, torch.int32):
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"position_ids is {kind}; it must be an int64 tensor")
    length = ids.shape[1]
    if positions.dim() > 2:  # with axes for height, width and time, for example, which the model itself checks
        return positions
    if tuple(positions.shape) not in ((length,), (1, length), tuple(ids.shape)):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}; it needs {length} positions a row: ({length},), "
            f"(1, {length}) or {tuple(ids.shape)}"
        )
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or (context is not None and high >= context):
        last = "" if context is None else f" to {context - 1}"
        raise ValueError(f"position_ids runs from {low} to {high}; positions go from 0{last}")
    return positions.long() if positions.dim() == 2 else positions.long()[None]
