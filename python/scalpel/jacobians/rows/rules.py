"""The rules that carry T tangents (T, B, L, width) at once through the sublayers of a dense decoder.

Every rule is linear in the tangent, and jvp and vjp are each other's adjoint. The rule of a norm is that of Xu et al.
2019 ("Understanding and Improving Layer Normalization", equation 6); RMSNorm leaves out the term of the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.decoders.decoder import NormWeight


@dataclass(frozen=True)
class DenseNorm:
    """LayerNorm or RMSNorm at one value of its input: y = gain * normed + bias, where normed = (x - mean) * rate."""

    normed: Tensor  # (..., width)
    rate: Tensor  # (..., 1)
    gain: Tensor  # (width,)
    bias: Tensor | None
    centered: bool  # whether the mean is subtracted, as LayerNorm does and RMSNorm does not
    fixed: bool = False  # whether products take ``rate`` for a constant, as those of the relevance lens do

    @classmethod
    def at(cls, x: Tensor, weight: NormWeight, eps: float, rms: bool) -> DenseNorm:
        """The norm at the input ``x``: RMSNorm where ``rms`` is True, else LayerNorm."""
        deviation = x if rms else x - x.mean(-1, keepdim=True)
        rate = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return cls(deviation * rate, rate, weight.gain.to(x.dtype), bias, not rms)

    def value(self) -> Tensor:
        """The output y of the norm."""
        y = self.normed * self.gain
        return y if self.bias is None else y + self.bias

    def rows(self, part: slice) -> DenseNorm:
        """The same norm at the tokens ``part`` of (B, L, width)."""
        return DenseNorm(self.normed[:, part], self.rate[:, part], self.gain, self.bias, self.centered, self.fixed)

    def jvp(self, t: Tensor, out: Tensor) -> Tensor:
        """Write the tangent of the output to ``out``, which may be ``t`` itself, and return it."""
        return self._projected(t, out).mul_(self.rate * self.gain)

    def vjp(self, u: Tensor) -> Tensor:
        """Return the cotangent of the input, given that of the output."""
        scaled = u * self.gain
        return self._projected(scaled, scaled).mul_(self.rate)

    def add_vjp(self, u: Tensor, x: Tensor) -> Tensor:
        """Add to ``x``, in place, the cotangent of the input, given that of the output, ``u``; gives ``x``.

        It makes no value of the size of ``u``, and reads ``u`` twice, or three times for a LayerNorm.
        """
        width = u.shape[-1]
        x.addcmul_(u, self.gain * self.rate)
        if not self.fixed:
            component = torch.einsum("t...w,...w->t...", u, self.normed * self.gain)[..., None].div_(width)
            x.addcmul_(component, self.normed * self.rate, value=-1)
        if self.centered:
            x.addcmul_((u @ self.gain)[..., None], self.rate, value=-1 / width)
        return x

    def _projected(self, t: Tensor, out: Tensor) -> Tensor:
        """Subtract from ``t`` its component along the normed value and, for LayerNorm, its mean.

        This map is symmetric, so jvp and vjp share it.
        """
        component = t.new_zeros(()) if self.fixed else (t * self.normed).mean(-1, keepdim=True)
        if self.centered:
            torch.sub(t, t.mean(-1, keepdim=True), out=out)
            return out.addcmul_(component, self.normed, value=-1)
        return torch.addcmul(t, component, self.normed, value=-1, out=out)


def slope_of(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function at each entry of ``x``."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(at).sum(), at)
    return slope


def share_of(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The activation divided by its input, f(x) / x, at each entry of ``x``: what the relevance lens takes for a slope.

    At zero it is the derivative, which is its limit there.
    """
    return torch.where(x == 0, slope_of(activation, torch.zeros_like(x)), activation(x) / x)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate, in place, channel c of each head (..., L, heads, d) together with channel c + pairs.

    Channels from 2 * pairs on stay as they are. With ``-sine`` this is the transpose.
    """
    pairs = cosine.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    rotated_first = first * cosine - second * sine
    second.mul_(cosine).addcmul_(first, sine)
    first.copy_(rotated_first)
    return x
