"""Finding the tokens at which a rounding difference can flip an AbsTopK, or the choice of the next token."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...hooks.masks import watch_masks
from .core import CircuitCore

__all__ = ["NearTie", "near_ties"]


class NearTie(NamedTuple):
    """A token at which the margin of a choice is small.

    Attributes:
        row: The text's row in the batch.
        token: The token's column.
        hook: The hook whose value the AbsTopK makes, ``"0.resid_post_attn"`` or ``"0.resid_post_mlp"`` for one on the
            residual stream, or ``"logits"`` for the choice of the next token.
        margin: The smallest magnitude that is kept, less the largest that is dropped; for the logits, the largest less
            the second.
    """

    row: int
    token: int
    hook: str
    margin: float


@torch.no_grad()
def near_ties(
    model: CircuitCore, input_ids: Tensor, within: float = 1e-5, attention_mask: Tensor | None = None
) -> list[NearTie]:
    """List the places where a choice is decided by less than ``within``: :meth:`scalpel.CircuitGPT.near_ties`."""
    if not isinstance(within, int | float) or not 0 <= within < math.inf:
        raise ValueError(f"within is {within!r}; it must be a number that is not negative")
    input_ids = model._checked_ids(input_ids)
    found: list[NearTie] = []
    # Padding is no text: whichever entries survive there, no token of the text reads them.
    real = torch.ones(input_ids.shape, dtype=torch.bool, device=model.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask.to(model.device).bool()

    def note(hook: str, margins: Tensor) -> None:
        for row, token in ((margins < within) & real).nonzero().tolist():
            found.append(NearTie(row, token, hook, float(margins[row, token])))

    def watch(hook: str, x: Tensor, k: int | None) -> None:
        if k is not None and 0 < k < x.shape[-1]:
            note(hook, _margins(x.abs(), k))

    with watch_masks(watch):
        logits = model(input_ids, attention_mask)
    if logits.shape[-1] > 1:
        note("logits", _margins(logits, 1, drop_zeros=False))
    return found


def _margins(values: Tensor, k: int, drop_zeros: bool = True) -> Tensor:
    """The k-th largest entry less the next one, along the last dimension; infinite where nothing hangs on it.

    With ``drop_zeros`` nothing hangs on a choice among zeros, which are zero whether they are kept or not.
    """
    largest = values.topk(k + 1, dim=-1).values
    margins = largest[..., k - 1] - largest[..., k]
    return margins.masked_fill(largest[..., k - 1] == 0, math.inf) if drop_zeros else margins
