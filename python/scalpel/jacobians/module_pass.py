"""A forward pass of any module between two of its modules' values."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..hooks.adapters import without_cache
from ..hooks.grouped import GroupByGroup
from ..hooks.inputs import holds_ids, limits_of, read_inputs
from ..hooks.modules import first_tensor, hooked, leaves, module_hooks, watching_outputs, with_first_tensor
from ..hooks.names import LOGITS, known_hook
from ..hooks.running import ALONE, running
from ..hooks.stopping import Stop
from .passes import Pass, buffers_mark, kept

__all__ = ["ModulePass"]


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
        keywords = without_cache(model) | keywords
        self.inputs = kept((arguments, keywords))
        self.largest = 0
        self._measured = False
        self._grouped = GroupByGroup()  # experts, which every run computes in the same way
        self._notes: dict[nn.Module, dict[str, Any]] = {}  # other values of the owners of buffers, at the start
        self._written: dict[str, Tensor] = {}  # all buffers of modules that write to one, as they were at the start

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

        hooks = [self.source] if self._logits else [self.source, self.target]
        with ALONE, sdpa_kernel(SDPBackend.MATH), Stop() as stop:
            output = self.output(hooks, meet)
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

    def output(self, hooks: Sequence[str], meet: Callable[[Any, str], Any]) -> Any:
        """Return the model's output. ``meet(value, hook)`` is called at ``hooks``, and its result goes on."""
        with running(self.model), ExitStack() as stack:
            if self._grouped.used or not self._measured:
                stack.enter_context(self._grouped)
            for hook in dict.fromkeys(hooks):
                stack.enter_context(hooked(self.model, hook, meet))
            return self._called() if self._measured else self._called_and_measured()

    def _called(self) -> Any:
        """Return the model's output.

        Buffers that its forward pass writes to are replaced by copies of what they were at the start. The copies are
        made here, inside whatever transform this runs in, because a transform forbids writing to what lies outside it.
        """
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
        """The model's output in the first run, which looks for the largest value and for buffers that are written."""

        def measure(output: Any) -> None:
            for value in leaves(output):
                if isinstance(value, Tensor):
                    self.largest = max(self.largest, value.numel())

        held = {} if self.offloaded else dict(self.model.named_buffers())
        before = {name: value.clone() for name, value in held.items()}
        marks = buffers_mark(self.model)
        notes = {module: _notes_of(module) for module in self.model.modules() if module._buffers}
        try:
            with watching_outputs(self.model, measure):
                return self._called()
        finally:
            after = buffers_mark(self.model)
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
    """The arguments and keywords that the model is called with.

    Token ids of a language model are read and checked. Any other module gets what the user gives, a mapping as keywords
    and a tuple as arguments.
    """
    limits = limits_of(model)
    if limits.vocab_size is not None and holds_ids(inputs):
        return (), read_inputs(inputs, limits, **keywords).keywords()
    if isinstance(inputs, Mapping):
        repeated = sorted(set(inputs) & set(keywords))
        if repeated:
            raise ValueError(f"{repeated[0]} is given twice, in the batch and beside it: give it once")
        return (), {**inputs, **keywords}
    return inputs if isinstance(inputs, tuple) else (inputs,), keywords


def _owner(name: str) -> str:
    """The path of the module that owns a buffer."""
    return name.rpartition(".")[0]


def _notes_of(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module holds: numbers, words, and tensors that are no buffers."""
    plain = (bool, int, float, str, type(None), Tensor)
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "training"}
