"""Directions of generators, gradients at hooks, and how well an eigenvector is determined.

A generator's direction at a hook tells how the hook's values move with the claimed variable: it holds the slope of
every channel on that variable beyond the nuisance variables (the regression of :mod:`..mapping.measure`), scaled to
length one. The gradient is that of a loss at the hook, for every token of every prompt. Its covariance is a
:class:`scalpel.StreamingCovariance`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...covariance import StreamingCovariance
from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import closers
from ...tasks.refused import Refused
from ..mapping.claims import CLAIMS, Setup
from ..mapping.measure import Prompts, Scores
from ..mapping.scan import recorded, scores_of
from ..statistics import draw_weights

__all__ = ["LOSSES", "Components", "Direction", "directions_at", "gradients", "own_directions"]

LOSSES = ("loss", "difference")
SPAN = 128  # the bootstrap resamples within so many leading components; the rest of the gradient is dropped there
_BATCH = 16


@dataclass(frozen=True)
class Direction:
    """The direction of a claim at a hook.

    Attributes:
        claim: "update", "mean" or "threshold".
        hook: The hook.
        channel: The channel with the largest partial R² for the claim.
        r2: That partial R².
        direction: The unit vector (channels,).
        live: Which channels are live, bool (channels,).
    """

    claim: str
    hook: str
    channel: int
    r2: float
    direction: np.ndarray
    live: np.ndarray


def own_directions(model: CircuitGPT, setup: Setup) -> dict[str, Direction]:
    """Each claim's direction at its own hook: the hook of the channel with the largest partial R².

    Hooks of fewer than four channels are passed over, since an eigengap below their third component needs a fourth. A
    claim for which no other hook has a live channel is missing from the result.
    """
    best: dict[str, Direction] = {}
    for hook, asked, single in recorded(model, setup):
        if asked.shape[1] < 4:
            continue
        for claim, direction in _directions(setup, hook, asked, single).items():
            if claim not in best or direction.r2 > best[claim].r2:
                best[claim] = direction
    return best


def directions_at(model: CircuitGPT, setup: Setup, hooks: dict[str, str]) -> dict[str, Direction]:
    """Each claim's direction at the hook that is named for it; a claim without a direction there is missing."""
    directions = {}
    for hook, asked, single in recorded(model, setup):
        if hook in hooks.values():
            here = _directions(setup, hook, asked, single)
            directions.update({claim: direction for claim, direction in here.items() if hooks.get(claim) == hook})
    return directions


def _directions(setup: Setup, hook: str, asked: np.ndarray, single: np.ndarray) -> dict[str, Direction]:
    scores = scores_of(setup, asked, single)
    directions = {}
    for claim in CLAIMS:
        kind, columns = setup.groups[claim]
        of_kind: Scores = scores[kind]
        r2 = np.nan_to_num(of_kind.r2[columns], nan=-np.inf)
        row, channel = np.unravel_index(int(r2.argmax()), r2.shape)
        beta = np.where(of_kind.live, of_kind.beta[columns.start + row], 0.0)
        length = float(np.linalg.norm(beta))
        if np.isfinite(r2[row, channel]) and length > 0:
            direction = (beta / length).astype(np.float64)
            directions[claim] = Direction(claim, hook, int(channel), float(r2[row, channel]), direction, of_kind.live)
    return directions


def gradients(model: CircuitGPT, prompts: Prompts, hooks: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Gradients at ``hooks`` for every token, by loss and hook: float64 (prompts, length, channels).

    "loss" is the cross-entropy between the two answers, log(1 + exp(∓d)) with d = logit("]]\\n") - logit("]\\n"),
    averaged over a prompt's questions. "difference" is d itself, whose gradient doesn't vanish if the model is sure.
    """
    assert model.tokenizer is not None
    if not hooks:
        return {loss: {} for loss in LOSSES}
    ends = closers(model.tokenizer)
    by_loss: dict[str, dict[str, list[Tensor]]] = {loss: {hook: [] for hook in hooks} for loss in LOSSES}
    sign = torch.from_numpy(np.where(prompts.k > 1, 1.0, -1.0))
    asked = torch.from_numpy(prompts.asked)
    for i in range(0, len(prompts), _BATCH):
        part = slice(i, i + _BATCH)
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, name: str, kept: dict[str, Tensor] = kept) -> Tensor:
            value = value if value.requires_grad else value.detach().requires_grad_()
            kept[name] = value
            return value

        with torch.enable_grad():
            logits = model.run_with_hooks(
                prompts.ids[part], [(hook, keep) for hook in hooks], position_ids=prompts.positions[part]
            )
            d = (logits[..., ends.two] - logits[..., ends.one]).gather(1, asked[part])
            values = [kept[hook] for hook in hooks]
            totals = {
                "loss": F.softplus(-sign[part, None].to(d.dtype) * d).mean(1).sum(),
                "difference": d.mean(1).sum(),
            }
            for loss, total in totals.items():
                grads = torch.autograd.grad(total, values, retain_graph=loss == "loss", allow_unused=True)
                for hook, value, grad in zip(hooks, values, grads, strict=True):
                    by_loss[loss][hook].append(torch.zeros_like(value) if grad is None else grad.detach())
    return {
        loss: {hook: torch.cat(parts).double().cpu().numpy() for hook, parts in by_hook.items()}
        for loss, by_hook in by_loss.items()
    }


@dataclass(frozen=True)
class Components:
    """Leading components of a gradient covariance.

    Attributes:
        values: Eigenvalues (k,), descending.
        vectors: Eigenvectors (k, channels).
        share: Share of the variance along each, (k,).
        drawn: The first three eigenvectors for each resample of the prompts, (resamples, 3, channels).
    """

    values: np.ndarray
    vectors: np.ndarray
    share: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of(cls, gradient: np.ndarray, *, center: bool, resamples: int, rng: np.random.Generator) -> "Components":
        """The components of a gradient (prompts, length, channels). Raises Refused if it is zero everywhere."""
        if not np.abs(gradient).max() > 0:
            raise Refused("the gradient is zero at every token: nothing after this hook depends on it")
        width = gradient.shape[2]
        # The scale has no meaning here, and squares of very small gradients would underflow.
        scaled = gradient / np.sqrt(np.square(gradient).mean())
        covariance = StreamingCovariance(width, center=center).update(scaled.reshape(-1, width))
        values, vectors = (tensor.numpy() for tensor in covariance.eigh(min(SPAN, width)))
        total = float(np.trace(covariance.covariance().numpy()))
        drawn = _resampled(scaled @ vectors.T, center, resamples, rng) @ vectors
        return cls(values[:16], vectors[:16], values[:16] / total, drawn)

    def cosines(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|cos| of a unit direction with the first three vectors: (3,), and by resample (resamples, 3)."""
        return np.abs(self.vectors[:3] @ direction), np.abs(self.drawn @ direction)

    def gap(self, i: int) -> float:
        """Eigengap of component ``i`` (from 0): the smaller distance to a neighbour, divided by its own eigenvalue."""
        below = self.values[i] - self.values[i + 1]
        above = self.values[i - 1] - self.values[i] if i else np.inf
        return float(min(below, above) / max(self.values[i], 1e-300))

    def steady(self, i: int) -> float:
        """Median |cos| of component ``i`` with itself over the resamples; NaN without resamples."""
        if not len(self.drawn):
            return float("nan")
        return float(np.median(np.abs(self.drawn[:, i] @ self.vectors[i])))


def _resampled(rows: np.ndarray, center: bool, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """First three eigenvectors of the covariance of ``rows`` (prompts, length, k) by resample, (resamples, 3, k)."""
    count, length, width = rows.shape
    if not resamples:
        return np.zeros((0, 3, width))
    weights = draw_weights(count, rng, resamples) / (count * length)
    second = np.einsum("pti,ptj->pij", rows, rows, optimize=True).reshape(count, -1)
    mean = weights @ rows.sum(1)
    covariance = (weights @ second).reshape(resamples, width, width)
    if center:
        covariance -= mean[:, :, None] * mean[:, None, :]
    _, vectors = np.linalg.eigh(covariance)
    return np.ascontiguousarray(np.swapaxes(vectors[:, :, -1:-4:-1], 1, 2))
