"""One forward pass of a model, from a source hook to a target: the passes that Jacobians differentiate.

A pass is deterministic: it keeps its own copy of the inputs, and of the interventions that were active when it was
made, and runs in evaluation mode. It stops as soon as the target is recorded.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.adapters import adapters_mark
from ..hooks.inputs import read_inputs
from ..hooks.modules import rebuilt, user_hooks
from ..hooks.names import LOGITS, check_no_pattern, hook_named, known_hook, with_patterns
from ..hooks.stopping import Stop
from ..models.circuitgpt.attention import allowed_keys
from ..models.circuitgpt.core import MODULE_PATHS
from ..models.circuitgpt.model import CircuitGPT

__all__ = ["CircuitPass", "Pass", "buffers_mark", "kept"]


class Pass:
    """The part that all kinds of pass share: a model, two hooks, and a record of the model's state.

    ``offloaded`` says whether weights are kept elsewhere until their layer runs; until then they are on the device
    "meta".
    """

    def __init__(self, model: nn.Module, source: str, target: str) -> None:
        self.model = model
        self.source = source
        self.target = target
        self.inputs: Any = None
        self.interventions: list[Any] = []
        self.offloaded = any(weight.device.type == "meta" for weight in model.parameters())
        self._weights = self._weights_mark()
        self._hooks = user_hooks(model)
        self._adapters = adapters_mark(model)
        self._modules = list(model.modules())
        self._buffers = {} if self.offloaded else buffers_mark(model)
        self._written: dict[str, Tensor] = {}  # initial values of all buffers of modules that write to one

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the value at the target, with the value at the source replaced by what ``at_source`` returns."""
        raise NotImplementedError

    def between(self, source: str, target: str) -> "Pass | None":
        """Return the same pass between other hooks; None where a new pass must be made."""
        return None

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        """Estimate how many numbers one tangent needs at its peak, which decides the size of a chunk."""
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a weight, a buffer, a module, an adapter or a hook has changed since the pass was made.

        The tangents would then no longer belong to the primal.
        """
        if self._weights_mark() != self._weights:
            raise RuntimeError("the model's weights changed after this Jacobian was made: call scalpel.jacobian again")
        modules = list(self.model.modules())
        if len(modules) != len(self._modules) or any(
            module_now is not module_before for module_now, module_before in zip(modules, self._modules, strict=True)
        ):
            raise RuntimeError("the model's modules changed after this Jacobian was made: call scalpel.jacobian again")
        buffers_now = buffers_mark(self.model) if self._buffers else {}
        changed = [name for name, mark in self._buffers.items() if buffers_now.get(name) != mark]
        if changed := [name for name in changed if name not in self._written]:
            raise RuntimeError(
                f"the model's buffer {changed[0]!r} changed after this Jacobian was made: call scalpel.jacobian again"
            )
        if adapters_mark(self.model) != self._adapters:
            raise RuntimeError(
                "the model's adapters were switched after this Jacobian was made: call scalpel.jacobian again, or "
                "switch them back"
            )
        hooks_now = user_hooks(self.model)
        if hooks_now == self._hooks:
            return
        added = [where for where, hook in hooks_now if all(hook is not before for _, before in self._hooks)]
        removed = [where for where, hook in self._hooks if all(hook is not after for _, after in hooks_now)]
        what = "hooks run in another order than"
        if added or removed:
            what = f"a hook was added to {added[0]}" if added else f"a hook was removed from {removed[0]}"
            what += " after"
        else:
            what += " when"
        raise RuntimeError(
            f"{what} this Jacobian was made, so its products would not belong to its primal: call scalpel.jacobian "
            "again, or put the hooks back as they were"
        )

    def _weights_mark(self) -> tuple[tuple[int, int], ...]:
        """Return the address of each weight and how often the weight was written to.

        The result is empty for an offloaded model, whose weights are loaded and released in every pass.
        """
        if self.offloaded:
            return ()
        return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in self.model.parameters())

    def differs(self, other: "Pass") -> str | None:
        """Return the reason why ``other`` has different values at a shared hook; None where it has the same."""
        if self.model is not other.model:
            return "they belong to two models"
        if not _same(self.inputs, other.inputs):
            return "they were taken at different model inputs"
        if len(self.interventions) != len(other.interventions) or any(
            a is not b for a, b in zip(self.interventions, other.interventions, strict=True)
        ):
            return "they were taken under different ablations or interventions"
        return None


class CircuitPass(Pass):
    """The pass of a CircuitGPT between two of its hooks; ``logits`` may be the target."""

    def __init__(
        self,
        model: CircuitGPT,
        input_ids: Any,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        source: str,
        target: str,
    ) -> None:
        hooks = with_patterns(model.hook_names)
        source = hook_named(source, MODULE_PATHS, hooks, True) or source
        target = hook_named(target, MODULE_PATHS, hooks, False) or target
        super().__init__(model, source, target)
        inputs = read_inputs(input_ids, model.token_limits, attention_mask=attention_mask, position_ids=position_ids)
        self.hooks = [*hooks, LOGITS]
        known_hook(source, self.hooks[:-1], "source", "a CircuitGPT")
        check_no_pattern(source)
        known_hook(target, self.hooks, "target", "a CircuitGPT")
        self.inputs = kept((inputs.ids, inputs.mask, inputs.positions))
        self.interventions = list(model._interventions)
        # a shallow copy shares the weights, and keeps the ablations that are active now
        self._frozen = copy.copy(model)
        self._frozen._interventions = self.interventions

    @property
    def length(self) -> int:
        return int(self.inputs[0].shape[1])

    @property
    def allowed(self) -> Tensor:
        return allowed_keys(self.inputs[0], self.inputs[1])

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        def tap(name: str, value: Tensor) -> Tensor:
            if name == self.source:
                value = at_source(value)
            if name == self.target:
                stop(value)
            return value

        with Stop() as stop:
            # The pass goes past its target only where that is the logits.
            stop(self._frozen(*self.inputs, tap=tap, patterns=[self.target]))
        reached: Tensor = stop.value
        return reached

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        config = self._frozen.config
        assert config.d_mlp is not None
        batch, length = self.inputs[0].shape
        per_token = 4 * config.d_in + 6 * config.d_attn + 4 * config.d_mlp + 4 * config.n_head * length
        return batch * length * per_token + source.numel() + 2 * target.numel()


def kept(value: Any) -> Any:
    """Copy a value, so that later changes in place don't affect it; the copy is no longer in inference mode."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: kept(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, [kept(entry) for entry in value])
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two inputs are equal; tensors must also have the same device and dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def buffers_mark(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, by name, the identity of each buffer's tensor and how often the buffer was written to."""
    return {name: (id(b), 0 if b.is_inference() else b._version) for name, b in model.named_buffers()}
