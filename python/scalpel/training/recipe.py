"""The recipe of Gao et al. 2025 (arXiv 2511.13653): every matrix is annealed to a fixed number of non-zeros.

:class:`Recipe` says what differs from the paper, and why.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..models.circuitgpt.config import CircuitGPTConfig
from ..models.circuitgpt.model import CircuitGPT


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, apart from the text.

    Args:
        density: The final fraction of non-zeros in each sparse matrix, reached linearly after the fraction ``anneal``
            of the steps.
        min_per_channel: How many non-zeros every row and every column keeps, whatever the fraction.
        eps: Adam's usual value. The paper's 0.1 is for models thousands of times larger; at this size it would stop the
            learning.
        closer_weight: How much the loss of a closing token counts, if that of any other token counts 1. Names and
            numbers cannot be predicted, and in so small a model their gradients would drown those of the few tokens
            that can.
        sparse_embeddings: Whether the token and position tables and the head are pruned too.

    The paper has densities of 5 % and less, a vocabulary of 2048, and whole Python files as text; the model here is a
    thousand times smaller. Vectors (biases and gains) are not decayed.
    """

    d_model: int = 128
    n_layer: int = 2
    d_head: int = 16
    block_size: int = 512
    vocab_size: int = 512
    afrac: float | None = 0.25
    positions: bool = True
    steps: int = 3000
    batch: int = 32
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: float = 0.01
    density: float = 0.25
    anneal: float = 0.5
    min_per_channel: int = 4
    sparse_embeddings: bool = True
    clip_rms: float = 1.0
    closer_weight: float = 4.0
    tokenizer_name: str = "bracket-mini"
    seed: int = 0

    def config(self) -> CircuitGPTConfig:
        """Return the model's configuration, with AbsTopK everywhere except on the residual stream."""
        locations = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
        return CircuitGPTConfig(
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            n_layer=self.n_layer,
            n_head=self.d_model // self.d_head,
            d_head=self.d_head,
            d_model=self.d_model,
            bias=True,
            rms_norm=True,
            activation_type="gelu",
            afrac=self.afrac,
            afrac_loctypes=locations,
            tied_unembed=False,
            tokenizer_name=self.tokenizer_name,
            sink=True,
        )

    def density_at(self, step: int) -> float:
        """Return the fraction of non-zeros after ``step``, counted from 0.

        It falls linearly from 1 to ``density`` and then stays.
        """
        done = min(1.0, (step + 1) / max(1.0, self.anneal * self.steps))
        return 1.0 + done * (self.density - 1.0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate: warm-up, linear decay, and a factor of 1/√(fraction of non-zeros)."""
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return self.lr * warm * (1 - step / self.steps) / math.sqrt(self.density_at(step))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return asdict(self)


def sparse_matrices(model: CircuitGPT, embeddings: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the matrices that the recipe prunes: those of the blocks and, with ``embeddings``, the tables and the head.

    A position table that is switched off isn't among them: it is zero and stays so.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or not parameter.requires_grad:
            continue
        if ".h." in name or embeddings:
            yield name, parameter


@torch.no_grad()
def clip_rms_(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale all gradients in place so that their root mean square is at most ``limit``."""
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.square().sum() for g in grads]).sum()
    rms = (total / sum(g.numel() for g in grads)).sqrt()
    torch._foreach_mul_(grads, float(limit / rms.clamp(min=limit)))


def density_table(model: CircuitGPT) -> dict[str, dict[str, float]]:
    """Return the number of non-zeros, the size and the density of every matrix."""
    table = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nonzero = int(parameter.count_nonzero())
            table[name] = {
                "nonzero": nonzero,
                "size": parameter.numel(),
                "density": nonzero / max(1, parameter.numel()),
            }
    return table
