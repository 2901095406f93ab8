"""Laws calibrated at short contexts only: class weights and values of the head that carries the evidence, and its θ.

No context of more than 48 tokens is run here. θ can't be read off decisions at such lengths, where nothing flips and
the logits saturate; it is set by intervention, see :mod:`.head`.
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

_MOST_LOG = 300.0
_EVIDENCE = (laws.OPEN, laws.CLOSED, laws.CLOSER)


@dataclass(frozen=True)
class BracketLaw:
    """A named law's n* by amount of evidence, in tokens, and the standard error of each by bootstrap over prompts.

    NaN where the law says nothing: a θ of 0 or less has no n* = s/θ.
    """

    name: str
    lengths: dict[int, float]
    errors: dict[int, float]


@dataclass(frozen=True)
class ShortContexts:
    """What was read at short contexts, by prompt, so that all of it can be drawn anew.

    ``weights``, ``values``, ``tokens`` (amounts, prompts, classes): sums over keys and questions of e^ℓ, of e^ℓ u and
    of 1. ``counts`` (amounts, prompts, classes): the tokens of each prompt at its last question. ``thetas`` (prompts,)
    of both depths; NaN where nothing turned the answer. ``sigma`` (amounts, prompts) in tokens.
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
        """The median θ over prompts; NaN where fewer than half of them have one."""
        found = self.thetas[np.isfinite(self.thetas)]
        return float(np.median(found)) if 2 * len(found) >= len(self.thetas) else float("nan")

    def sample(self, rng: np.random.Generator) -> "ShortContexts":
        """The same of prompts drawn with replacement."""
        rows = rng.integers(self.counts.shape[1], size=self.counts.shape[1])
        thetas = self.thetas[rng.integers(len(self.thetas), size=len(self.thetas))]
        parts = {name: getattr(self, name)[:, rows] for name in ("weights", "values", "tokens", "counts", "sigma")}
        return replace(self, thetas=thetas, **parts)

    def law(self, theta: float | None = None) -> laws.WeightedLaw:
        """The weighted law of all amounts together, with the median θ if none is given."""
        tokens, weights = self.tokens.sum((0, 1)), self.weights.sum((0, 1))
        weight = np.divide(weights, tokens, out=np.zeros_like(weights), where=tokens > 0)
        u = np.divide(self.values.sum((0, 1)), weights, out=np.zeros_like(weights), where=weights > 0)
        return laws.WeightedLaw(weight, u, self.sink, self.theta if theta is None else theta)

    def composition(self, k: int) -> np.ndarray:
        """Mean tokens of each class at the last question of the prompts of evidence k."""
        found: np.ndarray = self.counts[self.amounts.index(k)].mean(0)
        return found

    def by_intervention(self) -> dict[str, dict[int, float]]:
        """n*(k) of the weighted, the sink's and the seed's law, from nothing but short contexts."""
        return self._lengths(self.law(), float(self.sigma.mean()))

    def law_failing_at(self, k: int, length: float) -> laws.WeightedLaw:
        """The weighted law with its θ so chosen that a list of evidence k fails at ``length`` tokens."""
        composition, law = self.composition(k).copy(), self.law(float("nan"))
        composition[[laws.ELEMENT, laws.SEPARATOR]] += (length - composition.sum()) / 2
        return self.law(laws.theta_from_length(law.weight, law.u, law.sink, composition))

    def from_length(self, k: int, length: float) -> dict[str, dict[int, float]]:
        """The same with θ so chosen that each law fails at the length measured for k."""
        weighted = law = self.law_failing_at(k, length)
        sigma = float(self.sigma.mean())
        found = {"weighted": self._lengths(weighted, sigma)["weighted"]}
        s = {a: float(self._evidence(law, a)) for a in self.amounts}
        found["sink"] = {a: s[a] / s[k] * (length + sigma) - sigma if s[k] > 0 else float("nan") for a in self.amounts}
        found["seed"] = {a: a / k * length for a in self.amounts}
        return found

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

    ``head``: if none is given it is looked for. ``u`` (d_head,): a direction in place of the head's own, for a null.
    ``thetas``: whether to find θ by intervention, which takes most of the time.
    Refused where no head carries the depth, or an amount leaves no element within 48 tokens.
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
        # The longer half of the short contexts: the first questions have hardly any filler to read.
        asked = torch.arange(lists.asked.shape[1] // 2, lists.asked.shape[1], device="cpu")
        reading = h.read(model, head, lists, asked, u)
        rows = lists.ids.tolist()
        ends = lists.asked.numpy()
        # A "[" is open at one question and so at all of them: the classes don't change along these lists.
        classes = np.stack([_classes(row, end, model, start) for row, end in zip(rows, ends[:, -1], strict=True)])
        seen = np.isfinite(reading.logits)
        # Relative to the sink or, without one, to a query's mean: then only ratios within a query mean anything.
        total = logsumexp(reading.logits, axis=-1, keepdims=True) - np.log(seen.sum(-1, keepdims=True))
        relative = reading.logits - (total if sink is None else sink)
        weight = np.exp(np.minimum(relative, _MOST_LOG))  # a sink so far below all keys is as good as none
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
    weights, values, tokens = (np.stack([one[i] for one in sums]) for i in range(3))
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
    """Classes of a row's tokens as its last question sees them; what comes after is never read."""
    assert model.tokenizer is not None
    found = laws.token_classes(row[: end + 1], model.tokenizer, start)
    return np.concatenate([found, np.full(len(row) - end - 1, laws.ELEMENT)])


def with_errors(name: str, lengths: Mapping[int, float], draws: Sequence[Mapping[int, float]]) -> BracketLaw:
    """A law with its standard errors from bootstrap draws of the same lengths; a draw that says nothing is left out."""
    errors = {}
    for k in lengths:
        values = np.array([draw[k] for draw in draws])
        values = values[np.isfinite(values)]
        errors[k] = float(values.std()) if len(values) > 1 else float("nan")
    return BracketLaw(name, dict(lengths), errors)
