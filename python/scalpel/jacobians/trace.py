"""The trace: one primal of any supported model, kept as what products need, cut at any two of its hooks.

A model runs once, however many Jacobians between its hooks are wanted: the spectra of all layers, their product, and
figures of the values themselves all read the same trace. Each kind of rules has a trace of its own, in
:mod:`.lanes.trace` for a CircuitGPT and in :mod:`.rows.trace` for the decoders of transformers; this is what they have
in common, and where the right one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hooks.masks import MaskWatch
from ..hooks.positions import Selected
from .errors import explained
from .lanes.products import CircuitProducts
from .lanes.trace import CircuitTrace, has_products
from .passes import CircuitPass, Pass
from .precision import no_autocast
from .rows.decoder_pass import DecoderPass
from .rows.products import DenseProducts
from .rows.trace import DenseTrace

__all__ = ["Products", "See", "Trace", "has_rules", "products_of", "trace_of"]

See = Callable[[str, Tensor], None]


class Trace(Protocol):
    """One primal of a model that has rules, kept as what products need.

    Attributes:
        hooks: Where it can be cut, in the model's order. Nothing was computed after the last of them.
        values: The value at each of ``hooks``, for all tokens.
    """

    hooks: Sequence[str]
    values: dict[str, Tensor]

    def has(self, source: str, target: str) -> bool:
        """Whether it can be cut at ``source`` and, no earlier in the model, at ``target``."""

    def layers(self, source: str, target: str) -> Any:
        """What the rules need of the layers that a tangent meets on its way from one hook to the other."""


class Products(Protocol):
    """Products with the Jacobian between two hooks.

    Attributes:
        source: The value at the source, at the chosen positions.
        primal: The value at the target, at the chosen positions, the target's function applied.
        at: The chosen positions at the source and at the target.
    """

    source: Tensor
    primal: Tensor
    at: tuple[Selected, Selected]

    def push(self, tangents: Tensor) -> Tensor:
        """(T, *source) to (T, *target)."""

    def pull(self, cotangents: Tensor) -> Tensor:
        """(T, *target) to (T, *source)."""


def has_rules(run: Pass) -> bool:
    """Whether the sublayers of the pass's model have rules of their own, so that it can be traced."""
    return isinstance(run, DecoderPass) or (isinstance(run, CircuitPass) and has_products(run._frozen))


def trace_of(
    run: Pass,
    hooks: Sequence[str],
    see: See | None = None,
    see_mask: MaskWatch | None = None,
    relevance: bool = False,
) -> Trace:
    """The trace of a pass that :func:`has_rules`, to be cut at ``hooks``.

    ``see(hook, value)`` is called at every hook from the embedding to the last of ``hooks``, with the value that the
    hook records for all tokens; ``see_mask`` is called at every mask of a CircuitGPT on the way, as
    :func:`scalpel.hooks.masks.watch_masks` says. Both must leave what they see as it is. With ``relevance`` products
    follow the rules of the relevance lens instead of the derivative, as :mod:`scalpel.jacobian_lens.sweeps.sweep` says.
    """
    with torch.no_grad(), no_autocast(), explained(run):
        if isinstance(run, DecoderPass):
            return DenseTrace(run.decoder, run.text, hooks, see, relevance).run()
        assert isinstance(run, CircuitPass)
        return CircuitTrace(run, hooks, see, see_mask, relevance)


def products_of(
    trace: Trace, run: Pass, at: tuple[Selected, Selected], function: Callable[[Tensor], Tensor] | None
) -> Products:
    """Products between the ends of ``run``, at both of which ``trace`` can be cut, at the positions ``at``.

    ``function`` is applied to the value at the target, where it is given.
    """
    with torch.no_grad(), no_autocast(), explained(run):
        if isinstance(trace, DenseTrace):
            assert isinstance(run, DecoderPass)
            return DenseProducts(run, at, function, trace)
        assert isinstance(run, CircuitPass) and isinstance(trace, CircuitTrace)
        return CircuitProducts(run, at, function, trace)
