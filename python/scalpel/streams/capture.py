"""Compute the activations at a model's hooks, and the gradients of a loss with respect to them, for one batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..hooks.adapters import inside_wrappers, without_cache
from ..hooks.inputs import Inputs, Limits, limits_of, read_inputs
from ..hooks.modules import first_tensor, hooked, module_hooks, module_names, with_first_tensor
from ..hooks.names import hook_named, is_pattern, known_hook, module_path, spells_pattern, with_patterns
from ..hooks.running import ALONE, running
from ..hooks.standing import as_analysed, as_named
from ..hooks.weights import showing_weights
from ..models.circuitgpt.core import MODULE_PATHS
from ..models.circuitgpt.model import CircuitGPT
from ..models.decoders.families import decoder_inside
from .rows import Rows, counted, rows_at, without_mask

GRADIENT = ".grad"  # what the name of a stream of gradients ends in
_WEIGHTS = ":pattern"  # after the path of an attention module: the weights of its attention

Names = str | Iterable[str] | Callable[[str], bool]
Loss = Callable[[Tensor, Any], Tensor]


class Capture:
    """Run a model on batches and return the rows of values at chosen hooks.

    Args:
        model: Any model that :func:`scalpel.collect` takes.
        hooks: Names, a regular expression that matches whole names, or a function of a name.
        loss: A function of (logits, batch). None takes the cross-entropy of each next token, summed over tokens.
        rows: Which tokens count as rows. None counts all that are not padding.

    Attributes:
        streams: The names of the chosen streams, with the streams of gradients after all others.
    """

    def __init__(self, model: nn.Module, hooks: Names, loss: Loss | None, rows: Rows | None = None) -> None:
        self.model = as_analysed(model)
        self.limits = limits_of(self.model)
        self._decoder = decoder_inside(self.model)
        self.rows = rows
        config = getattr(self.model, "config", None)
        self._has_encoder = bool(getattr(config, "is_encoder_decoder", False))
        self.loss = loss or self._default_loss()
        self._usable: dict[str, Tensor] | None = None
        self._places: dict[str, str] = {}  # each hook as the caller names it → its name in this model
        known = self._known()
        chosen = _chosen(hooks, known, self._with_patterns(known))
        for name in chosen:
            hook = name.removesuffix(GRADIENT)
            self._places[hook] = self._place(as_named(model, hook), known)
        self.streams = sorted(chosen, key=lambda name: name.endswith(GRADIENT))

    def __call__(self, batch: Any, streams: Iterable[str]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            batch: Token ids (B, L), or a transformers batch.
            streams: The names of streams.

        Returns:
            The rows of each stream, (n, width) with last stride 1, on the model's device, without rows at padding and
            at tokens that do not count.
        """
        streams = list(streams)
        hooks = {name.removesuffix(GRADIENT) for name in streams}
        gradients = [name for name in streams if name.endswith(GRADIENT)]
        with torch.inference_mode(False):
            inputs = read_inputs(without_mask(self.rows, batch), self.limits)
            values, output = self._run(inputs, hooks, {name.removesuffix(GRADIENT) for name in gradients})
            by_stream = {name: values[name] for name in streams if not name.endswith(GRADIENT)}
            by_stream |= self._gradients(gradients, values, output, batch)
        chosen = {of: self._counted(batch, inputs, of) for of in {self._of_decoder(name) for name in streams}}
        return {name: _joined(self._rows(name, by_stream[name], chosen[self._of_decoder(name)])) for name in streams}

    def _of_decoder(self, name: str) -> bool:
        """Tell whether a stream has the tokens that a decoder reads, which may be others than ``input_ids``."""
        return "decoder" in self._places[name.removesuffix(GRADIENT)].split(":")[0].split(".")

    def _counted(self, batch: Any, inputs: Inputs, of_decoder: bool) -> Tensor | None:
        """Tell which tokens give a row, bool (B, L); None if all do."""
        if self.rows is not None:  # some models without an encoder have a module named "decoder", too
            return counted(self.rows, batch, inputs, of_decoder and self._has_encoder)
        return inputs.real_of_decoder if of_decoder else inputs.real

    def _rows(self, name: str, values: list[Tensor], chosen: Tensor | None) -> list[Tensor]:
        added = inside_wrappers(self.model).added
        if added is not None and chosen is not None and any(value.shape[1:2] != chosen.shape[1:] for value in values):
            raise ValueError(
                f"{name}: the model puts {added} before each text, so rows at padding, or those that do not count, "
                "can't be told from others: give texts without padding, one length a batch, and leave rows= out"
            )
        try:
            return [rows_at(value.detach(), chosen, exactly=self.rows is not None) for value in values]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

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
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss(output, batch) must give one number, as a tensor")
        if not loss.requires_grad:
            raise ValueError(
                "the loss depends on no value that has a gradient. If the model detaches its output, or computes it "
                "under no_grad, change that; otherwise give a loss= that depends on the output"
            )
        values_at_hooks = [value for name in names for value in values[name.removesuffix(GRADIENT)]]
        try:
            slopes = iter(torch.autograd.grad(loss.sum(), values_at_hooks, allow_unused=True))
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise RuntimeError(
                f"{names[0]}: the model's forward pass uses reentrant activation checkpointing, with which a gradient "
                "at a hook can't be computed: use checkpoint(..., use_reentrant=False), or switch it off"
            ) from error
        gradients = {}
        for name in names:
            pairs = [(value, next(slopes)) for value in values[name.removesuffix(GRADIENT)]]
            if all(slope is None for _, slope in pairs):
                raise ValueError(
                    f"{name}: no gradient reaches the value there, so either the loss does not depend on it or the "
                    "model cuts the graph between them (detach, no_grad, reentrant checkpointing): leave this stream "
                    "out, or give a loss that depends on it"
                )
            # If a module ran several times, the loss may not depend on some of the runs.
            gradients[name] = [torch.zeros_like(value) if slope is None else slope for value, slope in pairs]
        return gradients

    def _default_loss(self) -> Loss:
        if self._has_encoder:
            return _no_next_token
        return _no_logits if self._decoder is not None and self._decoder.headless else next_token_loss

    # ---- names -----------------------------------------------------------------------------------

    def _known(self) -> list[str]:
        """List the hooks that a pattern is matched against."""
        if isinstance(self.model, CircuitGPT):
            return list(self.model.hook_names)
        paths = module_names(self.model)
        if self._decoder is None or self._decoder.refusal is not None:
            return [name for name in paths if name]
        hooks, places = self._decoder.hooks, self._decoder.paths
        return [hook for hook in hooks if module_path(hook, places, hooks).removesuffix(":in") in paths]

    def _with_patterns(self, known: list[str]) -> list[str]:
        """List ``known`` with the attention weights of each layer, where the model's layers are known."""
        if isinstance(self.model, CircuitGPT):
            return with_patterns(known)
        if self._decoder is None or self._decoder.refusal is not None:
            return known
        return [hook for hook in with_patterns(self._decoder.hooks) if hook in known or is_pattern(hook)]

    def _place(self, hook: str, known: list[str]) -> str:
        if isinstance(self.model, CircuitGPT):
            known = with_patterns(known)
            name = hook_named(hook, MODULE_PATHS, known, True) or hook
            known_hook(name, known, "hook", "a CircuitGPT")
            return name
        if self._decoder is not None:
            name = self._decoder.hook(hook, False) or ""
            if is_pattern(name) and self._decoder.refusal is None:
                return self._decoder.paths["attn.resid_delta"].format(i=name.partition(".")[0]) + _WEIGHTS
            return self._decoder.place(hook, self.model, "hook")
        paths = module_hooks(self.model)
        if hook not in paths and spells_pattern(hook):
            raise ValueError(
                f"unknown hook {hook!r}: attention weights are no module's value, and this "
                f"{type(self.model).__name__} is none of the models whose attention is known by name"
            )
        known_hook(hook, paths, "hook", f"this {type(self.model).__name__}")
        return hook

    # ---- runs ------------------------------------------------------------------------------------

    def _run(self, inputs: Inputs, hooks: set[str], slopes: set[str]) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Return the values at ``hooks``, one for each time that a hook's module runs, and the logits.

        Those at ``slopes`` are part of autograd's graph.
        """
        gradients = bool(slopes)
        wanted: dict[str, list[str]] = {}
        for hook in hooks:
            wanted.setdefault(self._places[hook], []).append(hook)
        values: dict[str, list[Tensor]] = {hook: [] for hook in hooks}

        def keep(value: Tensor, place: str) -> Tensor:
            if gradients and not value.requires_grad and value.dtype.is_floating_point:
                value = value.detach()
                value.requires_grad = True  # all weights before this hook are frozen, so the graph begins here
            for hook in wanted.get(place, ()):
                values[hook].append(value)
            return value

        with running(self.model), torch.enable_grad() if gradients else torch.no_grad():
            if isinstance(self.model, CircuitGPT):
                tap = {"tap": lambda name, value: keep(value, name), "patterns": wanted}
                output = self._called((), inputs.keywords() | tap, gradients)
            else:
                in_graph = any(self._places[hook].endswith(_WEIGHTS) for hook in slopes)
                output = self._through_modules(inputs, list(wanted), keep, gradients, in_graph)
        missing = [hook for hook in hooks if not values[hook]]
        if missing:
            name = min(missing)
            if self._places[name].endswith(_WEIGHTS):
                raise ValueError(
                    f"the forward pass never showed {name!r}: the weights are seen where attention runs as 'sdpa' or "
                    f"'eager', and here it is {getattr(self.model.config, '_attn_implementation', None)!r}. Load the "
                    "model with attn_implementation='sdpa'"
                )
            raise ValueError(f"the forward pass never ran {name!r}: choose a hook that it runs")
        return values, output

    def _through_modules(
        self,
        inputs: Inputs,
        places: list[str],
        keep: Callable[[Tensor, str], Tensor],
        gradients: bool,
        weights_in_graph: bool,
    ) -> Tensor:
        def keep_first_tensor(value: Any, place: str) -> Any:
            kept = keep(first_tensor(value, place), place)
            return with_first_tensor(value, kept.clone())  # because a module may change its input in place

        known = inspect.signature(self.model.forward).parameters
        keywords = without_cache(self.model) | inputs.keywords()
        patterns = [place.removesuffix(_WEIGHTS) for place in places if place.endswith(_WEIGHTS)]
        with ExitStack() as stack:
            for place in places:
                if not place.endswith(_WEIGHTS):
                    stack.enter_context(hooked(self.model, place, keep_first_tensor))
            if patterns:

                def keep_weights(value: Tensor, path: str) -> Tensor:
                    return keep(value, path + _WEIGHTS)

                stack.enter_context(showing_weights(self.model, patterns, keep_weights, weights_in_graph))
            if "input_ids" not in known and set(keywords) == {"input_ids"}:
                output: Any = self._called((inputs.ids,), {}, gradients)
            else:
                output = self._called((), keywords, gradients)
        output = output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)
        return first_tensor(output, "logits")

    def _called(self, arguments: tuple[Any, ...], keywords: dict[str, Any], gradients: bool) -> Any:
        """Call the model; if gradients are needed, with copies of the weights that were made in inference mode.

        Autograd refuses those weights themselves.
        """
        if gradients and self._usable is None:
            with ALONE:  # otherwise the module might hold the copies of another thread
                named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
                self._usable = {
                    name: weight.detach().clone() for name, weight in named.items() if weight.is_inference()
                }
        if gradients and self._usable:
            with ALONE:  # functional_call puts the copies into the module during the call
                return functional_call(self.model, self._usable, arguments, keywords)
        return self.model(*arguments, **keywords)


def _joined(parts: list[Tensor]) -> Tensor:
    rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).resolve_neg()
    # The last stride of an expanded or transposed value is not 1.
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _no_next_token(logits: Tensor, batch: Any) -> Tensor:
    raise ValueError(
        "an encoder-decoder model doesn't predict the next token of its input: give loss=, a function of the output "
        "and the batch"
    )


def _no_logits(output: Tensor, batch: Any) -> Tensor:
    raise ValueError(
        "the model has no output matrix, so there are no logits and no loss by default: load it as the class that has "
        "one (...ForCausalLM), or give loss=, a function of the output and the batch"
    )


def next_token_loss(logits: Tensor, batch: Any) -> Tensor:
    """Compute the cross-entropy of each next token, in nats, summed over the predicted tokens.

    Predictions at padding and of padding do not count. The losses are summed and not averaged, so that the gradient in
    one row does not depend on how many other rows are in its batch.
    """
    inputs = read_inputs(batch, Limits(device=logits.device))
    ids, real = inputs.ids, inputs.real
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"the model's output has shape {tuple(logits.shape)}, which can't be logits of tokens {tuple(ids.shape)}: "
            "give loss=, a function of the output and the batch"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if real is not None:
        losses = losses * (real[:, 1:] & real[:, :-1]).flatten()
    return losses.sum()


def _chosen(hooks: Names, known: list[str], with_weights: list[str]) -> list[str]:
    """List the streams that ``hooks`` selects, in the model's order unless ``hooks`` itself has an order.

    ``with_weights``: ``known`` and the attention weights, which an expression selects only if it spells them.
    """
    if isinstance(hooks, (set, frozenset)) or (isinstance(hooks, str) and spells_pattern(hooks)):
        known = with_weights
    streams = [*known, *(name + GRADIENT for name in known)]
    if callable(hooks):
        chosen = [name for name in streams if hooks(name)]
    elif isinstance(hooks, str):
        try:
            pattern = re.compile(hooks)
        except re.error as error:
            raise ValueError(f"hooks is {hooks!r}, which is not a regular expression: {error}") from error
        chosen = [name for name in streams if pattern.fullmatch(name)]
    else:
        listed = dict.fromkeys(hooks)
        chosen = list(listed)
        if isinstance(hooks, (set, frozenset)):  # the order of a set differs between processes
            chosen = [name for name in streams if name in listed] + sorted(set(map(str, listed)) - set(streams))
        if not all(isinstance(name, str) for name in chosen):
            raise TypeError("hooks must be names of hooks, a regular expression, or a function of a name")
    if not chosen:
        raise ValueError(f"hooks matches none of {', '.join(known[:12])}{', …' if len(known) > 12 else ''}")
    return chosen


__all__ = ["GRADIENT", "Capture", "Loss", "Names", "next_token_loss"]
