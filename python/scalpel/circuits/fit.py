"""Compute the loss of a circuit after the scale and the shifts of its logits are refitted.

The deletion of nodes changes the scale and the shifts, and neither is part of the task.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Fit", "refit"]


@dataclass(frozen=True)
class Fit:
    """Cross-entropy in nats and accuracy of logits · ``scale`` + ``shift`` (answers,)."""

    loss: float
    accuracy: float
    scale: float
    shift: tuple[float, ...]


def refit(logits: Tensor, labels: Tensor) -> Fit:
    """Find the scale from 0 to 10 and the shifts that minimize the cross-entropy of ``logits`` (prompts, answers).

    The scale is bounded so that a circuit cannot be sharpened without limit.
    """
    fixed = logits.detach().double()
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True, device=fixed.device)
    shift = torch.zeros(fixed.shape[1], dtype=torch.float64, requires_grad=True, device=fixed.device)
    optimizer = torch.optim.LBFGS([raw, shift], max_iter=100, line_search_fn="strong_wolfe")

    def fitted() -> Tensor:
        return fixed * (10 * torch.sigmoid(raw)) + shift

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A minimal penalty: where the answers are separated perfectly, the shifts would grow without limit.
        loss = F.cross_entropy(fitted(), labels) + 1e-6 * shift.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        logits_fitted = fitted()
        return Fit(
            float(F.cross_entropy(logits_fitted, labels)),
            float((logits_fitted.argmax(-1) == labels).double().mean()),
            float(10 * torch.sigmoid(raw)),
            tuple(shift.tolist()),
        )
