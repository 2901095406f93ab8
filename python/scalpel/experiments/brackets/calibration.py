"""Laws calibrated at short contexts only: what the head that carries the evidence weighs and reads, and its θ.

No context of more than 48 tokens is run here. θ can't be read off the model's decisions at such lengths, since no
answer flips there and the logits saturate. It is found by intervention instead, as :mod:`.head` describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import closers
from . import head as h
from . import laws

__all__ = ["BracketLaw", "ShortContexts", "calibrate"]

_MOST_LOG = 300.0  # the largest logit relative to the sink that exp is taken of, so that it stays finite
_EVIDENCE = (laws.OPEN, laws.CLOSED, laws.CLOSER)


@dataclass(frozen=True)
class BracketLaw:
    """A law's n* by amount of evidence, in tokens, and the standard error of each by bootstrap over prompts.

    A length is NaN if the law predicts none; for example, a θ of 0 or less gives no n* = s/θ.
    """

    name: str
    lengths: dict[int, float]
    errors: dict[int, float]


@dataclass(frozen=True)
class ShortContexts:
    """What was read at short contexts, kept by prompt so that it can be resampled.

    Attributes:
        head: The attention head that carries the evidence.
        amounts: The amounts of evidence.
        weights: Sums over keys and questions of e^ℓ, (amounts, prompts, classes).
        values: Sums over keys and questions of e^ℓ u, of the same shape.
        tokens: How many keys were summed over, of the same shape.
        counts: How many tokens of each class a prompt holds at its last question, of the same shape.
        thetas: θ of each prompt of both depths, (prompts,); NaN if no value of the head's output turned the answer.
        sigma: The sink term in tokens, (amounts, prompts).
        sink: The weight of the sink, 1 if the model has one and 0 otherwise.
    """

    head: h.Head
    amounts: tuple[int, ...]
    weights: np.ndarray
    values: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    thetas: np.ndarray
    sigma: np.ndarray
    sink: float

    @property
    def theta(self) -> float:
        """The median θ over prompts; NaN if fewer than half of them have one."""
        finite = self.thetas[np.isfinite(self.thetas)]
        return float(np.median(finite)) if 2 * len(finite) >= len(self.thetas) else float("nan")

    def sample(self, rng: np.random.Generator) -> "ShortContexts":
        """The same readings of prompts drawn with replacement."""
        rows = rng.integers(self.counts.shape[1], size=self.counts.shape[1])
        thetas = self.thetas[rng.integers(len(self.thetas), size=len(self.thetas))]
        parts = {name: getattr(self, name)[:, rows] for name in ("weights", "values", "tokens", "counts", "sigma")}
        return replace(self, thetas=thetas, **parts)

    def law(self, theta: float | None = None) -> laws.WeightedLaw:
        """The weighted law of all amounts together, with the median θ by default."""
        tokens, weights = self.tokens.sum((0, 1)), self.weights.sum((0, 1))
        weight = np.divide(weights, tokens, out=np.zeros_like(weights), where=tokens > 0)
        u = np.divide(self.values.sum((0, 1)), weights, out=np.zeros_like(weights), where=weights > 0)
        return laws.WeightedLaw(weight, u, self.sink, self.theta if theta is None else theta)

    def composition(self, k: int) -> np.ndarray:
        """Mean number of tokens of each class at the last question of the prompts of evidence k, (classes,)."""
        mean_counts: np.ndarray = self.counts[self.amounts.index(k)].mean(0)
        return mean_counts

    def by_intervention(self) -> dict[str, dict[int, float]]:
        """n*(k) of the weighted law, the sink law and the seed's law, from short contexts alone."""
        return self._lengths(self.law(), float(self.sigma.mean()))

    def law_failing_at(self, k: int, length: float) -> laws.WeightedLaw:
        """The weighted law with the θ at which a list of evidence k fails at ``length`` tokens."""
        composition, law = self.composition(k).copy(), self.law(float("nan"))
        composition[[laws.ELEMENT, laws.SEPARATOR]] += (length - composition.sum()) / 2
        return self.law(laws.theta_from_length(law.weight, law.u, law.sink, composition))

    def from_length(self, k: int, length: float) -> dict[str, dict[int, float]]:
        """n*(k) of the three laws, each with the θ at which it fails at the ``length`` measured for k."""
        weighted = law = self.law_failing_at(k, length)
        sigma = float(self.sigma.mean())
        lengths = {"weighted": self._lengths(weighted, sigma)["weighted"]}
        s = {a: float(self._evidence(law, a)) for a in self.amounts}
        lengths["sink"] = {
            a: s[a] / s[k] * (length + sigma) - sigma if s[k] > 0 else float("nan") for a in self.amounts
        }
        lengths["seed"] = {a: a / k * length for a in self.amounts}
        return lengths

    def _evidence(self, law: laws.WeightedLaw, k: int) -> float:
        return float(self.composition(k)[list(_EVIDENCE)] @ law.u[list(_EVIDENCE)])

    def _lengths(self, law: laws.WeightedLaw, sigma: float) -> dict[str, dict[int, float]]:
        nan = float("nan")
        if not np.isfinite(law.theta):
            return {name: dict.fromkeys(self.amounts, nan) for name in ("weighted", "sink", "seed")}
        per_theta = {k: self._evidence(law, k) / law.theta if law.theta > 0 else nan for k in self.amounts}
        return {
            "weighted": {k: law.critical_length(self.composition(k)) for k in self.amounts},
            "sink": {k: n - sigma for k, n in per_theta.items()},
            "seed": per_theta,
        }


def calibrate(
    model: CircuitGPT,
    amounts: Sequence[int],
    *,
    prompts: int = 32,
    seed: int = 0,
    head: h.Head | None = None,
    u: Tensor | None = None,
    thetas: bool = True,
) -> ShortContexts:
    """Read the head at short contexts for each amount of evidence at depth 2.

    Args:
        model: A CircuitGPT with a tokenizer.
        amounts: Amounts of evidence k.
        prompts: Lists for each amount.
        seed: Seed of the lists.
        head: The head to read; by default the one that carries the depth is searched for.
        u: A direction (d_head,) in place of the head's own, for a null.
        thetas: Whether to find θ by intervention, which takes most of the time.

    Returns:
        The readings by prompt.

    Raises:
        Refused: No head carries the depth, or an amount leaves no room for an element within 48 tokens.
    """
    assert model.tokenizer is not None
    head = h.find_head(model, prompts, seed) if head is None else head
    start = closers(model.tokenizer).start
    sink = (
        float(model.transformer.h[head.layer].attn.attn_imp.sink_logit[head.index].detach())
        if model.config.sink
        else None
    )
    sums: list[list[np.ndarray]] = []
    counts, sigma = [], []
    for k in amounts:
        lists = h.short_lists(model, k, 2, prompts, seed)
        # Only the longer half of the short contexts is read: the first questions have hardly any filler in front.
        asked = torch.arange(lists.asked.shape[1] // 2, lists.asked.shape[1], device="cpu")
        reading = h.read(model, head, lists, asked, u)
        rows = lists.ids.tolist()
        ends = lists.asked.numpy()
        # A "[" that is open at one question is open at all of them, so classes don't change along these lists.
        classes = np.stack([_classes(row, end, model, start) for row, end in zip(rows, ends[:, -1], strict=True)])
        seen = np.isfinite(reading.logits)
        # Logits are relative to the sink. Without a sink they are relative to the query's mean, and only ratios within
        # a query have a meaning.
        total = logsumexp(reading.logits, axis=-1, keepdims=True) - np.log(seen.sum(-1, keepdims=True))
        relative = reading.logits - (total if sink is None else sink)
        weight = np.exp(np.minimum(relative, _MOST_LOG))  # a sink that far below all keys counts for nothing
        one_hot = classes[:, None, :, None] == np.arange(len(laws.CLASSES))
        sums.append(
            [
                np.einsum("pqj,pqjc->pc", weight, one_hot.astype(float) * seen[..., None]),
                np.einsum("pqj,pqjc->pc", weight * reading.u, one_hot.astype(float) * seen[..., None]),
                (one_hot & seen[..., None]).sum((1, 2)).astype(float),
            ]
        )
        counts.append((one_hot[:, 0] & seen[:, -1, :, None]).sum(1).astype(float))
        sigma.append(reading.sigma.mean(1))
    weights, values, tokens = (np.stack([by_amount[i] for by_amount in sums]) for i in range(3))
    return ShortContexts(
        head=head,
        amounts=tuple(amounts),
        weights=weights,
        values=values,
        tokens=tokens,
        counts=np.stack(counts),
        thetas=h.threshold(model, head, prompts=prompts, seed=seed, u=u) if thetas else np.full(2 * prompts, np.nan),
        sigma=np.stack(sigma),
        sink=0.0 if sink is None else 1.0,
    )


def _classes(row: Sequence[int], end: int, model: CircuitGPT, start: Sequence[int]) -> np.ndarray:
    """Classes of a row's tokens as its last question sees them; tokens after that are never read."""
    assert model.tokenizer is not None
    classes = laws.token_classes(row[: end + 1], model.tokenizer, start)
    return np.concatenate([classes, np.full(len(row) - end - 1, laws.ELEMENT)])


def with_errors(name: str, lengths: Mapping[int, float], draws: Sequence[Mapping[int, float]]) -> BracketLaw:
    """A law with its standard errors from bootstrap draws of its lengths; draws that are not finite are left out."""
    errors = {}
    for k in lengths:
        values = np.array([draw[k] for draw in draws])
        values = values[np.isfinite(values)]
        errors[k] = float(values.std()) if len(values) > 1 else float("nan")
    return BracketLaw(name, dict(lengths), errors)
