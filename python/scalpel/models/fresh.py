"""What a new CircuitGPT is made of: each part says where it is made, and all are float32.

torch's defaults decide nothing here: a seed gives the same weights in every program.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MADE_IN", "embedding", "linear", "sinusoids", "zeros"]

MADE_IN = torch.float32


def linear(inputs: int, outputs: int, bias: bool, device: torch.device) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=MADE_IN)


def embedding(rows: int, width: int, device: torch.device) -> nn.Embedding:
    return nn.Embedding(rows, width, device=device, dtype=MADE_IN)


def zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(*shape, device=device, dtype=MADE_IN)


def sinusoids(block_size: int, width: int) -> Tensor:
    """The fixed position table (block_size, width).

    [sin | cos] of max(1, width // 2) periods, log-spaced from 4 to block_size tokens (4 at least), cut or
    padded with zeros to the width.
    """
    count = max(1, width // 2)
    longest = math.log10(max(4.0, float(block_size)))
    periods = torch.logspace(math.log10(4.0), longest, count, dtype=MADE_IN, device="cpu")
    angles = torch.arange(block_size, dtype=MADE_IN, device="cpu")[:, None] * (2 * math.pi / periods)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
    return F.pad(table, (0, width - table.shape[1]))
