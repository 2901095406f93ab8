"""Laws of failure: at which length does an averaging head's statistic fall to its threshold?

A head with weights a over the real keys gives m = Σ_j a_j u_j, with u_j key j's value along the direction that the next
reader reads. With attention logits ℓ_j and the sink's logit b, m > θ iff Σ_j e^{ℓ_j} (u_j - θ) > θ e^b. Keys are put
into classes of tokens with a mean weight and a mean u each: the *weighted* law. Equal weights and u = 0 but at the
evidence make it the *sink* law, m = s / (n + σ); no sink either, and it is the *seed's*, n* = k/θ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models.tokenizer import Tokenizer

__all__ = ["CLASSES", "WeightedLaw", "token_classes"]

# Start token; what stands in front of the list; "[" that are open at the question, and closed; tokens with a "]";
# commas and blanks; all else inside the list.
CLASSES = ("start", "head", "open", "closed", "closer", "separator", "element")
START, HEAD, OPEN, CLOSED, CLOSER, SEPARATOR, ELEMENT = range(len(CLASSES))


def token_classes(ids: Sequence[int], tokenizer: Tokenizer, start: Sequence[int] = ()) -> np.ndarray:
    """Each token's class (tokens,), an index into CLASSES, as seen from the end of the text.

    Brackets are matched by what the tokens say; brackets in strings or comments count as any other, as they do for
    a head that averages.
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
    """Right iff Σ_c n_c w_c (u_c - θ) > θ w_b, with n_c the number of tokens of class c.

    ``weight`` and ``u``: (classes,), the mean of e^ℓ and the weighted mean of u in a class, in the order of CLASSES; a
    class that the calibration had no token of has weight 0 and is thereby left out. ``sink``: e^b, 0 without a sink.
    ``theta``: in the units of u.
    """

    weight: np.ndarray
    u: np.ndarray
    sink: float
    theta: float
    tokenizer: Tokenizer | None = None
    start: tuple[int, ...] = ()

    def surplus(self, counts: np.ndarray) -> np.ndarray:
        """Σ_c n_c w_c (u_c - θ) - θ w_b for counts (..., classes): above 0 where the answer is right."""
        found: np.ndarray = counts @ (self.weight * (self.u - self.theta)) - self.theta * self.sink
        return found

    def per_token(self) -> float:
        """What one token of filler, half an element and half its comma, adds to the surplus."""
        terms = self.weight * (self.u - self.theta)
        return float((terms[ELEMENT] + terms[SEPARATOR]) / 2)

    def critical_length(self, counts: np.ndarray) -> float:
        """The n at which the answer begins to fail when filler is added to a prompt of ``counts`` (classes,).

        Infinite for a right answer that filler never turns; NaN where the law has no such n, since its surplus is
        none to begin with and filler doesn't take from it.
        """
        surplus, each = float(self.surplus(counts)), self.per_token()
        if each < 0:
            return float(counts.sum()) + surplus / -each
        return float("inf") if surplus > 0 and each >= 0 else float("nan")

    def tokens_left(self, ids: Sequence[int]) -> float:
        """Filler tokens that a prompt bears before the answer is predicted to fail; 0 or less where it fails already.

        NaN for a law without a θ. ValueError for one that was made without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this law was made without a tokenizer, so it can't read token ids; give it one")
        classes = token_classes(ids, self.tokenizer, self.start)
        counts = np.bincount(classes, minlength=len(CLASSES)).astype(float)
        if self.surplus(counts) <= 0 <= self.per_token():
            return 0.0
        return self.critical_length(counts) - float(len(ids))


def theta_from_length(weight: np.ndarray, u: np.ndarray, sink: float, counts: np.ndarray) -> float:
    """The θ with which the weighted law fails just at ``counts``: the m there, Σ n_c w_c u_c / (w_b + Σ n_c w_c).

    NaN where no key has any weight.
    """
    if not sink + counts @ weight > 0:
        return float("nan")
    return float(counts @ (weight * u) / (sink + counts @ weight))
