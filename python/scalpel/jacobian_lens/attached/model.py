"""The model that a lens is attached to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.adapters import without_cache
from ...hooks.inputs import holds_ids, limits_of, read_inputs
from ...hooks.modules import first_tensor, hooked, module_hooks
from ...hooks.names import LOGITS, hook_named, known_hook, with_patterns
from ...hooks.running import running
from ...hooks.standing import as_analysed, as_named
from ...hooks.stopping import Stop
from ...jacobians.precision import without_gradients
from ...models.circuitgpt.core import MODULE_PATHS
from ...models.circuitgpt.model import CircuitGPT
from ...models.decoders.families import decoder_inside
from ..words import Words, words_of
from .blocks import Blocks, blocks_of
from .head import Head, head_of
from .text import Text, text_of, token_id

__all__ = ["AttachedModel", "Values"]

# How far the logits that the head makes of the last residual stream may be from the model's own, relative to their
# spread: beyond it the model does something to its logits that isn't known here.
_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3}
_ALLOWED_NARROW = 0.1


@dataclass(frozen=True)
class Values:
    """What is in a model for one text.

    Attributes:
        text: The text.
        states: For each layer, what it leaves, (S, width).
        last: The residual stream after the last layer, (S, width), which the head reads; None where only the model
            itself knows its head.
        logits: The model's own logits (S, vocab), where ``last`` is None.
    """

    text: Text
    states: dict[Any, Tensor]
    last: Tensor | None
    logits: Tensor | None

    def __len__(self) -> int:
        """The number of tokens."""
        return len(next(iter(self.states.values()))) if self.states else len(self.text.ids or ())

    @property
    def ids(self) -> Tensor | None:
        """The tokens, (S,), int64."""
        ids = self.text.ids
        return None if ids is None else torch.tensor(ids, dtype=torch.int64, device="cpu")


class AttachedModel:
    """A model with its tokenizer, the places of its layers, and its last stage.

    Args:
        model: Any model that :func:`scalpel.jacobian` takes.
        tokenizer: As :func:`scalpel.jacobian_lens.words.words_of` takes it.
        unembed: For a model whose last norm and head are not known, a function from residual streams (rows, width) to
            logits (rows, vocab).

    Attributes:
        model: The model as it was given.
        inside: The module that is analysed.
        blocks: Its layers, where they are known and it is no CircuitGPT.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, unembed: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
        self.model, self.inside = model, as_analysed(model)
        self.words: Words | None = words_of(model, tokenizer)
        self.blocks: Blocks | None = None if isinstance(self.inside, CircuitGPT) else blocks_of(self.inside)
        self._unembed = unembed
        self._agreed = False

    @property
    def layers(self) -> int | None:
        """How many layers the model has, or None where they have no numbers."""
        if isinstance(self.inside, CircuitGPT):
            return self.inside.config.n_layer
        return None if self.blocks is None else len(self.blocks.paths)

    @cached_property
    def head(self) -> Head:
        """The last stage.

        Raises:
            ValueError: It is not known.
        """
        return head_of(self.inside, self.blocks, self._unembed)

    def text(self, text: Any) -> Text:
        """Read a text as :func:`scalpel.jacobian_lens.attached.text.text_of` does, with the model's tokenizer."""
        return text_of(text, self.words)

    def token(self, token: Any) -> int:
        """Return the id of a token, given as its id or its text.

        Raises:
            ValueError: As :func:`scalpel.jacobian_lens.attached.text.token_id`.
        """
        return token_id(token, self.words)

    def piece(self, token: int) -> str:
        """Return the text of a token, or its number where there is no tokenizer."""
        return f"<{token}>" if self.words is None else self.words.piece(token)

    def place(self, layer: Any) -> str:
        """Return where a layer's output is: the name of a hook in a CircuitGPT, else a module path in ``inside``.

        Raises:
            ValueError: The model has no such layer.
        """
        if isinstance(layer, int) and not isinstance(layer, bool):
            if self.layers is None:
                raise ValueError(
                    f"layer {layer} is a number, and the layers of this {type(self.inside).__name__} have no known "
                    "numbers: a lens of it has paths of modules for layers"
                )
            if not 0 <= layer < self.layers:
                raise ValueError(f"the model has no layer {layer}; its layers are 0 to {self.layers - 1}")
            if self.blocks is not None:
                return self.blocks.paths[layer]
            return "final_resid" if layer == self.layers - 1 else f"{layer + 1}.resid_in"
        name = as_named(self.model, layer)
        if isinstance(self.inside, CircuitGPT):
            hooks = self.inside.hook_names
            hook = hook_named(name, MODULE_PATHS, with_patterns(hooks), True)
            known_hook(name if hook is None else hook, hooks, "layer", "this CircuitGPT")
            return str(hook)
        found = decoder_inside(self.inside)
        if found is not None:
            return found.place(name, self.inside, "source")
        known_hook(name, module_hooks(self.inside), "layer", f"this {type(self.inside).__name__}")
        return str(name)

    def values(self, text: Text, layers: Iterable[Any], *, last: bool = True) -> Values:
        """Run the model on one text, and keep what its layers leave.

        Interventions that are in force count. The first time, the model's own logits are compared with those that its
        head makes of the last residual stream.

        Args:
            text: The text.
            layers: The layers.
            last: Whether what the head reads is wanted as well.

        Raises:
            ValueError: A layer is unknown or never runs, or the logits differ, so that the model does something to them
                that isn't known here.
        """
        states, end, logits = self._states(text.batch, layers, last)
        wrong = next((layer for layer in states if len(states[layer]) != 1), None)
        if wrong is not None:
            raise ValueError(f"layer {wrong!r} left {tuple(states[wrong].shape)} for one text; expected a batch of one")
        return Values(text, {layer: value[0] for layer, value in states.items()}, end, logits)

    def states(self, texts: Any, layers: Iterable[Any]) -> dict[Any, Tensor]:
        """What layers leave for a text or a batch of them, (B, S, width), at all columns, padding included.

        Args:
            texts: As :meth:`text` takes a text; or ids (B, S), or a batch with a mask.
            layers: The layers.
        """
        ids = isinstance(texts, Mapping) or (isinstance(texts, Tensor) and texts.dim() > 1)
        return self._states(texts if ids else self.text(texts).batch, layers, False)[0]

    def _states(
        self, batch: Any, layers: Iterable[Any], last: bool
    ) -> tuple[dict[Any, Tensor], Tensor | None, Tensor | None]:
        places = {layer: self.place(layer) for layer in layers}
        with without_gradients():
            found, end, logits = self._run(batch, set(places.values()), last)
        for layer, place in places.items():
            value = found.get(place)
            if value is None:
                raise ValueError(f"the model never ran {place!r}, where layer {layer!r} is")
            if value.dim() != 3:
                raise ValueError(f"layer {layer!r} left {tuple(value.shape)}; expected (batch, tokens, width)")
        return {layer: found[place] for layer, place in places.items()}, end, logits

    def _run(self, batch: Any, places: set[str], last: bool) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """The values at ``places``, and the last residual stream or the logits of the first text if ``last``."""
        if isinstance(self.inside, CircuitGPT):
            end = "final_resid"
            wanted = places | ({end} if last else set())
            inputs = read_inputs(batch, limits_of(self.inside))
            _, found = self.inside.run_with_cache(
                inputs.ids,
                list(wanted),
                stop_at=end,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
            )
            return found, found[end][0] if last else None, None
        norm = None if self.blocks is None or self._unembed is not None else self.blocks.norm
        known, end = norm is not None, f"{norm}:in"
        found, output = {}, None

        def meet(value: Any, hook: str) -> Any:
            found.setdefault(hook, first_tensor(value, hook))
            if hook == end and self._agreed:
                stop()
            return value

        with running(self.inside), ExitStack() as stack, Stop() as stop:
            for place in dict.fromkeys([*places, *([end] if known else [])]):
                stack.enter_context(hooked(self.inside, place, meet))
            output = self._called(batch)
        if not last:
            return found, None, None
        if known and found.get(end) is None:
            raise ValueError(f"the model never ran its last norm, {end!r}")
        if stop.reached:
            return found, found[end][0], None
        logits = _logits(output)
        if not known:
            return found, None, logits[0]
        self._check(found[end][0], logits[0])
        return found, found[end][0], None

    def _check(self, last: Tensor, own: Tensor) -> None:
        """Compare the head's logits of the last token with the model's own, once."""
        made = self.head.logits(last[-1:], None)[0].double()
        right = own[-1].to(made.device).double()
        spread = float(right.std()) or 1.0
        allowed = _ALLOWED.get(self.head.dtype, _ALLOWED_NARROW)
        if made.shape != right.shape or float((made - right).abs().max()) > allowed * spread:
            raise ValueError(
                f"this {type(self.inside).__name__} makes other logits than its last norm and its head alone, so that "
                "what it does to them isn't known here: give unembed= to attach, a function from the residual stream "
                "(rows, width) to logits (rows, vocab)"
            )
        self._agreed = True

    def _called(self, batch: Any) -> Any:
        """The output of a model that is no CircuitGPT."""
        limits, keywords = limits_of(self.inside), without_cache(self.inside)
        if limits.vocab_size is not None and holds_ids(batch):
            return self.inside(**(keywords | read_inputs(batch, limits).keywords()))
        if isinstance(batch, Mapping):
            return self.inside(**(keywords | dict(batch)))
        return self.inside(batch, **keywords)


def _logits(output: Any) -> Tensor:
    """The logits (B, S, vocab) in what a model returns."""
    named = output.get(LOGITS, output) if isinstance(output, Mapping) else output
    return first_tensor(getattr(named, LOGITS, named), LOGITS)
