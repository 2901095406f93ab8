"""The loss of a circuit, its logits' scale and shifts refitted: deletion changes both, and neither is the task."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["refitted_loss"]


def refitted_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy) of ``logits`` (prompts, answers) · s + b with the s ≥ 0 and b that are best.

    s is at most 10, so that a circuit can't be sharpened without end.
    """
    given = logits.detach().double()
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(given.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, shift], max_iter=100, line_search_fn="strong_wolfe")

    def fitted() -> Tensor:
        return given * (10 * torch.sigmoid(scale)) + shift

    def closure() -> Tensor:
        optimizer.zero_grad()
        # the least of penalties: where the answers are told apart perfectly, b would run away
        loss = F.cross_entropy(fitted(), labels) + 1e-6 * shift.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        out = fitted()
        return float(F.cross_entropy(out, labels)), float((out.argmax(-1) == labels).double().mean())
