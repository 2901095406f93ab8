"""One forward pass of a transformers model that has a family: its inputs, checked, and the ends of a Jacobian."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder, Weights
from ..models.families import decoder_of, family_of, hooks_of, module_path, our_hook
from .hooks import LOGITS, Pass, kept, known_hook

_KEYS = ("input_ids", "attention_mask", "position_ids")


class DecoderPass(Pass):
    """A supported decoder between two of its hooks, by our names; ``logits`` may be the target."""

    def __init__(
        self, model: nn.Module, decoder: Decoder, inputs: dict[str, Any], ends: tuple[str, str], precision: str | None
    ) -> None:
        super().__init__(model, *ends)
        self.decoder = decoder
        self.inputs = kept(inputs)
        ids = self.inputs["input_ids"]
        self.ids: Tensor = ids
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        self.real: Tensor | None = None if mask is None else mask.bool()
        if positions is None:
            positions = torch.arange(ids.shape[1])[None]
        self.positions: Tensor = positions if positions.dim() == 2 else positions[None]
        self.hooks = [*hooks_of(decoder.config), LOGITS]
        weight = decoder.final()[1].weight
        # A bfloat16 model's residual stream and tangents are float32; only its matrix products are not.
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        narrow = precision == "bfloat16" and weight.dtype != torch.bfloat16
        self.products = replace(decoder, weights=NarrowWeights.of(model, decoder.weights)) if narrow else decoder

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @property
    def source_layer(self) -> int:
        """The first layer that a tangent meets."""
        layer = self.source.partition(".")[0]
        return int(layer) if layer.isdecimal() else self.decoder.config.layers

    @property
    def allowed(self) -> Tensor:
        """(L, L), or (B, 1, L, L) with padding: the keys that a query may read."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return causal if self.real is None else (causal & self.real[:, None, :])[:, None]


def decoder_pass(
    model: nn.Module, input_ids: Any, beside: dict[str, Any], source: str, target: str, precision: str | None
) -> DecoderPass | None:
    """None where the model, its inputs or a hook are not what the engine has rules for."""
    decoder = decoder_of(model)
    if decoder is None:
        return None
    ends = []
    for name, as_source in ((source, True), (target, False)):
        hook = LOGITS if name == LOGITS else our_hook(name, decoder.family, decoder.config, as_source)
        if hook is None:
            return None
        ends.append(hook)
    inputs = plain_inputs(decoder, input_ids, beside)
    if inputs is None or ends[0] == LOGITS:
        return None
    return DecoderPass(model, decoder, inputs, (ends[0], ends[1]), precision)


def module_paths(model: nn.Module, source: str, target: str) -> tuple[str, str]:
    """Both ends as paths of modules, where the model's family says which these are; else as they are."""
    family = family_of(type(model).__name__)
    config = None if family is None else getattr(model, "config", None)
    shape = None if family is None or config is None else family.read(config)
    if family is None or shape is None:
        return source, target
    paths = [name + end for name, _ in model.named_modules() for end in ("", ":in")]
    kind = f"this {type(model).__name__} (its hooks, or module paths with ':in' for an input)"
    known_hook(source, [*hooks_of(shape), *paths], "source", kind)
    if target not in paths:
        known_hook(target, [*hooks_of(shape), LOGITS, *paths], "target", kind)
    return module_path(source, family, shape, True), module_path(target, family, shape, False)


def plain_inputs(decoder: Decoder, input_ids: Any, beside: dict[str, Any]) -> dict[str, Any] | None:
    """Token ids with, perhaps, a two-dimensional mask and positions; None for anything else."""
    batch = dict(input_ids) if isinstance(input_ids, Mapping) else {"input_ids": input_ids}
    beside = {name: value for name, value in beside.items() if value is not None}
    if set(batch) & set(beside):
        return None  # the pass over modules says which is given twice
    batch = {name: value for name, value in (batch | beside).items() if value is not None}
    if not set(batch) <= set(_KEYS) or not all(isinstance(value, Tensor) for value in batch.values()):
        return None
    ids = batch.get("input_ids")
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 2 or ids.numel() == 0:
        return None
    within = int(ids.min()) >= 0 and int(ids.max()) < decoder.config.vocab_size
    if not within or ids.shape[1] > decoder.config.max_length:
        return None
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and (mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all())):
        return None
    if positions is not None:
        if positions.dtype != torch.int64 or tuple(positions.shape) not in (tuple(ids.shape), (1, ids.shape[1])):
            return None
        if int(positions.min()) < 0 or int(positions.max()) >= decoder.config.max_length:
            return None
        # Without a mask, positions that start again mark texts packed into one row, which don't read each other.
        if mask is None and not bool((positions.diff(dim=-1) == 1).all()):
            return None
    return batch


class NarrowWeights:
    """The matrices of others in bfloat16: a copy, made once, and again when one has changed."""

    def __init__(self, wide: Weights) -> None:
        self._wide = wide
        self._kept: dict[str, tuple[tuple[int, int], Tensor]] = {}

    @classmethod
    def of(cls, model: nn.Module, wide: Weights) -> NarrowWeights:
        kept = _narrow.get(model)
        if kept is None:
            kept = _narrow[model] = cls(wide)
        kept._wide = wide
        return kept

    def __call__(self, name: str) -> Tensor:
        tensor = self._wide(name)
        if tensor.dim() < 2:
            return tensor
        mark = (tensor.data_ptr(), tensor._version)
        if name not in self._kept or self._kept[name][0] != mark:
            self._kept[name] = mark, tensor.to(torch.bfloat16)
        return self._kept[name][1]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self._wide.rows(name, index)

    def __contains__(self, name: object) -> bool:
        return name in self._wide


_narrow: weakref.WeakKeyDictionary[nn.Module, NarrowWeights] = weakref.WeakKeyDictionary()
