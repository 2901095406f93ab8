"""What AbsTopK does to gradients: spectra of their covariance, and how well activations lie in its leading directions.

At a hook with an AbsTopK, h = mask ⊙ x, and L is the summed loss of the next token. g_post = ∂L/∂h is the gradient
behind the mask and g_pre = mask ⊙ g_post the one before it; each has one row for every token. Twelve variants are
measured separately under the name "gradient.scale.moment", and nothing is ever averaged over these names:

gradient  "post" or "pre"
scale     "raw"; "trimmed", raw without the 0.1 % of tokens with the longest gradients; "unit", each row of length 1
moment    "centered", the covariance E[(g - E g)(g - E g)ᵀ]; "second", E[g gᵀ]

A mask that has nothing to do with the gradient changes the effective rank of g_pre all the same. Supports that use some
channels more than others lower the rank of an isotropic gradient, and dead channels lower it further, while any mask
that differs from token to token raises the rank of a gradient of low rank. So :func:`.gather.shuffled` gives each token
the mask of another, and :func:`compare` measures all conditions on equally many live channels, drawn at random among
the live ones of a condition that has more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...covariance.measures import effective_rank
from ...covariance.streaming import StreamingCovariance
from ...models.circuitgpt.model import CircuitGPT
from .gather import Rows, Texts, gather, topk_hooks

__all__ = [
    *(
        "GRADIENTS",
        "MOMENTS",
        "PRIMARY",
        "SCALES",
        "VARIANTS",
        "VERSION",
        "WIDEST",
        "Measured",
        "Pair",
        "area",
        "captured",
    ),
    *("compare", "covariances", "measure", "score", "shares_and_rank"),
]

VERSION = 1  # version of these measures; stored studies of another version are stale
GRADIENTS, SCALES, MOMENTS = ("post", "pre"), ("raw", "trimmed", "unit"), ("centered", "second")
VARIANTS = tuple(f"{g}.{s}.{m}" for g in GRADIENTS for s in SCALES for m in MOMENTS)
# Chosen before the study was measured: the gradient that the mask's backward pass leaves, with every token counted
# alike, so that a few long gradients decide nothing.
PRIMARY = "pre.unit.centered"
OUTLIERS = 0.001  # the share of tokens that "trimmed" leaves out
WIDEST = 2048  # channels; a wider hook is left out, since its spectra would take minutes
DRAWS = 4  # random subsets of live channels


@dataclass(frozen=True)
class Measured:
    """The figures of one hook and one variant; NaN if there is no gradient.

    Attributes:
        tokens: How many rows were counted.
        live: Channels whose gradient isn't zero at every token.
        top1, top3: Share of the variance along the first component, and along the first three.
        effective_rank: Effective rank of the eigenvalues.
        equal_channels: The smallest number of live channels among all conditions.
        equal_rank: Effective rank on that many channels, as the geometric mean over random draws.
        area: Area of the score of the activations' leading directions in the gradient's covariance.
        reverse_area: Area of the score of the gradient's directions in the activations' covariance. Both areas are NaN
            for "trimmed", where they are not computed.
    """

    tokens: int
    live: int
    top1: float
    top3: float
    effective_rank: float
    equal_channels: int
    equal_rank: float
    area: float
    reverse_area: float


def covariances(gradient: Tensor) -> dict[str, tuple[np.ndarray, int]]:
    """Covariances of a gradient by "scale.moment": (float64 (width, width), how many rows were counted).

    Rows of zeros have no direction and are left out of "unit".
    """
    norms = gradient.double().norm(dim=1)
    last = math.ceil(OUTLIERS * len(gradient))
    order = norms.argsort(stable=True)
    state = StreamingCovariance(gradient.shape[1])
    moments: dict[str, tuple[np.ndarray, int]] = {}
    if len(gradient) > last:
        state.update(gradient[order[:-last]])
        moments |= _moments(state, "trimmed")
    moments |= _moments(state.update(gradient[order[-last:]]), "raw")
    directed = norms > 0
    if bool(directed.any()):
        unit = (gradient[directed].double() / norms[directed, None]).to(gradient.dtype)
        moments |= _moments(StreamingCovariance(gradient.shape[1]).update(unit), "unit")
    nothing = np.zeros((gradient.shape[1], gradient.shape[1]))
    return {
        f"{scale}.{moment}": moments.get(f"{scale}.{moment}", (nothing, 0)) for scale in SCALES for moment in MOMENTS
    }


def _moments(state: StreamingCovariance, scale: str) -> dict[str, tuple[np.ndarray, int]]:
    centered, mean = state.covariance().numpy(), state.mean.numpy()
    return {
        f"{scale}.centered": (centered, state.count),
        f"{scale}.second": (centered + np.outer(mean, mean), state.count),
    }


def captured(covariance: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Share of the variance in the span of the first r orthonormal ``directions`` (rows), for r = 1, 2, …

    NaN if there is no variance.
    """
    total = np.trace(covariance)
    along = ((directions @ covariance) * directions).sum(1)
    return np.cumsum(along) / total if total > 0 else np.full(len(directions), np.nan)


def score(share: np.ndarray, best: np.ndarray) -> np.ndarray:
    """(captured - random) / (PCA - random) for r = 1 … width: 1 for the best directions, 0 on average for random ones.

    ``share`` and ``best`` (width,) are as :func:`captured` gives them. Random directions capture r / width. The score
    is NaN if all directions are as good as the best, which is always so at r = width.
    """
    random = np.arange(1, len(share) + 1) / len(share)
    room = best - random
    return np.divide(share - random, room, out=np.full(len(share), np.nan), where=room > 1e-6)


def area(share: np.ndarray, best: np.ndarray) -> float:
    """The score over all r at once: the area of captured - random divided by that of PCA - random.

    NaN if the best directions capture no more than random ones.
    """
    random = np.arange(1, len(share) + 1) / len(share)
    room = float((best - random).sum())
    return float((share - random).sum()) / room if room > 1e-6 * len(share) else float("nan")


@dataclass(frozen=True)
class _Spectrum:
    """A covariance (width, width) with its eigenvalues, descending, and eigenvectors as rows."""

    covariance: np.ndarray
    values: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, covariance: np.ndarray, channels: np.ndarray) -> "_Spectrum":
        kept = covariance[np.ix_(channels, channels)]
        values, vectors = np.linalg.eigh(kept)
        return cls(kept, values[::-1].clip(0), vectors.T[::-1])

    def best(self) -> np.ndarray:
        """What the first r directions of PCA capture: the most that any r directions can."""
        shares: np.ndarray = np.cumsum(self.values) / self.values.sum()
        return shares


@dataclass(frozen=True)
class Pair:
    """Covariances of gradient and activation at one hook, on the channels that are live in both.

    Dead channels are left out, since channels dead in both would count as alignment.
    """

    gradient: _Spectrum
    activation: _Spectrum

    @classmethod
    def of(cls, gradient: np.ndarray, activation: np.ndarray) -> "Pair | None":
        """From covariances (width, width); None if no channel is live in both."""
        alive = (np.diagonal(gradient) > 0) & (np.diagonal(activation) > 0)
        return cls(_Spectrum.of(gradient, alive), _Spectrum.of(activation, alive)) if alive.any() else None

    def onto(self) -> tuple[np.ndarray, np.ndarray]:
        """(captured, best): the activations' leading directions in the gradient's covariance."""
        return captured(self.gradient.covariance, self.activation.vectors), self.gradient.best()

    def reverse(self) -> tuple[np.ndarray, np.ndarray]:
        """(captured, best): the gradient's leading directions in the activations' covariance."""
        return captured(self.activation.covariance, self.gradient.vectors), self.activation.best()

    def rotated(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(captured, best) of a random orthonormal basis in place of the activations' directions."""
        basis, _ = np.linalg.qr(rng.standard_normal(self.gradient.vectors.shape))
        return captured(self.gradient.covariance, basis.T), self.gradient.best()


def compare(
    conditions: Mapping[str, Mapping[str, Rows]], seed: int = 0, pairs: dict[str, dict[str, Pair]] | None = None
) -> dict[str, dict[str, dict[str, Measured]]]:
    """Measure the same hooks in every condition, on equally many live channels.

    Args:
        conditions: Rows by condition and hook.
        seed: Seed of the random subsets of channels.
        pairs: If given, the covariances of the variant :data:`PRIMARY` are put there, {condition: {hook: Pair}}.

    Returns:
        {condition: {hook: {variant: Measured}}}.
    """
    measured: dict[str, dict[str, dict[str, Measured]]] = {condition: {} for condition in conditions}
    for number, hook in enumerate(next(iter(conditions.values()))):
        rng = np.random.default_rng([seed, number])
        rows = {condition: by_hook[hook] for condition, by_hook in conditions.items()}
        parts = {condition: _hook_measures(of_hook) for condition, of_hook in rows.items()}
        for condition in rows:
            measured[condition][hook] = {}
            pair = parts[condition][PRIMARY].pair
            if pairs is not None and pair is not None:
                pairs.setdefault(condition, {})[hook] = pair
        for variant in VARIANTS:
            equal = min(parts[condition][variant].live for condition in rows)
            for condition in rows:
                measured[condition][hook][variant] = parts[condition][variant].on(equal, rng)
    return measured


def measure(
    model: CircuitGPT, batches: Sequence[Texts], hooks: Sequence[str] | None = None
) -> dict[str, dict[str, Measured]]:
    """Measure one model alone, {hook: {variant: Measured}}; by default at the hooks with an AbsTopK."""
    names = topk_hooks(model) if hooks is None else hooks
    return compare({"model": gather(model, batches, names).rows})["model"]


@dataclass(frozen=True)
class _Part:
    """A covariance with the figures that don't depend on the other conditions."""

    covariance: np.ndarray
    live: int
    alone: Measured
    pair: Pair | None

    def on(self, channels: int, rng: np.random.Generator) -> Measured:
        if channels >= self.live or channels == 0:
            rank = self.alone.effective_rank if channels else float("nan")
            return replace(self.alone, equal_channels=channels, equal_rank=rank)
        alive = np.flatnonzero(np.diagonal(self.covariance) > 0)
        logs = []
        for _ in range(DRAWS):
            chosen = rng.choice(alive, size=min(channels, len(alive)), replace=False)
            logs.append(math.log(_rank(np.linalg.eigvalsh(self.covariance[np.ix_(chosen, chosen)]))))
        return replace(self.alone, equal_channels=channels, equal_rank=math.exp(float(np.mean(logs))))


def _hook_measures(rows: Rows) -> dict[str, _Part]:
    activations = {
        name.removeprefix("raw."): covariance
        for name, (covariance, _) in covariances(rows.activation).items()
        if name[:3] == "raw"
    }
    known: dict[tuple[str, bytes], _Spectrum] = {}  # spectra of the activations, by moment and channels
    parts: dict[str, _Part] = {}
    for which in GRADIENTS:
        if which == "pre" and bool(rows.mask.all()):  # without a mask the two gradients are the same
            parts |= {f"pre.{name.partition('.')[2]}": part for name, part in parts.items()}
            continue
        gradient = rows.gradient(which)
        live = int((gradient != 0).any(0).sum())
        for name, (covariance, tokens) in covariances(gradient).items():
            scale, moment = name.split(".")
            alive = np.diagonal(covariance) > 0
            both = alive & (np.diagonal(activations[moment]) > 0)
            areas = (float("nan"), float("nan"))
            values = pair = None
            if scale != "trimmed" and both.any():
                place = moment, both.tobytes()
                if place not in known:
                    known[place] = _Spectrum.of(activations[moment], both)
                pair = Pair(_Spectrum.of(covariance, both), known[place])
                areas = (area(*pair.onto()), area(*pair.reverse()))
                values = pair.gradient.values if bool((both == alive).all()) else None
            if values is None:
                values = np.linalg.eigvalsh(covariance[np.ix_(alive, alive)])[::-1].clip(0)
            part = _Part(covariance, live, _measured(values, live, tokens, areas), pair)
            parts[f"{which}.{name}"] = part
    return parts


def _measured(values: np.ndarray, live: int, tokens: int, areas: tuple[float, float]) -> Measured:
    top1, top3, rank = shares_and_rank(values)
    return Measured(tokens, live, top1, top3, rank, live, float("nan"), *areas)


def shares_and_rank(values: np.ndarray) -> tuple[float, float, float]:
    """(top-1 share, top-3 share, effective rank) of eigenvalues in descending order; NaN if nothing varies."""
    total = float(values.sum())
    if total <= 0:
        return float("nan"), float("nan"), float("nan")
    return float(values[0]) / total, float(values[:3].sum()) / total, _rank(values)


def _rank(values: np.ndarray) -> float:
    return effective_rank(torch.from_numpy(values.clip(0).copy())) or float("nan")
