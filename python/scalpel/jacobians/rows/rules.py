"""The rules of a dense decoder's sublayers on T tangents at once, (T, B, L, width), and their primal.

Every rule is linear in the tangent; jvp and vjp are each other's adjoint. A norm's is that of Xu et al. 2019
("Understanding and Improving Layer Normalization", equation 6), without the mean for RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.decoders.decoder import NormWeight


@dataclass(frozen=True)
class DenseNorm:
    """LayerNorm or RMSNorm at one value: y = gain * normed + bias, normed = (x - mean) * rate."""

    normed: Tensor  # (..., width)
    rate: Tensor  # (..., 1)
    gain: Tensor  # (width,)
    bias: Tensor | None
    centered: bool

    @classmethod
    def at(cls, x: Tensor, weight: NormWeight, eps: float, rms: bool) -> DenseNorm:
        moved = x if rms else x - x.mean(-1, keepdim=True)
        rate = (moved.square().mean(-1, keepdim=True) + eps).rsqrt()
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return cls(moved * rate, rate, weight.gain.to(x.dtype), bias, not rms)

    def value(self) -> Tensor:
        y = self.normed * self.gain
        return y if self.bias is None else y + self.bias

    def rows(self, part: slice) -> DenseNorm:
        """At some tokens of (B, L, width)."""
        return DenseNorm(self.normed[:, part], self.rate[:, part], self.gain, self.bias, self.centered)

    def jvp(self, t: Tensor, out: Tensor) -> Tensor:
        """Written to ``out``, which may be t."""
        return self._projected(t, out).mul_(self.rate * self.gain)

    def vjp(self, u: Tensor) -> Tensor:
        scaled = u * self.gain
        return self._projected(scaled, scaled).mul_(self.rate)

    def _projected(self, t: Tensor, out: Tensor) -> Tensor:
        """Take from t its part along the normed value and, for LayerNorm, its mean: a symmetric matrix."""
        along = (t * self.normed).mean(-1, keepdim=True)
        if self.centered:
            torch.sub(t, t.mean(-1, keepdim=True), out=out)
            return out.addcmul_(along, self.normed, value=-1)
        return torch.addcmul(t, along, self.normed, value=-1, out=out)


def slope_of(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function, at x."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(at).sum(), at)
    return slope


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """In place: channel c of each head (..., L, heads, d) turned with channel c + pairs; the rest stays.

    With ``-sine`` it is the transpose.
    """
    pairs = cosine.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = first * cosine - second * sine
    second.mul_(cosine).addcmul_(first, sine)
    first.copy_(turned)
    return x
