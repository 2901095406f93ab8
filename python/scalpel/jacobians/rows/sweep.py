"""One sweep of many cotangents back through the layers of a decoder, seen at the residual stream between any of them.

The layers are the outer loop, so the weights of a layer are fetched once for all cotangents, and may leave memory then.
Within a layer the cotangents go in pieces whose values stay in a cache while the layer's steps follow one another. A
block is a whole number of pieces, so the pieces, and with them the bits, don't depend on its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.decoders.decoder import Decoder, DecoderConfig
from .layer import Buffers, DenseLayer
from .trace import DenseTrace

__all__ = ["DenseSweep", "Sizes", "pulled_pieces"]

_PIECE_BYTES = 1 << 23  # the widest value of a piece on a CPU: a few of them fit into a last-level cache
_PIECE_BYTES_ELSEWHERE = 1 << 28  # on a GPU, where each step should be large
_BLOCK_BYTES = 1 << 27  # of cotangents that are worth a sweep of their own


class Sizes(NamedTuple):
    """How many cotangents go through a layer at a time, and how many of them are given at a time."""

    piece: int
    block: int

    @classmethod
    def of(cls, config: DecoderConfig, neurons: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Sizes:
        """The sizes for cotangents at ``tokens`` tokens, in a model whose MLPs have ``neurons`` neurons."""
        of_token = tokens * dtype.itemsize
        widest = max(config.width, neurons, config.heads * config.head_dim)
        room = _PIECE_BYTES if device.type == "cpu" else _PIECE_BYTES_ELSEWHERE
        piece = max(1, room // (of_token * widest))
        return cls(piece, max(piece, _BLOCK_BYTES // (of_token * config.width) // piece * piece))


def pulled_pieces(rules: DenseLayer, cotangents: Tensor, piece: int) -> Iterator[tuple[Tensor, int]]:
    """Carry cotangents (T, 1, tokens, width) back through one layer, in place; yields a piece and where it begins."""
    for first in range(0, len(cotangents), piece):
        rows = rules.pull(cotangents[first : first + piece], lambda _, value: value)
        assert rows is not None  # they were pulled in place
        yield rows, first


class DenseSweep:
    """Cotangents of a decoder at some of its tokens, from one hook of the residual stream back to others.

    Args:
        decoder: The model, with the weights that its products take.
        trace: Its primal, cut at both ends.
        source: Where the sweep ends: a layer's ``resid_in``, or ``"final_resid"``.
        target: Where it starts, the same or further on.
        tokens: The tokens that take part.
    """

    def __init__(self, decoder: Decoder, trace: DenseTrace, source: str, target: str, tokens: slice) -> None:
        self.decoder = decoder
        self.trace = trace
        self.target = target
        self.tokens = tokens
        past = int(target.partition(".")[0]) if target != "final_resid" else decoder.config.layers
        primals = trace.layers(source, target)
        self.primals = {i: primal for i, primal in primals.items() if i < past}
        value = trace.values[target]
        self.dtype, self.device = value.dtype, value.device
        self.width = decoder.config.width
        count = tokens.stop - tokens.start
        self.piece, self.block = Sizes.of(decoder.config, trace.neurons, count, self.dtype, self.device)

    def pull(self, cotangents: Tensor, see: Callable[[str, Tensor, int], None]) -> None:
        """Carry cotangents (T, 1, tokens, width), which are overwritten, back to the source; see :class:`Sweep`."""
        buffers = Buffers()
        see(self.target, cotangents, 0)
        for i, primal in reversed(self.primals.items()):
            rules = DenseLayer(
                self.decoder, i, self.decoder.layer(i), primal, self.trace.places, self.tokens, buffers, unseen=True
            )
            for rows, first in pulled_pieces(rules, cotangents, self.piece):
                see(f"{i}.resid_in", rows, first)
