"""One sweep of many cotangents back through the layers of a decoder, seen at the residual stream between any of them.

The layers are the outer loop, so the weights of a layer are fetched once for all cotangents, and may leave memory then.
Within a layer the cotangents go in pieces whose values stay in a cache while the layer's steps follow one another.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...models.decoders.decoder import Decoder
from .layer import Buffers, DenseLayer
from .trace import DenseTrace

__all__ = ["DenseSweep"]

_PIECE_BYTES = 1 << 23  # the widest value of a piece on a CPU: a few of them fit into a last-level cache
_PIECE_BYTES_ELSEWHERE = 1 << 28  # on a GPU, where each step should be large
_BLOCK_BYTES = 1 << 27  # of cotangents that are worth a sweep of their own


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
        of_token = (tokens.stop - tokens.start) * value.element_size()
        self.block = max(1, _BLOCK_BYTES // (of_token * self.width))
        widest = max(self.width, trace.neurons, decoder.config.heads * decoder.config.head_dim)
        piece = _PIECE_BYTES if value.device.type == "cpu" else _PIECE_BYTES_ELSEWHERE
        self.piece = max(1, piece // (of_token * widest))

    def pull(self, cotangents: Tensor, see: Callable[[str, Tensor, int], None]) -> None:
        """Carry cotangents (T, 1, tokens, width), which are overwritten, back to the source; see :class:`Sweep`."""
        buffers = Buffers()
        see(self.target, cotangents, 0)
        for i, primal in reversed(self.primals.items()):
            layer = self.decoder.layer(i)
            rules = DenseLayer(self.decoder, i, layer, primal, self.trace.places, self.tokens, buffers)
            for first in range(0, len(cotangents), self.piece):
                rows = rules.pull(cotangents[first : first + self.piece], lambda _, value: value)
                assert rows is not None  # they were pulled in place
                see(f"{i}.resid_in", rows, first)
