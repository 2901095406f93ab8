"""What a model has at its hooks for one batch: activations, and gradients of a loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..jacobians.hooks import evaluating, first_tensor, hooked, known_hook, with_first_tensor
from ..models.circuitgpt import MODULE_PATHS, CircuitGPT
from ..models.families import family_of_model, hook_named, hooks_of_model, module_path

GRADIENT = ".grad"  # what the name of a stream of gradients ends with

Names = str | Iterable[str] | Callable[[str], bool]
Loss = Callable[[Tensor, Any], Tensor]


class Capture:
    """Runs a model and gives the rows at chosen hooks.

    ``streams``: the names asked for, in the model's order, those of gradients after all others.
    """

    def __init__(self, model: nn.Module, hooks: Names, loss: Loss | None) -> None:
        self.model = model
        self.loss = loss or next_token_loss
        self._places: dict[str, str] = {}  # hook as asked for → where it is
        known = self._known()
        chosen = _chosen(hooks, known)
        for name in chosen:
            hook = name.removesuffix(GRADIENT)
            self._places[hook] = self._place(hook, known)
        self.streams = sorted(chosen, key=lambda name: name.endswith(GRADIENT))

    def __call__(self, batch: Any, streams: Iterable[str]) -> dict[str, Tensor]:
        """{stream: rows (n, width)} of one batch, where the model has them; last stride 1; rows at padding are left
        out."""
        streams = list(streams)
        hooks = {name.removesuffix(GRADIENT) for name in streams}
        gradients = [name for name in streams if name.endswith(GRADIENT)]
        if isinstance(batch, Tensor) and batch.dim() == 1:
            batch = batch[None]
        inputs = inputs_of(batch)
        device = next((each.device for each in self.model.parameters()), torch.device("cpu"))
        inputs = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in inputs.items()}
        with torch.inference_mode(False):
            values, output = self._run(self._with_positions(inputs), hooks, bool(gradients))
            found = {name: values[name] for name in streams if not name.endswith(GRADIENT)}
            found |= self._gradients(gradients, values, output, batch)
        return {name: _joined([rows_at(each.detach(), inputs) for each in found[name]]) for name in streams}

    def _gradients(
        self, names: list[str], values: dict[str, list[Tensor]], output: Tensor, batch: Any
    ) -> dict[str, list[Tensor]]:
        if not names:
            return {}
        for name in names:
            dtype = values[name.removesuffix(GRADIENT)][0].dtype
            if not dtype.is_floating_point:
                raise ValueError(f"{name}: the values there are {dtype}, which has no gradient")
        loss = self.loss(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError("loss(output, batch) must give one number that depends on the model's output")
        at = [value for name in names for value in values[name.removesuffix(GRADIENT)]]
        slopes = iter(torch.autograd.grad(loss.sum(), at, allow_unused=True))
        found = {}
        for name in names:
            pairs = [(value, next(slopes)) for value in values[name.removesuffix(GRADIENT)]]
            found[name] = [torch.zeros_like(value) if slope is None else slope for value, slope in pairs]
        return found

    # ---- names -----------------------------------------------------------------------------------

    def _known(self) -> list[str]:
        """The hooks that a pattern is matched with."""
        if isinstance(self.model, CircuitGPT):
            return list(self.model.hook_names)
        family, hooks = family_of_model(self.model), hooks_of_model(self.model)
        if family is None:
            return [name for name, _ in self.model.named_modules() if name]
        paths = dict(self.model.named_modules())
        return [hook for hook in hooks if module_path(hook, family, hooks).removesuffix(":in") in paths]

    def _place(self, hook: str, known: list[str]) -> str:
        if isinstance(self.model, CircuitGPT):
            found = hook_named(hook, MODULE_PATHS, known, True) or hook
            known_hook(found, known, "hook", "a CircuitGPT")
            return found
        family = family_of_model(self.model)
        path = hook if family is None else module_path(hook, family, hooks_of_model(self.model))
        paths = [name + end for name, _ in self.model.named_modules() for end in ("", ":in")]
        if path not in paths:
            known_hook(hook, [*known, *paths], "hook", f"this {type(self.model).__name__}")
            raise ValueError(f"the hook {hook!r} is the value of no module of this {type(self.model).__name__}")
        return path

    # ---- runs ------------------------------------------------------------------------------------

    def _with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copies that autograd can keep; and for left padding the positions that transformers' generate gives, where
        the model takes any: a model with absolute positions would see others than without padding."""
        inputs = {name: each.clone() if _inference(each) else each for name, each in inputs.items()}
        mask = inputs.get("attention_mask")
        takes = _takes_positions(self.model)
        if (
            takes
            and "position_ids" not in inputs
            and mask is not None
            and mask.dim() == 2
            and not bool(mask[:, 0].all())
        ):
            inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        return inputs

    def _run(self, inputs: dict[str, Any], hooks: set[str], gradients: bool) -> tuple[dict[str, list[Tensor]], Tensor]:
        """The values at ``hooks``, of every time that they are passed, part of the graph where there are gradients; and
        the logits."""
        wanted: dict[str, list[str]] = {}
        for hook in hooks:
            wanted.setdefault(self._places[hook], []).append(hook)
        values: dict[str, list[Tensor]] = {hook: [] for hook in hooks}

        def meet(value: Tensor, place: str) -> Tensor:
            if gradients and not value.requires_grad and value.dtype.is_floating_point:
                value = value.detach().requires_grad_()  # frozen weights: the graph begins here
            for hook in wanted.get(place, ()):
                values[hook].append(value)
            return value

        with evaluating(self.model), torch.enable_grad() if gradients else torch.no_grad():
            if isinstance(self.model, CircuitGPT):
                output = self._through_taps(inputs, meet)
            else:
                output = self._through_modules(inputs, list(wanted), meet)
        missing = [hook for hook in hooks if not values[hook]]
        if missing:
            raise ValueError(f"the forward pass never ran {min(missing)!r}: choose a hook that it runs")
        return values, output

    def _through_taps(self, inputs: dict[str, Any], meet: Callable[[Tensor, str], Tensor]) -> Tensor:
        output: Tensor = self.model(**inputs, tap=lambda name, value: meet(value, name))
        return output

    def _through_modules(
        self, inputs: dict[str, Any], places: list[str], meet: Callable[[Tensor, str], Tensor]
    ) -> Tensor:
        def at(value: Any, place: str) -> Any:
            met = meet(first_tensor(value, place), place)
            return with_first_tensor(value, met.clone())  # a module may change in place what it is given

        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs = {"use_cache": False} | inputs
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(hooked(self.model, place, at))
            known = inspect.signature(self.model.forward).parameters
            positional = "input_ids" not in known and set(inputs) == {"input_ids"}
            output: Any = self.model(inputs["input_ids"]) if positional else self.model(**inputs)
        output = output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)
        return first_tensor(output, "logits")


def inputs_of(batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments: token ids (B, L) or (L,), or a mapping that has them."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if value is not None and name != "labels"}
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError(f"a batch has the keys {sorted(batch)}; it must have input_ids, a tensor")
    elif isinstance(batch, Tensor):
        inputs = {"input_ids": batch[None] if batch.dim() == 1 else batch}
    else:
        raise TypeError(
            f"a batch is {type(batch).__name__}; give token ids (B, L) as a tensor, or a transformers batch"
        )
    return inputs


def rows_at(value: Tensor, inputs: dict[str, Any]) -> Tensor:
    """value (B, L, width) or (B·L, width) as rows at real tokens; a value of another shape as all of its rows."""
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if mask is not None and mask.shape == ids.shape:
        if value.shape[:2] == ids.shape:
            value = value[mask.bool()]
        elif value.dim() == 2 and len(value) == ids.numel():  # tokens in a row, as experts are given them
            value = value[mask.bool().flatten()]
    return value.reshape(-1, value.shape[-1] if value.dim() else 1)


def _joined(parts: list[Tensor]) -> Tensor:
    rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).resolve_neg()
    return rows if rows.stride(-1) == 1 else rows.contiguous()  # of a value that was expanded or turned


def next_token_loss(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of each next token, in nats, summed over the tokens that are predicted: padding is neither read
    nor asked for. A sum, so that a row's gradient doesn't depend on how many others are in its batch."""
    inputs = inputs_of(batch)
    ids, mask = inputs["input_ids"].to(logits.device), inputs.get("attention_mask")
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"the model's output has shape {tuple(logits.shape)}, which are no logits of tokens {tuple(ids.shape)}: "
            "give loss=, a function of the output and the batch"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if mask is not None:
        each = each * (mask[:, 1:] * mask[:, :-1]).flatten().to(each.device)
    return each.sum()


def _chosen(hooks: Names, known: list[str]) -> list[str]:
    """The streams that are asked for, those of a pattern in the model's order."""
    streams = [*known, *(name + GRADIENT for name in known)]
    if callable(hooks):
        found = [name for name in streams if hooks(name)]
    elif isinstance(hooks, str):
        try:
            pattern = re.compile(hooks)
        except re.error as error:
            raise ValueError(f"hooks is {hooks!r}, which is not a regular expression: {error}") from error
        found = [name for name in streams if pattern.fullmatch(name)]
    else:
        listed = dict.fromkeys(hooks)
        found = list(listed)
        if isinstance(hooks, (set, frozenset)):  # its order is not the same in every process
            found = [name for name in streams if name in listed] + sorted(set(map(str, listed)) - set(streams))
        if not all(isinstance(name, str) for name in found):
            raise TypeError("hooks must be names of hooks, a regular expression, or a function of a name")
    if not found:
        raise ValueError(f"hooks matches none of {', '.join(known[:12])}{', …' if len(known) > 12 else ''}")
    return found


def _takes_positions(model: nn.Module) -> bool:
    """Whether the model, or what a wrapper hands its keywords to, has the argument."""
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:
        return True
    hands_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    return hands_on and any(_takes_positions(child) for child in model.children())


def _inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()


__all__ = ["GRADIENT", "Capture", "Loss", "Names", "inputs_of", "next_token_loss", "rows_at"]
