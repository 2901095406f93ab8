"""The subsemigroup that a circuit closes over: the letters whose action survives when all else is deleted.

A_C = {a : δ_a with everything else ablated equals δ_a, conflict ≤ ε}; the subsemigroup is ⟨A_C⟩. The machine is learned
from the whole model at short words, among the task's answers; the circuit's answers are read with the shifts that were
refitted for it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.circuitgpt import CircuitGPT
from ..semigroup.extraction.learning import learn, rows_of
from ..semigroup.extraction.questions import ModelQuestions
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
    """The letters A_C of the circuit ``nodes``, and the sizes of ⟨A_C⟩ and of the whole machine's semigroup.

    For prefixes u of up to ``horizon`` letters with ρ(u) = q in the whole model, 2 · ``pairs`` of them a state, the
    circuit's ρ(ua) is compared with δ(q, a). A letter is in A_C where the bound of the mismatch is at most
    ``most_conflict`` in every state. Plain data: ``letters``, ``rates`` by letter and state, ``states_kept`` (the share
    of prefixes whose state the circuit knows), ``machine``, ``size``, ``whole_size`` (None without libsemigroups).
    """
    rng = np.random.default_rng([seed, 77])
    whole, alone = (_questions(model, words, task) for _ in range(2))
    candidate = learn(whole, horizon, prefixes=prefixes, tolerance=0.02, limit=64, rng=rng)
    own = by_state(whole, candidate, 2 * pairs, horizon, rng).words
    fitted = fit_of(model, nodes, stand_in, task)
    alone.shift = torch.tensor(fitted.shift) / max(fitted.scale, 1e-9)
    row_of = {state: row for row, state in candidate.states.items()}
    rates: dict[str, Rate] = {}
    with only(model, nodes, stand_in):
        for a, letter in enumerate(whole.letters):
            cells = {}
            for state, group in own.items():
                target = row_of[candidate.machine.transitions[state][a]]
                got = rows_of(alone, [(*word, a) for word in group], candidate.continuations)
                cells[str(state)] = (sum(row != target for row in got), len(group))
            rates[letter] = Rate(cells)
        known = [
            row == row_of[state]
            for state, group in own.items()
            for row in rows_of(alone, group, candidate.continuations)
        ]
    letters = [letter for letter, rate in rates.items() if rate.worst <= most_conflict]
    return {
        "letters": letters,
        "states_kept": float(np.mean(known)) if known else None,
        "rates": {letter: rate.to_dict() for letter, rate in rates.items()},
        "machine": candidate.machine.to_dict(),
        "size": _size(candidate.machine, letters),
        "whole_size": _size(candidate.machine, list(whole.letters)),
    }


def _questions(model: CircuitGPT, words: Alphabet, task: Task) -> ModelQuestions:
    """The words' questions among the task's own answers."""
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
