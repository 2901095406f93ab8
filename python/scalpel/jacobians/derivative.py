"""The derivative of any forward pass by ``torch.func``, for models that have no rules of their own.

``vmap(jvp)`` carries tangents forward and ``vmap(vjp)`` carries cotangents back, in chunks that bound the memory.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap

from ..hooks.positions import Selected, add_at, describe, read_at, select
from ..hooks.running import ALONE
from .ends import check_floating, finished
from .errors import explained
from .module_pass import ModulePass
from .passes import Pass
from .precision import plain_tensors

__all__ = ["Derivative"]

_CHUNK_BYTES = 1 << 30  # approximate memory that one chunk of tangents may need at its peak
_announced = False


class Derivative:
    """Products with the Jacobian of a pass, and its primal.

    One run of the pass gives ``source`` and ``primal``, the values at the chosen positions of both hooks. Where the
    wiring of the model isn't known, that run also carries a random tangent, which shows whether a path leads from the
    source to the target.
    """

    def __init__(self, run: Pass, wanted: tuple[Any, Any], function: Callable[[Tensor], Tensor] | None) -> None:
        self.run = run
        self.function = function
        self.at: tuple[Selected, Selected] = (None, None)
        at_source: list[Tensor] = []
        wiring_unknown = isinstance(run, ModulePass)
        if wiring_unknown:
            _announce(run.model)

        def enter(value: Tensor) -> Tensor:
            check_floating(value, run.source)
            self.at = (_select(wanted[0], value, "source"), None)
            at_source.append(
                read_at(value, self.at[0]).detach().clone()
            )  # cloned, since a later layer may work in place
            if not wiring_unknown:
                return value
            generator = torch.Generator().manual_seed(0)
            tangent = torch.randn(at_source[0].shape, generator=generator, dtype=torch.float32, device="cpu")
            dual = forward_ad.make_dual(torch.zeros_like(at_source[0]), tangent.to(at_source[0]))
            return add_at(value, dual, self.at[0])

        with ALONE, torch.no_grad(), forward_ad.dual_level(), explained(run):
            recorded = run.run(enter)
            self.at = (self.at[0], _select(wanted[1], recorded, "target"))
            dual = forward_ad.unpack_dual(self._finished(recorded, at_source[0].dtype))
            if wiring_unknown:
                self._check_path(dual.tangent)
        self.source = at_source[0]
        self.primal = dual.primal.detach().clone()
        bytes_of_tangent = run.tangent_size(self.source, self.primal) * self.source.element_size()
        self.chunk = max(1, _CHUNK_BYTES // max(1, bytes_of_tangent))

    def push(self, tangents: Tensor) -> Tensor:
        """Carry tangents (T, *source) forward to the target, (T, *target), together with one primal."""
        self.run.check_unchanged()
        zero = torch.zeros_like(self.source)
        with ALONE, plain_tensors(), torch.no_grad(), explained(self.run):
            if self.run.offloaded:
                return torch.stack([self._pushed_alone(zero, tangent) for tangent in tangents])
            return vmap(lambda tangent: jvp(self._moved, (zero,), (tangent,))[1], chunk_size=self.chunk)(tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Carry cotangents (T, *target) back to the source, (T, *source), after one pass forward."""
        self.run.check_unchanged()
        with ALONE, plain_tensors(), torch.no_grad(), explained(self.run):
            if self.run.offloaded:
                return self._pulled_alone(cotangents)
            back = vjp(self._moved, torch.zeros_like(self.source))[1]
            return vmap(lambda cotangent: back(cotangent)[0], chunk_size=self.chunk)(cotangents)

    # Weights that are loaded while a layer runs can't be used inside a transform of torch.func, which would treat them
    # as values to be differentiated. A single tangent or cotangent needs no transform.

    def _pushed_alone(self, zero: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(self._moved(forward_ad.make_dual(zero, tangent))).tangent
        return torch.zeros_like(self.primal) if moved is None else moved

    def _pulled_alone(self, cotangents: Tensor) -> Tensor:
        with torch.enable_grad():
            delta = torch.zeros_like(self.source, requires_grad=True)
            moved = self._moved(delta)
            pulled = [torch.autograd.grad(moved, delta, row, retain_graph=True)[0] for row in cotangents]
        return torch.stack(pulled)

    def _moved(self, delta: Tensor) -> Tensor:
        """The target's value when ``delta`` is added at the source."""
        recorded = self.run.run(lambda value: add_at(value, delta, self.at[0]))
        return self._finished(recorded, delta.dtype)

    def _finished(self, recorded: Tensor, dtype: torch.dtype) -> Tensor:
        """The target at a recorded value of its hook: the chosen positions, and the function where there is one."""
        return finished(read_at(recorded, self.at[1]), self.function, self.run.target, dtype)

    def _check_path(self, tangent: Tensor | None) -> None:
        """Raise ValueError where the random tangent did not reach the target."""
        ends = f"from {self.run.source!r} to {self.run.target!r}"
        if tangent is None:
            raise ValueError(f"no path {ends}: the target does not read the source. Choose a target further on")
        if self.at != (None, None) and not bool(tangent.any()):
            raise ValueError(
                f"no path {ends}: nothing added at {describe(self.at[0])} of the source moves "
                f"{describe(self.at[1])} of the target. Under causal attention, choose later target positions"
            )


def _select(wanted: Any, value: Tensor, side: str) -> Selected:
    """The tokens of ``value`` that the positions ``wanted`` select; None for all."""
    if wanted is None:
        return None
    if value.dim() < 3:
        raise ValueError(
            f"positions need a {side} value (batch, tokens, width); it has shape {tuple(value.shape)}: "
            "leave positions at None"
        )
    return select(wanted, value.shape[1], side)


def _announce(model: nn.Module) -> None:
    """Warn once that models without rules are differentiated by torch.func."""
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(
            f"scalpel.jacobian differentiates {type(model).__name__} through torch.func with the math "
            "attention backend: exact, but slower and larger than a fused one. This warning comes once",
            stacklevel=3,
        )
