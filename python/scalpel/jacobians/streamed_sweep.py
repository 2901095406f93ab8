"""Sweeps of cotangents back through a decoder too large for memory, with one layer in memory while the next is read.

A pass forward stores the residual stream before each layer. Then the layers come in reverse order; a layer's primal is
computed again from the value before it, and all cotangents in memory go back through it. Where they are too many for
memory, the layers are read again for the next ones. The alternative is to keep the cotangents on disk between two
layers: that moves the cotangents twice for each layer where this moves a layer's weights once, so it is the worse one
as soon as the cotangents in memory are half as large as a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.decoders.decoder import Decoder, DecoderLayer, Dense, check_layer
from ..models.decoders.folder import neurons_of, streamed_layers
from .ends import check_numbers
from .precision import without_gradients
from .rows.layer import Buffers, DenseLayer
from .rows.primal import DensePrimal, Text, through_layer
from .rows.sweep import Sizes, pulled_pieces
from .rows.trace import DenseTrace

__all__ = ["Share", "StreamedSweep"]


@dataclass(frozen=True)
class Share:
    """Cotangents of one text, which go back together.

    Attributes:
        text: The number of the text.
        make: Makes them at the target's output, (T, 1, tokens, width), when their turn comes.
        see: Called at the output of every layer from the target on, with the layer's number, some of the cotangents
            there, and the number of the first of them.
    """

    text: int
    make: Callable[[], Tensor]
    see: Callable[[int, Tensor, int], None]


class StreamedSweep:
    """Cotangents of several texts, from the output of a layer back to those of earlier ones, layers read from a folder.

    Args:
        decoder: The model in a folder.
        texts: The texts, each a batch of one.
        tokens: For each text, the tokens that take part.
        source: The first layer whose output is seen.
        target: The layer at whose output the cotangents start.
        relevance: Whether they go back by the rules of the relevance lens.
        narrow: Whether the products with the cotangents are bfloat16.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Text],
        tokens: Sequence[slice],
        source: int,
        target: int,
        relevance: bool,
        narrow: bool,
    ) -> None:
        self._decoder, self._tokens = decoder, tokens
        self._source, self._target = source, target
        self._relevance, self._narrow = relevance, narrow
        with without_gradients():
            self._traces = [DenseTrace(decoder, text, [], relevance=relevance) for text in texts]
        self._before: list[dict[int, Tensor]] = [{} for _ in texts]
        self.dtype, self.device = self._traces[0].resid.dtype, self._traces[0].resid.device

    def sizes(self, text: int) -> Sizes:
        """How many cotangents of a text go through a layer at a time."""
        part = self._tokens[text]
        neurons = neurons_of(self._decoder, self._target)
        return Sizes.of(self._decoder.config, neurons, part.stop - part.start, self.dtype, self.device)

    def run(self, passes: Sequence[Sequence[Share]]) -> Iterator[int]:
        """Carry all shares back, those of a pass together; yields the number of each pass when it is done.

        Raises:
            ValueError: A value of the model at the source or the target is NaN.
        """
        back = range(self._target, self._source, -1)
        forward = range(self._target if back else 0)
        layers = streamed_layers(self._decoder, [*forward, *(i for _ in passes for i in back)])
        for _ in forward:
            i, layer = next(layers)
            with without_gradients():
                self._forward(i, layer)
        for number, shares in enumerate(passes):
            with without_gradients():
                moving = [share.make() for share in shares]
                for share, cotangents in zip(shares, moving, strict=True):
                    share.see(self._target, cotangents, 0)
            buffers = Buffers()
            for _ in back:
                i, layer = next(layers)
                with without_gradients():
                    self._back(i, layer, shares, moving, buffers)
            del moving, buffers  # while the caller works
            yield number

    def _forward(self, i: int, layer: DecoderLayer) -> None:
        check_layer(self._decoder.config, layer, i)
        for trace, before in zip(self._traces, self._before, strict=True):
            trace.advance(i, layer, keep=False)
            if i >= self._source:
                before[i + 1] = trace.resid
            if i == self._source:
                check_numbers(trace.resid, self._after(i))

    def _back(
        self, i: int, layer: DecoderLayer, shares: Sequence[Share], moving: Sequence[Tensor], buffers: Buffers
    ) -> None:
        """Carry the cotangents of a pass back through layer ``i``."""
        check_layer(self._decoder.config, layer, i)
        narrow = narrowed(layer) if self._narrow else layer
        primal, of = DensePrimal(), -1
        for share, cotangents in zip(shares, moving, strict=True):
            places = self._traces[share.text].places
            if share.text != of:
                primal, of = DensePrimal(), share.text
                x = self._before[of][i]
                after = through_layer(self._decoder, i, layer, x, places, _pass_on, primal, self._relevance)
                if i == self._target:
                    check_numbers(after, self._after(i))
            part = self._tokens[share.text]
            rules = DenseLayer(self._decoder, i, narrow, primal, places, part, buffers, unseen=True)
            for rows, first in pulled_pieces(rules, cotangents, self.sizes(share.text).piece):
                share.see(i - 1, rows, first)

    def _after(self, i: int) -> str:
        """The hook of a layer's output."""
        return "final_resid" if i == self._decoder.config.layers - 1 else f"{i + 1}.resid_in"


def _pass_on(hook: str, value: Tensor) -> Tensor:
    return value


def narrowed(layer: DecoderLayer) -> DecoderLayer:
    """The layer with its matrices in bfloat16."""

    def narrow(dense: Dense) -> Dense:
        return Dense(dense.weight.to(torch.bfloat16), dense.bias)

    qkv, up = tuple(map(narrow, layer.qkv)), tuple(map(narrow, layer.up))
    return replace(layer, qkv=qkv, up=up, out=narrow(layer.out), down=narrow(layer.down))
