"""The subsemigroup that a circuit closes over: the letters whose action survives when all else is deleted.

A_C = {a : δ_a with everything else ablated equals δ_a, conflict ≤ ε}; the subsemigroup is ⟨A_C⟩.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..semigroup.extraction.learning import Candidate, rows_of
from ..semigroup.extraction.questions import ModelQuestions, Questions
from ..semigroup.extraction.trials import Rate, by_state

__all__ = ["Closure", "closes_over"]


@dataclass(frozen=True)
class Closure:
    """``letters``: A_C; ``rates``: letter → how often the ablated model leads elsewhere than the machine does, in cells
    by state; ``start_kept``: whether the ablated model knows the machine's states at all (the share of prefixes).
    """

    letters: tuple[str, ...]
    rates: dict[str, Rate]
    start_kept: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "letters": list(self.letters),
            "states_kept": self.start_kept,
            "rates": {letter: rate.to_dict() for letter, rate in self.rates.items()},
        }


def closes_over(
    whole: Questions,
    ablated: Questions,
    candidate: Candidate,
    *,
    pairs: int = 64,
    horizon: int,
    most_conflict: float = 0.05,
    rng: np.random.Generator,
) -> Closure:
    """Letters whose action on the candidate's states is the same when asked of ``ablated``, the circuit alone.

    For prefixes u with ρ(u) = q in the whole model, the ablated model's ρ(ua) is compared with δ(q, a); a letter is in
    A_C where the bound of the mismatch is at most ``most_conflict`` in every state.
    """
    own = by_state(whole, candidate, pairs, horizon, rng)
    row_of = {state: row for row, state in candidate.states.items()}
    rates: dict[str, Rate] = {}
    for a, letter in enumerate(whole.letters):
        cells = {}
        for state, words in own.items():
            target = row_of[candidate.machine.transitions[state][a]]
            got = rows_of(ablated, [(*word, a) for word in words], candidate.continuations)
            cells[str(state)] = (sum(row != target for row in got), len(words))
        rates[letter] = Rate(cells)
    kept = tuple(letter for letter, rate in rates.items() if rate.worst <= most_conflict)
    words = [word for group in own.values() for word in group]
    before = [row_of[state] for state, group in own.items() for _ in group]
    same = [a == b for a, b in zip(rows_of(ablated, words, candidate.continuations), before, strict=True)]
    return Closure(kept, rates, float(np.mean(same)) if same else float("nan"))


def subsemigroup(candidate: Candidate, letters: Sequence[str]) -> Any:
    """⟨A_C⟩ as a TransformationSemigroup; None where no letter is left."""
    return candidate.machine.semigroup(letters) if letters else None


def questions_like(whole: ModelQuestions, model: Any) -> ModelQuestions:
    """The same questions to another model, nothing remembered."""
    import copy

    other = copy.copy(whole)
    other.model = model
    other._known, other._validity = {}, {(): True}
    return other
