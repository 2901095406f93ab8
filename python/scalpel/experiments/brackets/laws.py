"""Laws of failure: the context length at which an averaging head's statistic falls to its threshold.

A head with attention weights a over the real keys computes m = Σ_j a_j u_j, where u_j is the value of key j along the
direction that the next layer reads. With attention logits ℓ_j and the sink's logit b, m > θ iff
Σ_j e^{ℓ_j} (u_j - θ) > θ e^b. Three laws follow, each a special case of the one before:

- *weighted*: tokens fall into classes, each with a mean weight and a mean u;
- *sink*: all weights are equal and u is 0 except at the evidence, so that m = s / (n + σ);
- *seed*: there is no sink either, so that n* = k/θ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models.tokenizer import Tokenizer

__all__ = ["CLASSES", "WeightedLaw", "token_classes"]

# The start token; what stands before the list; "[" that are open at the question; "[" that are closed there; tokens
# with a "]"; commas and blanks; everything else inside the list.
CLASSES = ("start", "head", "open", "closed", "closer", "separator", "element")
START, HEAD, OPEN, CLOSED, CLOSER, SEPARATOR, ELEMENT = range(len(CLASSES))


def token_classes(ids: Sequence[int], tokenizer: Tokenizer, start: Sequence[int] = ()) -> np.ndarray:
    """The class of each token, (tokens,) indices into CLASSES, as seen from the end of the text.

    Brackets are matched by the tokens' text alone. Brackets in strings or comments count like all others, as they do
    for a head that averages.
    """
    classes = np.full(len(ids), ELEMENT)
    stack: list[int] = []
    for i, token in enumerate(ids):
        if token in start:
            classes[i] = START
            continue
        text = tokenizer.decode([token])
        if "[" in text:
            classes[i] = OPEN
            stack += [i] * text.count("[")
        if "]" in text:
            classes[i] = CLOSER
            for _ in range(min(text.count("]"), len(stack))):
                classes[stack.pop()] = CLOSED
        elif "[" not in text and not text.strip(", \n"):
            classes[i] = SEPARATOR
    opened = np.flatnonzero(classes == OPEN)
    before = np.arange(len(ids)) < (opened[0] if len(opened) else len(ids))
    classes[before & np.isin(classes, (SEPARATOR, ELEMENT))] = HEAD
    return classes


@dataclass(frozen=True)
class WeightedLaw:
    """The law that an answer is right iff Σ_c n_c w_c (u_c - θ) > θ w_b, with n_c the number of tokens of class c.

    Attributes:
        weight: Mean of e^ℓ in each class, (classes,) in the order of CLASSES. A class of which the calibration had no
            token has weight 0 and so drops out.
        u: Weighted mean of u in each class, (classes,).
        sink: w_b = e^b; 0 without a sink.
        theta: The threshold, in the units of u.
        tokenizer: Needed to apply the law to token ids.
        start: Ids of the tokens that start every prompt.
    """

    weight: np.ndarray
    u: np.ndarray
    sink: float
    theta: float
    tokenizer: Tokenizer | None = None
    start: tuple[int, ...] = ()

    def surplus(self, counts: np.ndarray) -> np.ndarray:
        """Σ_c n_c w_c (u_c - θ) - θ w_b for counts (..., classes); the answer is right where it is above 0."""
        surplus: np.ndarray = counts @ (self.weight * (self.u - self.theta)) - self.theta * self.sink
        return surplus

    def per_token(self) -> float:
        """What one token of filler adds to the surplus, as the mean of an element and its comma."""
        terms = self.weight * (self.u - self.theta)
        return float((terms[ELEMENT] + terms[SEPARATOR]) / 2)

    def critical_length(self, counts: np.ndarray) -> float:
        """The n at which the answer begins to fail when filler is added to a prompt of ``counts`` (classes,).

        Infinite if the answer is right and filler never turns it. NaN if the law has no such n: the answer is wrong
        from the start, and filler doesn't lower its surplus.
        """
        surplus, per_token = float(self.surplus(counts)), self.per_token()
        if per_token < 0:
            return float(counts.sum()) + surplus / -per_token
        return float("inf") if surplus > 0 and per_token >= 0 else float("nan")

    def tokens_left(self, ids: Sequence[int]) -> float:
        """How many tokens of filler may be added to a prompt before its answer is predicted to fail.

        Returns:
            Tokens; 0 or less if the answer is predicted to fail already, NaN for a law without a θ.

        Raises:
            ValueError: The law was made without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this law was made without a tokenizer, so it can't read token ids; give it one")
        classes = token_classes(ids, self.tokenizer, self.start)
        counts = np.bincount(classes, minlength=len(CLASSES)).astype(float)
        if self.surplus(counts) <= 0 <= self.per_token():
            return 0.0
        return self.critical_length(counts) - float(len(ids))


def theta_from_length(weight: np.ndarray, u: np.ndarray, sink: float, counts: np.ndarray) -> float:
    """The θ with which the weighted law fails exactly at ``counts``: m there, Σ n_c w_c u_c / (w_b + Σ n_c w_c).

    NaN if no key has any weight.
    """
    if not sink + counts @ weight > 0:
        return float("nan")
    return float(counts @ (weight * u) / (sink + counts @ weight))
