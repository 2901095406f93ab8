"""One forward pass of a transformers model whose family has rules, between the two hooks of a Jacobian.

The inputs are checked before the pass is made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.inputs import Inputs, holds_ids, limits_of, read_inputs
from ...hooks.modules import module_hooks
from ...hooks.names import LOGITS, check_no_pattern, is_pattern, spells_pattern, with_patterns
from ...models.decoders.decoder import Decoder
from ...models.decoders.families import decoder_inside, decoder_or_reason, hooks_of
from ...models.decoders.inside import DecoderInside
from ..passes import Pass, kept
from .agreement import difference
from .narrow import NarrowWeights
from .primal import Text

__all__ = ["DecoderPass", "beyond_rules", "decoder_pass", "module_paths"]

_NO_MODULE_S = (
    "the pattern is no module's value, so it can be a target only where there are rules. To differentiate it anyway, "
    "load the model with attn_implementation='eager', wrap it in a module that returns one of the attentions which the "
    "model gives under output_attentions=True, and take '' as the target"
)


class DecoderPass(Pass):
    """The pass of a supported decoder between two hooks, given by Scalpel's names; ``logits`` may be the target."""

    def __init__(
        self,
        model: nn.Module,
        found: DecoderInside,
        decoder: Decoder,
        inputs: Inputs,
        ends: tuple[str, str],
        precision: str | None,
    ) -> None:
        super().__init__(model, *ends)
        self.found = found
        self.decoder = decoder
        self.inputs = kept(inputs.keywords())
        self.text: Text = kept(Text.of(inputs))
        self.hooks = [*with_patterns(hooks_of(decoder.config)), LOGITS]
        weight = decoder.final()[1].weight
        # In a bfloat16 model only the matrix products are bfloat16; its residual stream and tangents are float32.
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        narrow = precision == "bfloat16" and weight.dtype != torch.bfloat16
        self.products = replace(decoder, weights=NarrowWeights.of(model, decoder.weights)) if narrow else decoder

    def between(self, source: str, target: str) -> DecoderPass | None:
        hooks = _ends(self.found, source, target)
        if isinstance(hooks, str):
            return None
        other = copy.copy(self)
        other.source, other.target = hooks
        return other

    @property
    def length(self) -> int:
        return int(self.text.ids.shape[1])

    @property
    def allowed(self) -> Tensor:
        """The keys that each query may read, (L, L) bool, or (B, 1, L, L) where the text has a mask."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.text.ids.device).tril()
        return causal if self.text.real is None else (causal & self.text.real[:, None, :])[:, None]


def decoder_pass(
    model: nn.Module, input_ids: Any, beside: dict[str, Any], source: str, target: str, precision: str | None
) -> DecoderPass | str:
    """Make the pass, or return the reason why the rules don't cover the model, its inputs or a hook."""
    found, decoder = decoder_inside(model), decoder_or_reason(model)
    if found is None or isinstance(decoder, str):
        return str(decoder)
    ends = _ends(found, source, target)
    if isinstance(ends, str):
        return ends
    if not holds_ids(input_ids):
        return "its inputs are not token ids"
    inputs = read_inputs(input_ids, limits_of(model), **beside)
    reason = beyond_rules(decoder, inputs)
    if reason is not None:
        return reason
    return difference(model, decoder, inputs) or DecoderPass(model, found, decoder, inputs, ends, precision)


def _ends(found: DecoderInside, source: str, target: str) -> tuple[str, str] | str:
    """Return Scalpel's names of both hooks, or the reason why the rules don't cover one of them."""
    hooks = []
    for name, as_source in ((source, True), (target, False)):
        hook = LOGITS if name == LOGITS and not found.headless else found.hook(name, as_source)
        if hook is None:
            return f"{name!r} is no hook of the rules"
        hooks.append(hook)
    check_no_pattern(hooks[0])
    if hooks[0] == LOGITS:
        return "the logits are no source"
    return hooks[0], hooks[1]


def module_paths(model: nn.Module, source: str, target: str, reason: str) -> tuple[str, str]:
    """Return both hooks as module paths where the model holds a decoder of a family; else names stay as they are.

    A hook of the rules may have no module path; the error then states ``reason``, which is why the rules can't be used.
    """
    found = decoder_inside(model)
    if found is None:
        if target not in module_hooks(model) and spells_pattern(target):
            raise ValueError(f"the target {target!r}: {_NO_MODULE_S}. The rules can't be used: {reason}")
        return source, target
    check_no_pattern(found.hook(source, True) or "")
    if is_pattern(found.hook(target, False) or ""):
        raise ValueError(f"the target {target!r}: {_NO_MODULE_S}. The rules can't be used: {reason}")
    return found.place(source, model, "source", reason), found.place(target, model, "target", reason)


def beyond_rules(decoder: Decoder, inputs: Inputs) -> str | None:
    """Return the reason why the rules don't cover the inputs; None where they do."""
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
        # Without a mask, positions that start anew mark several texts packed into one, which don't read each other.
        if mask is None and not bool((positions.diff(dim=-1) == 1).all()):
            return "position_ids that are not consecutive need an attention_mask: without, they mark packed texts"
    return None
