"""Learned masks of nodes: which can be deleted while the task's loss stays low (Gao et al. 2025, appendix A.5)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.circuitgpt.model import CircuitGPT
from .ablations import Substitute, masked, nodes_at
from .task import Task

__all__ = ["Schedule", "learn_masks"]


@dataclass(frozen=True)
class Schedule:
    """How masks are learned.

    Attributes:
        steps: The number of steps of Adam.
        batch: The number of prompts in a batch.
        lr: The learning rate.
        cost: The cost of a node in nats, which is reached linearly over the first half of the steps.
        temperature: The temperature of the sigmoid whose derivative replaces that of the step function.
    """

    steps: int = 200
    batch: int = 32
    lr: float = 0.04
    cost: float = 2e-3
    temperature: float = 0.3


class _Step(torch.autograd.Function):
    """Compute 1[τ > 0] forward, and use the derivative of sigmoid(τ / temperature) backward."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        smooth = torch.sigmoid(tau / ctx.temperature)
        return grads[0] * smooth * (1 - smooth) / ctx.temperature, None


def learn_masks(
    model: CircuitGPT,
    task: Task,
    stand_in: Substitute,
    schedule: Schedule,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Learn τ in [-1, 1] for every node, by hook (width,): the larger it is, the more the task needs the node.

    The loss is the cross-entropy of the answers, whose scale and shifts are learned together with the masks, plus
    ``schedule.cost`` for each kept node. Tokens and prompts share the masks. The model's weights are not changed.
    """
    generator = torch.Generator().manual_seed(seed)
    taus = {
        name: (0.5 + 0.1 * torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")).requires_grad_()
        for name, width in nodes_at(model).items()
    }
    scale = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
    shift = torch.zeros(len(task.answers), requires_grad=True, dtype=torch.float32, device="cpu")
    optimizer = torch.optim.Adam([*taus.values(), scale, shift], lr=schedule.lr, betas=(0.9, 0.95))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * (1 - step / schedule.steps)
            rows = torch.randint(len(task), (schedule.batch,), generator=generator, device="cpu")
            part = task.part(rows)
            masks = {name: _Step.apply(tau, schedule.temperature) for name, tau in taus.items()}
            logits = model(part.ids, tap=masked(masks, stand_in))
            chosen = logits[torch.arange(len(part), device="cpu"), part.asked][:, list(task.answers)].cpu()
            loss = F.cross_entropy(chosen * scale.exp() + shift, part.labels)
            kept = torch.stack([mask.sum() for mask in masks.values()]).sum()
            cost = schedule.cost * min(1.0, 2 * (step + 1) / schedule.steps)
            optimizer.zero_grad(set_to_none=True)
            (loss + cost * kept).backward()
            optimizer.step()
            with torch.no_grad():
                for tau in taus.values():
                    tau.clamp_(-1, 1)
                scale.clamp_(-math.log(10), math.log(10))
            if progress is not None:
                progress((step + 1) / schedule.steps)
    finally:
        for weight in weights:
            weight.requires_grad_(True)
    return {name: tau.detach() for name, tau in taus.items()}
