"""The relevance lens by autograd: a forward pass with the same values, in which some factors are constants to autograd.

It is entered as a context, in which the modules of the model compute so. The gates are written out as functions of
their own, x times sigmoid(x) or a normal distribution's cumulative function, where the library divides by x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NORMS = ("input_layernorm", "post_attention_layernorm", "ln_1", "ln_2")  # of the residual stream


def _tanh_gate(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "gelu": lambda x: torch.distributions.Normal(0, 1).cdf(x),
    "gelu_new": _tanh_gate,
    "relu": lambda x: (x > 0).to(x.dtype),
}


def opened(x: Tensor, gate: str) -> Tensor:
    """The activation, with its gate taken as a constant."""
    return x * GATES[gate](x.detach())


def normed(module: Any, x: Tensor) -> Tensor:
    """The norm, with its denominator taken as a constant."""
    if isinstance(module, nn.LayerNorm):
        moved, eps = x - x.mean(-1, keepdim=True), module.eps
    else:
        moved, eps = x, getattr(module, "variance_epsilon", getattr(module, "eps", None))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = moved / (moved.detach().square().mean(-1, keepdim=True) + eps).sqrt() * module.weight
    return y if getattr(module, "bias", None) is None else y + module.bias


def halved(product: Tensor) -> Tensor:
    """A product, of which autograd gives each factor half."""
    return 0.5 * product + 0.5 * product.detach()


@contextmanager
def relevance(model: Any, activation: str) -> Iterator[None]:
    """Inside this context, autograd through ``model`` follows the rules of the relevance lens."""
    with ExitStack() as stack:

        def replace(module: Any, forward: Callable[..., Tensor], name: str = "forward") -> None:
            stack.enter_context(mock.patch.object(module, name, forward))

        for path, module in model.named_modules():
            name = path.rpartition(".")[2]
            if name in NORMS:
                replace(module, lambda x, module=module: normed(module, x))
            elif name in ("act", "act_fn"):
                replace(module, lambda x: opened(x, activation))
            elif hasattr(module, "_activated"):  # the MLP of a CircuitGPT
                replace(module, lambda x, overwrite: opened(x, activation), "_activated")
            if hasattr(module, "gate_proj"):
                replace(
                    module, lambda x, m=module: m.down_proj(halved(opened(m.gate_proj(x), activation) * m.up_proj(x)))
                )
        yield
