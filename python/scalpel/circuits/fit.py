"""The loss of a circuit, its logits' scale and shifts refitted: deletion changes both, and neither is the task."""

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
    """The scale from 0 to 10 and the shifts that make the cross-entropy of ``logits`` (prompts, answers) least.

    The scale is bounded so that a circuit can't be sharpened without end.
    """
    given = logits.detach().double()
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True, device=given.device)
    shift = torch.zeros(given.shape[1], dtype=torch.float64, requires_grad=True, device=given.device)
    optimizer = torch.optim.LBFGS([raw, shift], max_iter=100, line_search_fn="strong_wolfe")

    def fitted() -> Tensor:
        return given * (10 * torch.sigmoid(raw)) + shift

    def closure() -> Tensor:
        optimizer.zero_grad()
        # the least of penalties: where the answers are told apart perfectly, the shifts would run away
        loss = F.cross_entropy(fitted(), labels) + 1e-6 * shift.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        out = fitted()
        return Fit(
            float(F.cross_entropy(out, labels)),
            float((out.argmax(-1) == labels).double().mean()),
            float(10 * torch.sigmoid(raw)),
            tuple(shift.tolist()),
        )
