"""Go through a decoder too large for memory layer by layer, with the values and the Jacobian of each layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hooks.inputs import Inputs, Limits, read_inputs
from ..models.decoders.decoder import Decoder, check_layer
from ..models.decoders.folder import decoder_in, streamed_layers
from .precision import without_gradients
from .rows.decoder_pass import beyond_rules
from .rows.layer import Buffers, DenseLayer
from .rows.primal import Text
from .rows.trace import DenseTrace

See = Callable[[str, Tensor], None]

_CHUNK_BYTES = 1 << 28  # approximate size of the widest value that a chunk of tangents may need
_WIDEST = 4  # the widest value of a layer, in units of the residual stream's width


@dataclass
class StreamedLayer:
    """One layer of a streamed model, with its products while it is in memory.

    Products go from all tokens to all tokens, the residual path included.

    Attributes:
        number: Which layer it is, from 0.
        before: The residual stream before the layer, (B, L, width).
        after: The residual stream after it, (B, L, width).

    Example:
        >>> import transformers
        >>> from scalpel.jacobians.stream import stream_layers
        >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
        >>> transformers.GPT2LMHeadModel(config).save_pretrained("tiny")
        >>> for layer in stream_layers("tiny", torch.tensor([[1, 2, 3]])):
        ...     V, U = torch.randn(2, 4, 1, 3, 8)
        ...     print(layer.number, torch.allclose((layer.jvp(V) * U).sum(), (V * layer.vjp(U)).sum(), atol=1e-3))
        0 True
        1 True
    """

    number: int
    before: Tensor
    after: Tensor
    _rules: DenseLayer | None
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False)  # since the rules share buffers

    def jvp(self, V: Tensor) -> Tensor:
        """Carry T tangents from before the layer to after it.

        Args:
            V: (T, B, L, width).

        Returns:
            (T, B, L, width).

        Raises:
            RuntimeError: The next layer has been requested, and this one has left memory.
            ValueError: The tangents have another shape or are on another device.
            TypeError: They have another dtype, or are not a tensor.
        """
        return self._product(V, lambda rules, t: rules.push(t, lambda _, value: value, set()))

    def vjp(self, U: Tensor) -> Tensor:
        """Carry T cotangents from after the layer back to before it.

        Args:
            U: (T, B, L, width).

        Returns:
            (T, B, L, width).

        Raises:
            RuntimeError: The next layer has been requested, and this one has left memory.
            ValueError: The cotangents have another shape or are on another device.
            TypeError: They have another dtype, or are not a tensor.
        """
        return self._product(U, lambda rules, u: rules.pull(u, lambda _, value: value))

    def _product(self, tangents: Tensor, product: Callable[[DenseLayer, Tensor], Tensor | None]) -> Tensor:
        """Apply ``product`` to the tangents in chunks that bound the memory."""
        with self._one_at_a_time, without_gradients():
            rules = self._checked(tangents)
            products = torch.empty_like(tangents, memory_format=torch.contiguous_format)
            bytes_of_one = tangents[0].numel() * tangents.element_size() * _WIDEST if len(tangents) else 1
            filled = 0
            for chunk in tangents.detach().split(max(1, _CHUNK_BYTES // max(1, bytes_of_one))):
                if len(chunk):
                    products_of_chunk = product(rules, chunk.contiguous().clone())
                    assert products_of_chunk is not None
                    products[filled : filled + len(chunk)] = products_of_chunk
                    filled += len(chunk)
            return products

    def _checked(self, tangents: Tensor) -> DenseLayer:
        """Return the rules of the layer, or raise an error where it has left memory or the tangents don't fit."""
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
    see: See | None = None,
) -> Iterator[StreamedLayer]:
    """Go through the layers of a model too large for memory in order, with one in memory while the next is being read.

    The layers compute on the device of ``input_ids``. Values and tangents are float32 (float64 in a float64 model);
    matrix products of a bfloat16 model are bfloat16. A layer gives products until the next one is requested. Between
    layers the caller may orthonormalise the tangents, record them or stop.

    Args:
        folder: A folder as transformers' ``save_pretrained`` writes it (config.json and safetensors, whole or in
            shards), with a model of a family that has rules (see :func:`scalpel.jacobian`). Its weights are float64,
            float32, bfloat16, or float16, which is computed in float32.
        input_ids: (B, L) integers, or a batch, as :func:`scalpel.jacobian` takes them.
        attention_mask: (B, L), as :func:`scalpel.jacobian` takes it.
        position_ids: (B, L) or (1, L), as :func:`scalpel.jacobian` takes them.
        see: Called at every hook of a layer, with the hook's name and its value for all tokens, before the layer is
            yielded.

    Returns:
        An iterator over the layers.

    Raises:
        CheckpointError: (a ValueError) For a folder that can't be read or has no rules.
        ValueError: For inputs that the model does not take.

    Example:
        Forward mode is a loop. Its last tangents are those of ``final_resid``:

        >>> import tempfile, torch, transformers
        >>> from scalpel.jacobians.stream import stream_layers
        >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
        >>> ids, V = torch.tensor([[1, 2, 3]]), torch.ones(4, 1, 3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        ...     for layer in stream_layers(folder, ids):
        ...         V = layer.jvp(V)
        >>> layer.number, tuple(V.shape)
        (1, (4, 1, 3, 8))
    """
    ids = input_ids.get("input_ids") if isinstance(input_ids, Mapping) else input_ids
    decoder = decoder_in(folder, getattr(ids, "device", "cpu"))
    return _layers(decoder, inputs_for(decoder, input_ids, attention_mask, position_ids), see)


def inputs_for(
    decoder: Decoder, input_ids: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Inputs:
    """Read the inputs of a streamed model.

    Raises:
        ValueError: For inputs that the model or the rules do not take.
    """
    config = decoder.config
    limits = Limits(config.vocab_size, None if config.rotary is not None else config.max_length, takes_positions=True)
    inputs = read_inputs(input_ids, limits, attention_mask=attention_mask, position_ids=position_ids)
    reason = beyond_rules(decoder, inputs)
    if reason is not None:
        raise ValueError(f"a streamed model goes through rules of its own, and {reason}")
    return inputs


def _layers(decoder: Decoder, inputs: Inputs, see: See | None) -> Iterator[StreamedLayer]:
    """Yield the layers in order, each with its values and rules."""
    all_tokens, buffers = slice(0, inputs.ids.shape[1]), Buffers()
    with without_gradients():
        trace = DenseTrace(decoder, Text.of(inputs), [], see)
    for i, layer in streamed_layers(decoder):
        before = trace.resid
        with without_gradients():
            check_layer(decoder.config, layer, i)
            primal = trace.advance(i, layer, keep=False)
            rules = DenseLayer(decoder, i, layer, primal, trace.places, all_tokens, buffers)
        streamed = StreamedLayer(i, before, trace.resid.clone(), rules)  # a copy, so that the caller may change it
        yield streamed
        streamed._rules = None  # the next layer takes its memory
