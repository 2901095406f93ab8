"""One forward pass of a model, from a source hook to a target: the passes that Jacobians differentiate.

A pass is deterministic: it keeps its own copy of the inputs and of the interventions that were active when it
was made, and runs in evaluation mode. It stops as soon as the target is recorded.
"""

import copy
import difflib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.circuitgpt import MODULE_PATHS, CircuitGPT, allowed_keys
from ..models.families import hook_named

LOGITS = "logits"
_IDLE_KEYS = ("labels", "token_type_ids", "special_tokens_mask")  # of a batch: no CircuitGPT reads them
_ONE_AT_A_TIME = threading.RLock()  # hooks and training flags are the module's own: one thread at a time


class _Reached(Exception):
    """The target has been recorded; nothing after it is needed."""


class Pass:
    """What both kinds of pass share. ``run(at_source)`` gives the value at the target, where ``at_source``
    may give another value in place of the one at the source."""

    def __init__(self, model: nn.Module, source: str, target: str) -> None:
        self.model = model
        self.source = source
        self.target = target
        self.inputs: Any = None
        self.interventions: list[Any] = []
        self._weights = _weights_mark(model)

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        """About how many numbers one tangent needs at its peak: the chunks of tangents are cut by it."""
        raise NotImplementedError

    def check_weights(self) -> None:
        """RuntimeError if a weight changed since the pass was made: primal and tangents would not fit
        together."""
        if _weights_mark(self.model) != self._weights:
            raise RuntimeError("the model's weights changed after this Jacobian was made: call scalpel.jacobian again")

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
        if isinstance(input_ids, Mapping):
            batch = {key: value for key, value in input_ids.items() if key not in _IDLE_KEYS}
            unknown = [key for key in batch if key not in ("input_ids", "attention_mask", "position_ids")]
            if unknown or "input_ids" not in batch:
                raise ValueError(
                    f"the batch has the keys {sorted(batch)}; a CircuitGPT takes input_ids and, optionally, "
                    "attention_mask and position_ids"
                )
            input_ids = batch["input_ids"]
            attention_mask = _only("attention_mask", batch.get("attention_mask"), attention_mask)
            position_ids = _only("position_ids", batch.get("position_ids"), position_ids)
        self.hooks = [*hooks, LOGITS]
        known_hook(source, self.hooks[:-1], "source", "a CircuitGPT")
        known_hook(target, self.hooks, "target", "a CircuitGPT")
        self.inputs = kept((model._checked_ids(input_ids), attention_mask, position_ids))
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
        recorded: list[Tensor] = []

        def tap(name: str, value: Tensor) -> Tensor:
            if name == self.source:
                value = at_source(value)
            if name == self.target:
                recorded.append(value)
                raise _Reached
            return value

        try:
            logits: Tensor = self._frozen(*self.inputs, tap=tap)
        except _Reached:
            return recorded.pop()
        return logits

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
        names = [name + end for name, _ in model.named_modules() for end in ("", ":in")]
        kind = f"this {type(model).__name__}, whose hooks are module paths (':in' ends an input's)"
        known_hook(source, names, "source", kind)
        self._logits = target == LOGITS and LOGITS not in names
        if not self._logits:
            known_hook(target, names, "target", kind)
        if isinstance(inputs, Mapping):
            repeated = sorted(set(inputs) & set(keywords))
            if repeated:
                raise ValueError(f"{repeated[0]} is given twice, in the batch and beside it: give it once")
            arguments, keywords = (), {**inputs, **keywords}
        else:
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        if "use_cache" in inspect.signature(model.forward).parameters:
            keywords.setdefault("use_cache", False)  # a cache of keys would outlive the pass
        self.inputs = kept((arguments, keywords))
        self.largest = 0
        self._measured = False

    def run(self, at_source: Callable[[Tensor], Tensor]) -> Tensor:
        recorded: list[Tensor] = []
        entered = False
        owner = threading.get_ident()

        def meet(value: Any, hook: str) -> Any:
            nonlocal entered
            if threading.get_ident() != owner:
                return value
            if hook == self.source and not entered:
                entered = True
                value = with_first_tensor(value, at_source(first_tensor(value, hook)))
            if hook == self.target and entered:
                recorded.append(first_tensor(value, hook))
                raise _Reached
            return value

        arguments, keywords = self.inputs
        with _ONE_AT_A_TIME, evaluating(self.model), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
            for hook in dict.fromkeys((self.source, self.target)):
                if hook != self.target or not self._logits:
                    stack.enter_context(hooked(self.model, hook, meet))
            if not self._measured:
                stack.enter_context(self._measuring())
                self._measured = True
            try:
                output = self.model(*arguments, **keywords)
            except _Reached:
                return recorded.pop()
        if not entered:
            raise ValueError(f"the forward pass never ran {self.source!r}: choose a source that it runs")
        if self._logits:
            named = output.get(LOGITS, output) if isinstance(output, Mapping) else output
            return first_tensor(getattr(named, LOGITS, named), LOGITS)
        raise ValueError(
            f"no path from {self.source!r} to {self.target!r}: {self.target!r} does not run after the "
            "source. Swap them, or choose a later target"
        )

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        def measure(module: nn.Module, given: Any, output: Any) -> None:
            for value in _leaves(output):
                if isinstance(value, Tensor):
                    self.largest = max(self.largest, value.numel())

        handles = [module.register_forward_hook(measure) for module in self.model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tangent_size(self, source: Tensor, target: Tensor) -> int:
        return 8 * max(self.largest, source.numel(), target.numel())


@contextmanager
def hooked(model: nn.Module, hook: str, meet: Callable[[Any, str], Any]) -> Iterator[None]:
    """The module hook that hands ``meet`` the value named ``hook``; it comes after the user's own hooks
    there."""
    name = hook.removesuffix(":in")
    module = model.get_submodule(name)
    if hook.endswith(":in"):

        def before(_: nn.Module, arguments: Any, keywords: Any) -> Any:
            if arguments:
                return meet(arguments, hook), keywords
            return arguments, meet(keywords, hook)

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _, given, output: meet(output, hook))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and batch statistics fixed inside; every module's own training flag is as before
    afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def known_hook(name: Any, known: list[str], role: str, model: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{role} is {name!r}; it must be a hook's name")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [each for each in known if each not in ("", ":in")][:6]
        raise ValueError(f"unknown {role} {name!r} for {model}; near it: {', '.join(map(repr, near))}")


def first_tensor(value: Any, hook: str) -> Tensor:
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            return leaf
    raise ValueError(f"the value at {hook!r} is {type(value).__name__} and holds no tensor")


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """``value`` with ``tensor`` in the place that :func:`first_tensor` reads."""
    if isinstance(value, Tensor):
        return tensor
    places: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
    for place, each in places:
        if any(isinstance(leaf, Tensor) for leaf in _leaves(each)):
            replaced = with_first_tensor(each, tensor)
            if isinstance(value, Mapping):
                changed: Any = copy.copy(value)
                changed[place] = replaced
                return changed
            return _rebuilt(value, [*value[:place], replaced, *value[place + 1 :]])
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _rebuilt(like: Any, items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _only(name: str, inside: Any, beside: Any) -> Any:
    if inside is not None and beside is not None:
        raise ValueError(f"{name} is given twice, in the batch and beside it: give it once")
    return inside if beside is None else beside


def kept(value: Any) -> Any:
    """A copy that later changes in place cannot reach; also what frees it from inference mode."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: kept(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return _rebuilt(value, [kept(each) for each in value])
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _weights_mark(model: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in model.parameters())
