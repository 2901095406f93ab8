"""What goes into a CircuitGPT's AbsTopKs and ReLUs: margins and the reach of tangents are read off there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MaskWatch = Callable[[str, Tensor, int | None], None]

_mask_watch: ContextVar[MaskWatch | None] = ContextVar("mask_watch", default=None)


@contextmanager
def watch_masks(watch: MaskWatch) -> Iterator[None]:
    """Inside, a forward pass calls ``watch(name, x, k)`` before every AbsTopK, x (B, L, width) being its input and
    k how many it keeps a token, and before every ReLU, with k None.

    ``name`` is the hook whose value it makes, or, for what it does to the residual stream after a block,
    ``"0.resid_post_attn"`` or ``"0.resid_post_mlp"``.
    """
    before = _mask_watch.set(watch)
    try:
        yield
    finally:
        _mask_watch.reset(before)


def watched(name: str, x: Tensor, k: int | None) -> None:
    """The place in a forward pass that is watched."""
    if torch.compiler.is_compiling():
        return  # a compiled graph keeps no look at it
    watch = _mask_watch.get()
    if watch is not None:
        watch(name, x, k)
