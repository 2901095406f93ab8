"""What goes into a CircuitGPT's AbsTopKs and ReLUs: margins and the reach of tangents are read off there."""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from .scope import Scope

MaskWatch = Callable[[str, Tensor, int | None], None]
ActivationWatch = Callable[[str, Tensor], None]

_mask_watches: ContextVar[tuple[MaskWatch, ...]] = ContextVar("mask_watches", default=())
_activation_watches: ContextVar[tuple[ActivationWatch, ...]] = ContextVar("activation_watches", default=())


def watch_masks(watch: MaskWatch) -> Scope[MaskWatch]:
    """Inside, a forward pass calls ``watch(name, x, k)`` before every AbsTopK, x (B, L, width) being its input and
    k how many it keeps a token, and before every ReLU, with k None.

    ``name`` is the hook whose value it makes, or, for what it does to the residual stream after a block,
    ``"0.resid_post_attn"`` or ``"0.resid_post_mlp"``. Of watches inside one another the innermost is called. The
    context can be entered again.
    """
    return Scope(_mask_watches, watch)


def watched(name: str, x: Tensor, k: int | None) -> None:
    """The place in a forward pass that is watched."""
    if torch.compiler.is_compiling():
        return  # a compiled graph keeps no look at it
    for watch in _mask_watches.get()[-1:]:
        watch(name, x, k)


def watch_activations(watch: ActivationWatch) -> Scope[ActivationWatch]:
    """Inside, a forward pass calls ``watch(name, x)`` before the activation of each MLP, GELU and ReLU alike.

    x (B, L, d_mlp) is the activation's input and ``name`` the hook whose value is made of it (``"0.mlp.post_act"``).
    Of watches inside one another the innermost is called. The context can be entered again.
    """
    return Scope(_activation_watches, watch)


def activating(name: str, x: Tensor) -> None:
    """Announce an activation's input to the watch that is in force, if there is one."""
    if torch.compiler.is_compiling():
        return  # a compiled graph has no place for a call back into Python
    for watch in _activation_watches.get()[-1:]:
        watch(name, x)
