"""The recipe of Gao et al. 2025 (arXiv 2511.13653): anneal every matrix to a fixed count of non-zeros.

What differs from the paper is named in :class:`Recipe` with the reason.
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

    ``density``: final fraction of non-zeros in each sparse matrix, reached linearly at ``anneal`` of the steps.
    ``min_per_channel``: non-zeros that every row and every column keeps whatever the fraction.
    ``eps``: the paper's 0.1 belongs to models thousands of times larger, whose gradients it floors; at this size
    it would stop the learning, so Adam's usual value stands here.
    ``closer_weight``: how much the loss of a closing token counts against any other's 1. Names and numbers cannot be
    foreseen, and in so small a model their gradients drown those of the few tokens that can.
    ``density``, ``vocab_size`` and single statements for text differ from the paper's (5 % and less, 2048, Python
    files) because the model is a thousand times smaller; vectors are not decayed.
    ``sparse_embeddings``: whether the token and position tables and the head are pruned too.
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
        """The model's configuration: AbsTopK at every location but the residual's."""
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
        """Fraction of non-zeros kept after ``step`` (counted from 0): linear from 1 to ``density``, then constant."""
        done = min(1.0, (step + 1) / max(1.0, self.anneal * self.steps))
        return 1.0 + done * (self.density - 1.0)

    def lr_at(self, step: int) -> float:
        """Learning rate: warm-up, linear decay, and 1/√(fraction of non-zeros)."""
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return self.lr * warm * (1 - step / self.steps) / math.sqrt(self.density_at(step))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sparse_matrices(model: CircuitGPT, embeddings: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices that the recipe prunes: those of the blocks and, where asked, the embeddings and the head.

    A position table that is switched off is all zeros and stays so.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or not parameter.requires_grad:
            continue
        if ".h." in name or embeddings:
            yield name, parameter


@torch.no_grad()
def clip_rms_(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale all gradients so that the root of their mean square is at most ``limit``."""
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.square().sum() for g in grads]).sum()
    rms = (total / sum(g.numel() for g in grads)).sqrt()
    torch._foreach_mul_(grads, float(limit / rms.clamp(min=limit)))


def density_table(model: CircuitGPT) -> dict[str, dict[str, float]]:
    """Non-zeros, size and density of every matrix."""
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
