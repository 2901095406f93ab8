"""One pass of many tangents through the layers of a decoder, which join it at several hooks of the residual stream.

The layers are the outer loop, as in :mod:`.sweep`: a layer's weights are fetched once for all tangents that have come
so far, whichever hook they started from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...models.decoders.decoder import Decoder
from .layer import Buffers, DenseLayer
from .sweep import DenseSweep
from .trace import DenseTrace

__all__ = ["DenseForwardSweep"]


class DenseForwardSweep:
    """Tangents of a decoder at some of its tokens, from hooks of the residual stream forward to one target.

    Args:
        decoder: The model, with the weights that its products take.
        trace: Its primal, cut at both ends.
        source: The earliest hook where tangents start: a layer's ``resid_in``, or ``"final_resid"``.
        target: Where they end, the same or further on.
        tokens: The tokens that take part.
    """

    def __init__(self, decoder: Decoder, trace: DenseTrace, source: str, target: str, tokens: slice) -> None:
        like = DenseSweep(decoder, trace, source, target, tokens)  # the same sizes, backwards
        self.decoder, self.trace, self.target, self.tokens = decoder, trace, target, tokens
        self.primals, self.piece, self.block = like.primals, like.piece, like.block
        self.dtype, self.device, self.width = like.dtype, like.device, like.width
        # Attention's tangents go on to the last token of the text, also where that is not wanted.
        self.part = slice(tokens.start, trace.values[target].shape[1])

    def push(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Carry tangents {hook: (T, 1, tokens, width)} to the target, of the same shapes."""
        total = sum(map(len, tangents.values()))
        x = torch.zeros(total, 1, self.part.stop - self.part.start, self.width, dtype=self.dtype, device=self.device)
        wanted = slice(0, self.tokens.stop - self.tokens.start)
        places: dict[str, slice] = {}
        joined = 0

        def join(hook: str) -> int:
            rows = tangents.get(hook)
            if rows is None:
                return joined
            places[hook] = slice(joined, joined + len(rows))
            x[places[hook], :, wanted] = rows
            return joined + len(rows)

        buffers = Buffers()
        for i, primal in self.primals.items():
            joined = join(f"{i}.resid_in")
            layer = self.decoder.layer(i)
            rules = DenseLayer(self.decoder, i, layer, primal, self.trace.places, self.part, buffers)
            for first in range(0, joined, self.piece):
                rows = x[first : min(joined, first + self.piece)]
                after = rules.push(rows, lambda _, value: value, set())
                assert after is not None
                if after is not rows:  # sublayers in parallel need the value before them once more
                    rows.copy_(after)
        joined = join(self.target)
        return {hook: x[place, :, wanted] for hook, place in places.items()}
