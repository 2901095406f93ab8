"""Layer after layer of a decoder too large for memory: its values, and the Jacobian of each layer in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hooks.inputs import Inputs, Limits, read_inputs
from ..models.decoders.decoder import Decoder, check_layer
from ..models.decoders.folder import decoder_in, streamed_layers
from .precision import no_autocast
from .rows.decoder_pass import beyond_rules, places_in_text
from .rows.layer import Buffers, DenseLayer
from .rows.primal import DensePrimal, places_of, through_layer

_CHUNK_BYTES = 1 << 28  # about what the widest value of a chunk of tangents may take
_WIDEST = 4  # over the residual stream's own width


@dataclass
class StreamedLayer:
    """One layer between two values of the residual stream, (B, L, width) each; its products while it is in memory.

    All tokens to all tokens, the identity path included. The products raise RuntimeError once the next layer has
    been asked for, ValueError or TypeError for tangents of another shape or dtype.
    """

    number: int
    before: Tensor
    after: Tensor
    _rules: DenseLayer | None
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False)  # the rules share buffers

    def jvp(self, V: Tensor) -> Tensor:
        """T tangents of ``before``, (T, B, L, width), to those of ``after``."""
        return self._product(V, lambda rules, t: rules.push(t, lambda _, each: each, set()))

    def vjp(self, U: Tensor) -> Tensor:
        """T cotangents of ``after`` to those of ``before``."""
        return self._product(U, lambda rules, u: rules.pull(u, lambda _, each: each))

    def _product(self, tangents: Tensor, product: Callable[[DenseLayer, Tensor], Tensor | None]) -> Tensor:
        with self._one_at_a_time, _plain():
            rules, found = self._checked(tangents), torch.empty_like(tangents, memory_format=torch.contiguous_format)
            each = tangents[0].numel() * tangents.element_size() * _WIDEST if len(tangents) else 1
            done = 0
            for chunk in tangents.detach().split(max(1, _CHUNK_BYTES // max(1, each))):
                if len(chunk):
                    part = product(rules, chunk.contiguous().clone())
                    assert part is not None
                    found[done : done + len(chunk)] = part
                    done += len(chunk)
            return found

    def _checked(self, tangents: Tensor) -> DenseLayer:
        if not isinstance(tangents, Tensor):
            raise TypeError(f"tangents are {type(tangents).__name__}; a torch.Tensor is taken")
        if self._rules is None:
            raise RuntimeError(f"layer {self.number} has left memory: take its products before the next layer's turn")
        if tangents.dim() != 4 or tangents.shape[1:] != self.before.shape:
            shape = ", ".join(map(str, ("T", *self.before.shape)))
            raise ValueError(f"tangents have shape {tuple(tangents.shape)}; they must be ({shape})")
        if tangents.device != self.before.device:
            raise ValueError(f"tangents are on {tangents.device}, the layer on {self.before.device}: move them there")
        if tangents.dtype != self.before.dtype:
            raise TypeError(f"tangents are {tangents.dtype}; here they must be {self.before.dtype}")
        return self._rules


def stream_layers(
    folder: str | Path,
    input_ids: Any,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[StreamedLayer]:
    """The layers of the model in ``folder`` in order, one in memory and the next being read.

    ``folder``: as transformers' ``save_pretrained`` writes it (config.json and safetensors, whole or in shards),
    of a family that has rules (see :func:`scalpel.jacobian`); float64, float32, bfloat16, or float16, which is
    computed in float32. ``input_ids`` (B, L), ``attention_mask`` and ``position_ids`` as there; the layers compute
    where ``input_ids`` are. Values and tangents are float32 (float64 of a float64 model); products of a bfloat16
    model are bfloat16. What comes before a layer's products is the user's: orthonormalise, record, stop early. A
    layer is valid until the next.

    Forward mode needs no more than this::

        for layer in stream_layers(folder, input_ids):
            V = layer.jvp(V)  # in the end, the tangents of final_resid

    Raises CheckpointError (a ValueError) for a folder that can't be read or has no rules, ValueError for inputs
    that the model does not take.
    """
    given = input_ids.get("input_ids") if isinstance(input_ids, Mapping) else input_ids
    decoder = decoder_in(folder, getattr(given, "device", "cpu"))
    config = decoder.config
    limits = Limits(config.vocab_size, None if config.rotary is not None else config.max_length, takes_positions=True)
    inputs = read_inputs(input_ids, limits, attention_mask=attention_mask, position_ids=position_ids)
    reason = beyond_rules(decoder, inputs)
    if reason is not None:
        raise ValueError(f"a streamed model goes through rules of its own, and {reason}")
    return _layers(decoder, inputs)


@contextmanager
def _plain() -> Iterator[None]:
    """Nothing is differentiated, cast or made for inference only."""
    with torch.inference_mode(False), torch.no_grad(), no_autocast():
        yield


def _layers(decoder: Decoder, inputs: Inputs) -> Iterator[StreamedLayer]:
    ids, positions = inputs.ids, places_in_text(inputs)
    everything, buffers = slice(0, ids.shape[1]), Buffers()
    with _plain():
        x = decoder.embed(ids, positions)
        x = x if x.dtype == torch.float64 else x.float()
        places = places_of(decoder, positions, inputs.mask, x.dtype)
    for i, layer in streamed_layers(decoder):
        with _plain():
            check_layer(decoder.config, layer, i)
            primal = DensePrimal()
            after = through_layer(decoder, i, layer, x, places, lambda _, value: value, primal)
            rules = DenseLayer(decoder, i, layer, primal, places, everything, buffers)
        streamed = StreamedLayer(i, x, after.clone(), rules)  # what the user does to it stays with the user
        yield streamed
        streamed._rules = None  # its memory will hold another layer
        x = after
