"""The subsemigroup that a circuit closes over: the letters whose action survives when everything else is deleted.

A_C = {a : δ_a with everything else ablated equals δ_a, conflict ≤ ε}, and the subsemigroup is ⟨A_C⟩. The machine is
learned from the whole model on short words, with the task's answers as its outputs. When the circuit is asked, its
logits get the shifts that were refitted for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..models.circuitgpt.model import CircuitGPT
from ..semigroup.extraction.learning import Candidate, learn, rows_of
from ..semigroup.extraction.questions import NOT_VALID, ModelQuestions, Word
from ..semigroup.extraction.trials import Rate, by_state
from ..semigroup.machine import MooreMachine
from ..tasks.bracket_words import Alphabet
from .ablations import Substitute
from .measure import fit_of, only
from .task import Task

__all__ = ["closes_over"]


def closes_over(
    model: CircuitGPT,
    nodes: Sequence[str],
    stand_in: Substitute,
    task: Task,
    words: Alphabet,
    *,
    horizon: int = 12,
    prefixes: int = 128,
    pairs: int = 80,
    most_conflict: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Find the letters A_C of the circuit ``nodes``, and the sizes of ⟨A_C⟩ and of the whole machine's semigroup.

    For each state q, 2 · ``pairs`` prefixes u of up to ``horizon`` letters are drawn with ρ(u) = q in the whole model.
    For each letter a that may follow, the circuit's ρ(ua) is compared with δ(q, a). A letter is in A_C if the bound of
    the mismatch is at most ``most_conflict`` in every such state, and if this does not hold with no node kept at all. A
    model without nodes gives a constant answer, which preserves the letters that lead to this answer but closes over
    nothing.

    Returns:
        Plain data: ``letters``; ``rates`` by letter and state, and ``rates_of_nothing`` with no node kept;
        ``states_kept`` and ``states_kept_by_nothing``, the share of prefixes whose state is known; ``machine``;
        ``size`` and ``whole_size`` (None without libsemigroups).
    """
    rng = np.random.default_rng([seed, 77])
    whole = _questions(model, words, task)
    candidate = learn(whole, horizon, prefixes=prefixes, tolerance=0.02, limit=64, rng=rng)
    words_by_state = by_state(whole, candidate, 2 * pairs, horizon, rng).words
    rates, known = _rates(model, nodes, stand_in, task, words, candidate, words_by_state)
    rates_of_nothing, known_by_nothing = _rates(model, [], stand_in, task, words, candidate, words_by_state)
    letters = [
        letter
        for letter in whole.letters
        if rates[letter].worst <= most_conflict < rates_of_nothing[letter].worst and rates[letter].cells
    ]
    return {
        "letters": letters,
        "states_kept": known,
        "states_kept_by_nothing": known_by_nothing,
        "rates": {letter: rate.to_dict() for letter, rate in rates.items()},
        "rates_of_nothing": {letter: rate.to_dict() for letter, rate in rates_of_nothing.items()},
        "machine": candidate.machine.to_dict(),
        "size": _size(candidate.machine, letters),
        "whole_size": _size(candidate.machine, list(whole.letters)),
    }


def _rates(
    model: CircuitGPT,
    nodes: Sequence[str],
    stand_in: Substitute,
    task: Task,
    words: Alphabet,
    candidate: Candidate,
    words_by_state: Mapping[int, Sequence[Word]],
) -> tuple[dict[str, Rate], float | None]:
    """Measure how often a letter leads the model with only ``nodes`` kept to another state than the candidate.

    Returns:
        The rates by letter, each with a cell for each state, and the share of prefixes whose state the model still
        knows.
    """
    alone = _questions(model, words, task)
    fitted = fit_of(model, nodes, stand_in, task)
    alone.shift = torch.tensor(fitted.shift, dtype=model.dtype, device="cpu") / max(fitted.scale, 1e-9)
    row_of = {state: row for row, state in candidate.states.items()}
    rates: dict[str, Rate] = {}
    with only(model, nodes, stand_in):
        for number, letter in enumerate(alone.letters):
            cells = {}
            for state, group in words_by_state.items():
                target = candidate.machine.transitions[state][number]
                if candidate.machine.outputs[target] is NOT_VALID:
                    continue
                after = rows_of(alone, [(*word, number) for word in group], candidate.continuations)
                cells[str(state)] = (sum(row != row_of[target] for row in after), len(group))
            rates[letter] = Rate(cells)
        known = [
            row == row_of[state]
            for state, group in words_by_state.items()
            for row in rows_of(alone, group, candidate.continuations)
        ]
    return rates, float(np.mean(known)) if known else None


def _questions(model: CircuitGPT, words: Alphabet, task: Task) -> ModelQuestions:
    """Make questions about the words among the task's own answers."""
    assert model.tokenizer is not None
    answers = {name: text for name, text in words.answers.items() if model.tokenizer.single(text) in task.answers}
    return ModelQuestions(model, words.alphabet, answers, prefix=words.prefix, suffix=words.suffix, valid=words.valid)


def _size(machine: MooreMachine, letters: Sequence[str]) -> int | None:
    if not letters:
        return 0
    try:
        return machine.semigroup(letters).size
    except ImportError:
        return None
