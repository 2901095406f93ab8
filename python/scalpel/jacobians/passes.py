"""One forward pass of a model, from a source hook to a target: the passes that Jacobians differentiate.

A pass is deterministic: it keeps its own copy of the inputs and of the interventions that were active when it
was made, and runs in evaluation mode. It stops as soon as the target is recorded.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..hooks.inputs import holds_ids, limits_of, read_inputs
from ..hooks.modules import (
    first_tensor,
    hooked,
    leaves,
    module_hooks,
    rebuilt,
    user_hooks,
    watching_outputs,
    with_first_tensor,
)
from ..hooks.names import hook_named, known_hook
from ..hooks.running import ALONE, running
from ..hooks.stopping import Stop
from ..models.circuitgpt.attention import allowed_keys
from ..models.circuitgpt.core import MODULE_PATHS
from ..models.circuitgpt.model import CircuitGPT

LOGITS = "logits"


class Pass:
    """What both kinds of pass share. ``run(at_source)`` gives the value at the target, where ``at_source``
    may give another value in place of the one at the source."""

    def __init__(self, model: nn.Module, source: str, target: str) -> None:
        self.model = model
        self.source = source
        self.target = target
        self.inputs: Any = None
        self.interventions: list[Any] = []
        self.offloaded = any(each.device.type == "meta" for each in model.parameters())
        self._weights = self._weights_mark()
        self._hooks = user_hooks(model)
        self._modules = list(model.modules())
        self._buffers = {} if self.offloaded else _buffers_mark(model)
        self._written: dict[str, Tensor] = {}  # buffers of modules that write to one, as they were at the start

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        """About how many numbers one tangent needs at its peak: the chunks of tangents are cut by it."""
        raise NotImplementedError

    # offloaded: weights are elsewhere until their layer runs, on the device "meta" meanwhile, or most of them are.

    def check_unchanged(self) -> None:
        """RuntimeError if a weight, a buffer, a module or a hook changed since the pass was made: primal and tangents
        would not fit together."""
        if self._weights_mark() != self._weights:
            raise RuntimeError("the model's weights changed after this Jacobian was made: call scalpel.jacobian again")
        modules = list(self.model.modules())
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules, strict=True)):
            raise RuntimeError("the model's modules changed after this Jacobian was made: call scalpel.jacobian again")
        now_held = _buffers_mark(self.model) if self._buffers else {}
        changed = [name for name, mark in self._buffers.items() if now_held.get(name) != mark]
        if changed := [name for name in changed if name not in self._written]:
            raise RuntimeError(
                f"the model's buffer {changed[0]!r} changed after this Jacobian was made: call scalpel.jacobian again"
            )
        now = user_hooks(self.model)
        if now == self._hooks:
            return
        added = [where for where, hook in now if all(hook is not before for _, before in self._hooks)]
        gone = [where for where, hook in self._hooks if all(hook is not after for _, after in now)]
        what = "hooks run in another order than"
        if added or gone:
            what = f"a hook was added to {added[0]}" if added else f"a hook was removed from {gone[0]}"
            what += " after"
        else:
            what += " when"
        raise RuntimeError(
            f"{what} this Jacobian was made, so its products would not belong to its primal: call scalpel.jacobian "
            "again, or put the hooks back as they were"
        )

    def _weights_mark(self) -> tuple[tuple[int, int], ...]:
        """Where each weight is and how often it was written to. Weights that are offloaded come and go with every pass
        and leave no such trace."""
        if self.offloaded:
            return ()
        return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in self.model.parameters())

    def differs(self, other: "Pass") -> str | None:
        """Why the values of ``other`` at a shared hook are not this pass's; None where they are."""
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
    """A CircuitGPT between two of its hooks, ``logits`` included as a target."""

    def __init__(
        self,
        model: CircuitGPT,
        input_ids: Any,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        source: str,
        target: str,
    ) -> None:
        hooks = model.hook_names
        source = hook_named(source, MODULE_PATHS, hooks, True) or source
        target = hook_named(target, MODULE_PATHS, hooks, False) or target
        super().__init__(model, source, target)
        inputs = read_inputs(input_ids, model.token_limits, attention_mask=attention_mask, position_ids=position_ids)
        self.hooks = [*hooks, LOGITS]
        known_hook(source, self.hooks[:-1], "source", "a CircuitGPT")
        known_hook(target, self.hooks, "target", "a CircuitGPT")
        self.inputs = kept((inputs.ids, inputs.mask, inputs.positions))
        self.interventions = list(model._interventions)
        # a shallow copy shares every weight and keeps the ablations of this moment, whatever is left later
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
            stop(self._frozen(*self.inputs, tap=tap))  # the logits, where the target is nowhere before them
        reached: Tensor = stop.value
        return reached

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        config = self._frozen.config
        assert config.d_mlp is not None
        batch, length = self.inputs[0].shape
        per_token = 4 * config.d_in + 6 * config.d_attn + 4 * config.d_mlp + 4 * config.n_head * length
        return batch * length * per_token + source.numel() + 2 * target.numel()


class ModulePass(Pass):
    """Any nn.Module between two module paths: ``name`` is the module's output, ``name:in`` its input.

    Where a module takes or gives several values, the first tensor among them is meant. A module that runs
    more than once counts at its first run (as a target: its first run after the source). ``logits`` is the
    model's output, or its ``logits`` field.
    """

    def __init__(self, model: nn.Module, inputs: Any, keywords: dict[str, Any], source: str, target: str) -> None:
        super().__init__(model, source, target)
        names = module_hooks(model)
        kind = f"this {type(model).__name__}, whose hooks are module paths (':in' ends an input's)"
        known_hook(source, names, "source", kind)
        self._logits = target == LOGITS and LOGITS not in names
        if not self._logits:
            known_hook(target, names, "target", kind)
        arguments, keywords = _arguments(model, inputs, keywords)
        if "use_cache" in inspect.signature(model.forward).parameters:
            keywords.setdefault("use_cache", False)  # a cache of keys would outlive the pass
        self.inputs = kept((arguments, keywords))
        self.largest = 0
        self._measured = False
        self._notes: dict[nn.Module, dict[str, Any]] = {}  # what the modules of buffers held besides, at the start
        self._written: dict[str, Tensor] = {}  # buffers of modules that write to one, as they were at the start

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        entered = False

        def meet(value: Any, hook: str) -> Any:
            nonlocal entered
            if hook == self.source and not entered:
                entered = True
                value = with_first_tensor(value, at_source(first_tensor(value, hook)))
            if hook == self.target and entered:
                stop(first_tensor(value, hook))
            return value

        with ALONE, running(self.model), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
            for hook in dict.fromkeys((self.source, self.target)):
                if hook != self.target or not self._logits:
                    stack.enter_context(hooked(self.model, hook, meet))
            with Stop() as stop:
                output = self._called() if self._measured else self._called_and_measured()
        if stop.reached:
            reached: Tensor = stop.value
            return reached
        if not entered:
            raise ValueError(f"the forward pass never ran {self.source!r}: choose a source that it runs")
        if self._logits:
            named = output.get(LOGITS, output) if isinstance(output, Mapping) else output
            return first_tensor(getattr(named, LOGITS, named), LOGITS)
        raise ValueError(
            f"no path from {self.source!r} to {self.target!r}: {self.target!r} does not run after the "
            "source. Swap them, or choose a later target"
        )

    def _called(self) -> Any:
        """The model's output. Buffers that its forward pass writes to are given as copies of what they were at the
        start, made here, inside whatever transform this runs in: a transform forbids writing to what lies outside."""
        arguments, keywords = self.inputs
        if not self._written:
            return self.model(*arguments, **keywords)
        copies = {name: value.clone() for name, value in self._written.items()}
        before = {module: _notes_of(module) for module in self._notes}
        try:
            for module, notes in self._notes.items():
                vars(module).update(notes)
            return functional_call(self.model, copies, arguments, keywords, tie_weights=False)
        finally:
            for module, notes in before.items():
                vars(module).update(notes)

    def _called_and_measured(self) -> Any:
        """The same in the first run, which looks for the largest value, and for the buffers that are written to."""

        def measure(output: Any) -> None:
            for value in leaves(output):
                if isinstance(value, Tensor):
                    self.largest = max(self.largest, value.numel())

        held = {} if self.offloaded else dict(self.model.named_buffers())
        before = {name: each.clone() for name, each in held.items()}
        marks = _buffers_mark(self.model)
        notes = {module: _notes_of(module) for module in self.model.modules() if module._buffers}
        try:
            with watching_outputs(self.model, measure):
                return self._called()
        finally:
            after = _buffers_mark(self.model)
            owners = {_owner(name) for name in held if after.get(name) != marks[name]}
            for name in (name for name in held if _owner(name) in owners):
                module = self.model.get_submodule(_owner(name))
                self._written[name] = before[name]
                module._buffers[name.rpartition(".")[2]] = held[name].copy_(before[name])
                self._notes[module] = notes[module]
            for module, noted in self._notes.items():
                vars(module).update(noted)  # for how long a text the buffer is made, say
            self._measured = True

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        return 8 * max(self.largest, source.numel(), target.numel())


def _arguments(model: nn.Module, inputs: Any, keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with. Token ids of a language model are read and checked as everywhere; another module
    is given what the user gives, a mapping as keywords and a tuple as arguments."""
    limits = limits_of(model)
    if limits.vocab_size is not None and holds_ids(inputs):
        return (), read_inputs(inputs, limits, **keywords).keywords()
    if isinstance(inputs, Mapping):
        repeated = sorted(set(inputs) & set(keywords))
        if repeated:
            raise ValueError(f"{repeated[0]} is given twice, in the batch and beside it: give it once")
        return (), {**inputs, **keywords}
    return inputs if isinstance(inputs, tuple) else (inputs,), keywords


def kept(value: Any) -> Any:
    """A copy that later changes in place cannot reach; also what frees it from inference mode."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: kept(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, [kept(each) for each in value])
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _buffers_mark(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The same of buffers, by name."""
    return {name: (id(each), 0 if each.is_inference() else each._version) for name, each in model.named_buffers()}


def _owner(name: str) -> str:
    """The path of the module that a buffer is of."""
    return name.rpartition(".")[0]


def _notes_of(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module holds: numbers, words, and tensors that are no buffers."""
    plain = (bool, int, float, str, type(None), Tensor)
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "training"}
