"""Watching what goes into each AbsTopK and ReLU of a CircuitGPT.

Margins, and how far a tangent may be followed before a mask flips, are computed from it.
"""

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
    """Call ``watch(name, x, k)`` before every AbsTopK and every ReLU of a forward pass inside the context.

    ``x`` (B, L, width) is the input of the mask, and ``k`` how many entries an AbsTopK keeps for each token, or None
    for a ReLU. ``name`` is the hook whose value the mask makes; for a mask on the residual stream after attention or
    after the MLP it is ``"0.resid_post_attn"`` or ``"0.resid_post_mlp"``. If watches are nested, only the innermost is
    called. The context can be entered more than once.
    """
    return Scope(_mask_watches, watch)


def watched(name: str, x: Tensor, k: int | None) -> None:
    """Tell the watch that is in force, if there is one, about the input of a mask; forward passes call this."""
    if torch.compiler.is_compiling():
        return  # a compiled graph has no place for a call back into Python
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
