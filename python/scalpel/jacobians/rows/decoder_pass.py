"""One forward pass of a transformers model that has a family: its inputs, checked, and the ends of a Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.inputs import Inputs, holds_ids, limits_of, read_inputs
from ...hooks.modules import module_hooks
from ...hooks.names import LOGITS, hook_named, known_hook, module_path
from ...models.decoders.decoder import Decoder
from ...models.decoders.families import decoder_or_reason, family_of_model, hooks_of, hooks_of_model
from ..passes import Pass, kept
from .agreement import difference
from .narrow import NarrowWeights
from .primal import Text

__all__ = ["DecoderPass", "beyond_rules", "decoder_pass", "module_paths"]


class DecoderPass(Pass):
    """A supported decoder between two of its hooks, by our names; ``logits`` may be the target."""

    def __init__(
        self, model: nn.Module, decoder: Decoder, inputs: Inputs, ends: tuple[str, str], precision: str | None
    ) -> None:
        super().__init__(model, *ends)
        self.decoder = decoder
        self.inputs = kept(inputs.keywords())
        self.text: Text = kept(Text.of(inputs))
        self.hooks = [*hooks_of(decoder.config), LOGITS]
        weight = decoder.final()[1].weight
        # A bfloat16 model's residual stream and tangents are float32; only its matrix products are not.
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        narrow = precision == "bfloat16" and weight.dtype != torch.bfloat16
        self.products = replace(decoder, weights=NarrowWeights.of(model, decoder.weights)) if narrow else decoder

    def between(self, source: str, target: str) -> DecoderPass | None:
        ends = _ends(self.decoder, source, target)
        if isinstance(ends, str):
            return None
        other = copy.copy(self)
        other.source, other.target = ends
        return other

    @property
    def length(self) -> int:
        return int(self.text.ids.shape[1])

    @property
    def allowed(self) -> Tensor:
        """(L, L), or (B, 1, L, L) with padding: the keys that a query may read."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.text.ids.device).tril()
        return causal if self.text.real is None else (causal & self.text.real[:, None, :])[:, None]


def decoder_pass(
    model: nn.Module, input_ids: Any, beside: dict[str, Any], source: str, target: str, precision: str | None
) -> DecoderPass | str:
    """Make the pass, or say why the rules don't cover the model, its inputs or a hook."""
    decoder = decoder_or_reason(model)
    if isinstance(decoder, str):
        return decoder
    ends = _ends(decoder, source, target)
    if isinstance(ends, str):
        return ends
    if not holds_ids(input_ids):
        return "its inputs are not token ids"
    inputs = read_inputs(input_ids, limits_of(model), **beside)
    reason = beyond_rules(decoder, inputs)
    if reason is not None:
        return reason
    return difference(model, decoder, inputs) or DecoderPass(model, decoder, inputs, ends, precision)


def _ends(decoder: Decoder, source: str, target: str) -> tuple[str, str] | str:
    """Our names of both hooks, or why the rules don't cover one."""
    hooks = []
    for name, as_source in ((source, True), (target, False)):
        hook = LOGITS if name == LOGITS else hook_named(name, decoder.family.PATHS, hooks_of(decoder.config), as_source)
        if hook is None:
            return f"{name!r} is no hook of the rules"
        hooks.append(hook)
    if hooks[0] == LOGITS:
        return "the logits are no source"
    return hooks[0], hooks[1]


def module_paths(model: nn.Module, source: str, target: str, reason: str) -> tuple[str, str]:
    """Both ends as paths of modules, where the model's family says which these are; else as they are.

    ``reason``: why there are no rules here, for the error where a hook has no path.
    """
    family, hooks = family_of_model(model), hooks_of_model(model)
    if family is None:
        return source, target
    paths = module_hooks(model)
    kind = f"this {type(model).__name__} (its hooks, or module paths with ':in' for an input)"
    ends = []
    for name, role in ((source, "source"), (target, "target")):
        known = [*hooks, *paths] if role == "source" else [*hooks, LOGITS, *paths]
        path = module_path(name, family.PATHS, hooks, role == "source")
        if path not in known:
            known_hook(name, known, role, kind)
        if path in hooks:
            raise ValueError(f"the {role} {name!r} is no module's value, and the rules can't be used: {reason}")
        ends.append(path)
    return ends[0], ends[1]


def beyond_rules(decoder: Decoder, inputs: Inputs) -> str | None:
    """What it is about the inputs that the rules don't cover; None where there is nothing."""
    if inputs.others:
        return f"the batch has {min(inputs.others)!r}; the rules take input_ids, attention_mask and position_ids"
    longest, mask, positions = decoder.config.max_length, inputs.mask, inputs.positions
    if inputs.ids.shape[1] > longest:
        return f"the text has {inputs.ids.shape[1]} tokens, and the config's positions end at {longest}"
    if mask is not None and (isinstance(mask, Mapping) or mask.dim() != 2):
        return "its attention_mask says for each query which keys it reads; the rules take one of shape (batch, length)"
    if positions is not None:
        if positions.dim() != 2 or int(positions.max()) >= longest:
            return f"its position_ids are not (batch, length) from 0 to {longest - 1}"
        # Without a mask, positions that start again mark texts packed into one row, which don't read each other.
        if mask is None and not bool((positions.diff(dim=-1) == 1).all()):
            return "position_ids that are not consecutive need an attention_mask: without, they mark packed texts"
    return None
