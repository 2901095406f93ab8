"""The parameters of a new CircuitGPT, with their device and dtype stated.

They don't depend on torch's default device or dtype, so one seed gives the same weights in every program.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PARAMETER_DTYPE", "embedding", "linear", "sinusoids", "zeros"]

PARAMETER_DTYPE = torch.float32


def linear(inputs: int, outputs: int, bias: bool, device: torch.device) -> nn.Linear:
    """Make a linear layer with torch's own initial weights."""
    return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=PARAMETER_DTYPE)


def embedding(rows: int, width: int, device: torch.device) -> nn.Embedding:
    """Make a table of embeddings, (rows, width), with torch's own initial weights."""
    # With a weight given, nothing is drawn. On the meta device there are no numbers, and to draw none, torch would
    # import its compiler, which takes a second.
    given = zeros(rows, width, device=device) if device.type == "meta" else None
    return nn.Embedding(rows, width, device=device, dtype=PARAMETER_DTYPE, _weight=given)


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Make a tensor of zeros."""
    return torch.zeros(*shape, device=device, dtype=PARAMETER_DTYPE)


def sinusoids(block_size: int, width: int) -> Tensor:
    """Make the fixed table of positions, (block_size, width).

    The first columns are sines and the next ones cosines, each of max(1, width // 2) periods. The periods are spaced
    logarithmically from 4 tokens to ``block_size`` tokens (at least 4). The table is cut, or padded with zeros, to
    the width.
    """
    count = max(1, width // 2)
    longest = math.log10(max(4.0, float(block_size)))
    periods = torch.logspace(math.log10(4.0), longest, count, dtype=PARAMETER_DTYPE, device="cpu")
    angles = torch.arange(block_size, dtype=PARAMETER_DTYPE, device="cpu")[:, None] * (2 * math.pi / periods)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
    return F.pad(table, (0, width - table.shape[1]))
