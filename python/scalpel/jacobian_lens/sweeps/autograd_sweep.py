"""The sweep of a model without rules, by PyTorch's autograd: copies of the prompt in a batch, each with a cotangent.

The forward pass runs once, on the prompt repeated as often as cotangents go back together, and its graph is kept. Each
backward pass then gives the gradients at all hooks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hooks.modules import first_tensor, with_first_tensor
from ...hooks.running import eager
from ...hooks.stopping import Stop
from ...jacobians.ends import check_floating, check_numbers
from ...jacobians.errors import explained
from ...jacobians.module_pass import ModulePass
from ...jacobians.passes import CircuitPass, Pass
from ...jacobians.precision import no_autocast, plain_tensors
from ...jacobians.sweep import Seen
from .positions import valid_tokens

__all__ = ["COPIES", "AutogradSweep", "repeated"]

COPIES = 16


def repeated(batch: Any, copies: int) -> Any:
    """Repeat the text of a batch of one."""
    if isinstance(batch, Mapping):
        return {name: repeated(value, copies) for name, value in batch.items()}
    if isinstance(batch, Tensor) and batch.dim() and len(batch) == 1:
        return batch.expand(copies, *batch.shape[1:]).clone()
    return batch


class AutogradSweep:
    """Cotangents at the tokens of a prompt that a lens counts, carried back by autograd.

    Args:
        run: A pass whose inputs are copies of one prompt.
        hooks: Where the cotangents are wanted, in any order; names of hooks in a CircuitGPT, else paths of modules.
        target: The hook where they start.
        skip_first: How many tokens of the prompt don't count.
        copies: How many copies of the prompt there are.
    """

    def __init__(self, run: Pass, hooks: Sequence[str], target: str, skip_first: int, copies: int) -> None:
        self._run = run
        self._target = target
        self._hooks = [hook for hook in hooks if hook != target]
        self._met: dict[str, Tensor] = {}
        with plain_tensors(), no_autocast(), explained(run):
            if isinstance(run, ModulePass):
                with torch.no_grad():  # finds buffers that a pass writes to, and puts them back
                    self._forward([], target)
            with torch.enable_grad():
                self._end = self._forward(self._hooks, target)
        missing = next((hook for hook in self._hooks if hook not in self._met), None)
        if missing is not None:
            raise ValueError(
                f"no path from {missing!r} to {target!r}: it doesn't run before the target. Choose an earlier layer"
            )
        for hook, value in (*self._met.items(), (target, self._end)):
            check_floating(value, hook)
            check_numbers(value, hook)
            if value.dim() != 3 or value.shape != self._end.shape:
                raise ValueError(
                    f"the value at {hook!r} has shape {tuple(value.shape)} and that at {target!r} "
                    f"{tuple(self._end.shape)}; a lens needs the same (batch, tokens, width) at both"
                )
        if len(self._end) != copies:
            raise ValueError(
                f"the value at {target!r} has a batch of {len(self._end)}, and {copies} was expected: give one prompt"
            )
        self.block = copies
        self.tokens = valid_tokens(self._end.shape[1], skip_first)
        self.width = self._end.shape[2]
        self.dtype = torch.float64 if self._end.dtype == torch.float64 else torch.float32
        self.device = self._end.device

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        """Carry cotangents (T, 1, tokens, width) back, as :class:`scalpel.jacobians.sweep.Sweep` says."""
        self._run.check_unchanged()
        see(self._target, cotangents, 0)
        values = [self._met[hook] for hook in self._hooks]
        if not values:
            return
        with plain_tensors(), no_autocast(), explained(self._run):
            for number, chunk in enumerate(cotangents.split(self.block)):
                full = torch.zeros_like(self._end)
                full[: len(chunk), self.tokens] = chunk[:, 0].to(full.dtype)
                gradients = torch.autograd.grad(self._end, values, full, retain_graph=True, allow_unused=True)
                for hook, gradient in zip(self._hooks, gradients, strict=True):
                    if gradient is None:
                        raise ValueError(f"no path from {hook!r} to {self._target!r}: choose an earlier layer")
                    see(hook, gradient[: len(chunk), None, self.tokens].to(self.dtype), number * self.block)

    def _forward(self, hooks: Sequence[str], target: str) -> Tensor:
        """Run the model to the target, and keep what it meets at ``hooks``; the graph starts at the first of them."""

        def meet(value: Any, hook: str) -> Any:
            tensor = first_tensor(value, hook)
            if hook == target:
                stop(tensor)
            if hook in self._met:
                return value
            if not self._met or not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_(torch.is_grad_enabled())
            self._met[hook] = tensor
            return with_first_tensor(value, tensor.clone())  # a later layer may work in place

        with Stop() as stop:
            if isinstance(self._run, CircuitPass):

                def tap(name: str, value: Tensor) -> Tensor:
                    met: Tensor = meet(value, name) if name in hooks or name == target else value
                    return met

                with eager():
                    self._run._frozen(*self._run.inputs, tap=tap)
            else:
                assert isinstance(self._run, ModulePass)
                self._run.output([*hooks, target], meet)
        if not stop.reached:
            raise ValueError(f"the forward pass never ran {target!r}: choose a target that it runs")
        reached: Tensor = stop.value
        return reached
