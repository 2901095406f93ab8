"""Extract a finite machine from a model, or refuse to."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...hooks.standing import stood_for
from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...tasks.refused import Refused
from . import nulls as null
from .bounds import clopper_pearson
from .interchange import interchange
from .learning import Candidate, learn
from .questions import ModelQuestions, Questions, Word, questions_of
from .result import Extraction, Growth, judge
from .trials import by_state, conflicts, congruence, fidelity
from .words import pumped

__all__ = ["extract"]

_SHOWN = 10


def extract(
    model: CircuitGPT | Callable[..., Any],
    alphabet: Mapping[str, str] | Sequence[str],
    answers: Mapping[str, str] | Sequence[str] | None = None,
    *,
    prefix: str = "",
    suffix: str = "",
    valid: Callable[[tuple[str, ...]], bool] | None = None,
    horizon: int = 4,
    prefixes: int = 256,
    pairs: int | None = None,
    tolerance: float = 0.02,
    most_conflict: float = 0.05,
    limit: int = 64,
    nulls: bool = True,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Extraction:
    """Extract a Moore machine (Q, δ, o) that a model acts like on words over an alphabet, or refuse to.

    Prefixes of up to N = ``horizon``, 2N and 4N letters are divided into classes that no continuation of up to as many
    letters distinguishes. The machine is then tested on new words: pairs of prefixes of one class, swapped caches, and
    words that repeat a piece. The same seed gives the same result.

    Args:
        model: A CircuitGPT, which chooses among ``answers`` after prefix + word + suffix; or a function that takes a
            list of words (tuples of names) and returns as many outputs.
        alphabet: The letters' texts, or a mapping from names to texts.
        answers: The answers' texts, or a mapping from names to texts; each is a single token. None for a function.
        prefix: Text in front of each word, for a CircuitGPT.
        suffix: Text after each word, for a CircuitGPT.
        valid: A function that says whether a word, a tuple of names, may be asked at all. What is not valid becomes a
            state of its own. None allows every word.
        horizon: N, the length of the shortest of the three kinds of prefixes.
        prefixes: About how many prefixes to learn from at each length.
        pairs: How many pairs of prefixes to test for each cell of state and letter. None takes as many as the bounds
            need, at least 160.
        tolerance: The share of errors that is ignored while learning.
        most_conflict: The largest bounds that a finite machine may have.
        limit: The largest number of classes.
        nulls: Whether to measure the nulls, too.
        seed: The seed of all random choices.
        progress: A function that is called before each part with its description and the fraction done.

    Returns:
        The machine with its bounds, or a refusal with its reasons.

    Raises:
        ValueError: If an option is out of range, or answers are missing.
        Refused: If words of 8N letters do not fit the context, or the tokenizer splits an answer.

    Example:
        >>> def parity(words):
        ...     return [word.count("a") % 2 for word in words]
        >>> extraction = scalpel.semigroup.extract(parity, ["a", "b"], horizon=2, prefixes=32, nulls=False)
        >>> extraction.verdict, extraction.machine.states
        ('finite', 2)
        >>> extraction.semigroup().groups()[0].name
        'Z_2'
    """
    begun = time.monotonic()
    model = stood_for(model)
    questions = questions_of(model, alphabet, answers, prefix, suffix, valid)
    _check(questions, horizon, prefixes, pairs, tolerance, most_conflict, limit)
    report = progress or (lambda what, done: None)
    rng = np.random.default_rng(seed)
    candidates = []
    for i, length in enumerate((horizon, 2 * horizon, 4 * horizon)):
        report(f"classes of prefixes of up to {length} letters", 0.1 + 0.15 * i)
        candidates.append(learn(questions, length, prefixes=prefixes, tolerance=tolerance, limit=limit, rng=rng))
    growth = tuple(Growth(c.horizon, c.classes, c.capped, len(c.prefixes)) for c in candidates)
    # If the number of classes keeps growing, the candidate of the shortest words shows where it breaks.
    level = candidates[1].classes == candidates[2].classes
    candidate = candidates[-1] if level else candidates[0]
    pairs = max(160, _needed(candidate, most_conflict)) if pairs is None else pairs
    known: dict[str, Any] = {
        "candidate": None if candidate.capped else candidate.machine,
        "candidate_horizon": candidate.horizon,
        "horizon": 4 * horizon,
        "growth": growth,
        "continuations": tuple(" ".join(questions.names(c)) for c in candidate.continuations),
        "options": {
            "alphabet": dict(alphabet) if isinstance(alphabet, Mapping) else list(alphabet),
            "answers": dict(answers) if isinstance(answers, Mapping) else answers,
            "prefix": prefix,
            "suffix": suffix,
            "horizon": horizon,
            "prefixes": prefixes,
            "pairs": pairs,
            "tolerance": tolerance,
            "most_conflict": most_conflict,
            "limit": limit,
            "seed": seed,
        },
    }
    if candidate.capped:
        verdict, reasons = judge(growth, most_conflict, None, None, None, None, (0, 0))
    else:
        report("trials on new words", 0.55)
        tried = _try(questions, candidate, pairs, 4 * horizon, rng)
        known |= tried[1]
        verdict, reasons = judge(growth, most_conflict, *tried[0])
        if nulls:
            report("nulls", 0.8)
            known["nulls"] = _nulls(questions, candidate, min(pairs, 64), 4 * horizon, rng)
            if isinstance(model, CircuitGPT):
                # More classes than a few times the machine's count as growth, however many there are.
                few = min(limit, 4 * candidate.machine.states)
                options = known["options"] | {"nulls": False, "valid": valid, "limit": few, "pairs": min(pairs, 64)}
                other = extract(untrained(model), **options)
                known["nulls"]["untrained"] = {
                    "verdict": other.verdict,
                    "classes": [f"{'≥ ' if g.capped else ''}{g.classes}" for g in other.growth],
                    "conflict": None if other.conflict is None else other.conflict.value,
                    "same_machine": other.candidate is not None and candidate.machine.equivalent(other.candidate),
                }
    report("done", 1.0)
    return Extraction(
        verdict,
        reasons,
        candidate.machine if verdict == "finite" else None,
        asked=questions.asked,
        seconds=time.monotonic() - begun,
        **known,
    )


def _needed(candidate: Candidate, most_conflict: float) -> int:
    """Compute how many pairs per cell bring all bounds below ``most_conflict`` if one in a hundred pairs conflicts."""
    cells = len(candidate.states) * len(candidate.machine.letters)
    pairs = 16
    while clopper_pearson(pairs // 100, pairs, 0.05 / cells)[1] > max(most_conflict, 0.02):
        pairs += 16
    return pairs


def _check(
    questions: Questions,
    horizon: int,
    prefixes: int,
    pairs: int | None,
    tolerance: float,
    most_conflict: float,
    limit: int,
) -> None:
    for name, value, least in (("horizon", horizon, 1), ("prefixes", prefixes, 16), ("pairs", pairs, 8)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be 1 or more")
    for name, share in (("tolerance", tolerance), ("most_conflict", most_conflict)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; it must be at least 0 and below 1")
    if not any(questions.is_valid((letter,)) for letter in range(len(questions.letters))):
        raise ValueError("no letter is valid after the empty word: valid= receives words as tuples of names")
    longest = questions.longest()
    if longest is not None and 8 * horizon > longest:
        raise Refused(
            f"horizon {horizon} needs words of up to {8 * horizon} letters (prefixes of 4N and continuations as long), "
            f"and the context holds {longest}; use a horizon of at most {longest // 8}"
        )


def _try(
    questions: Questions, candidate: Candidate, pairs: int, horizon: int, rng: np.random.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run all trials, and return what decides the verdict and what the extraction shows."""
    own = by_state(questions, candidate, 2 * pairs, horizon, rng)
    conflict, conflicting = conflicts(questions, candidate, own)
    right, wrong = fidelity(questions, candidate, pairs, horizon, rng)
    differ, triples = congruence(questions, candidate, own, pairs, horizon, rng)
    swaps = None
    if isinstance(questions, ModelQuestions):
        swaps = interchange(questions, candidate, own, pairs, horizon, rng)
    # Each word that repeats a piece, and the first half of it.
    long = list(pumped(questions, 2 * horizon))
    repeated = list(dict.fromkeys(word[:end] for word in long for end in (len(word) // 2, len(word))))
    strange = _disagreeing(questions, candidate, repeated)
    shown = {
        "conflict": conflict,
        "fidelity": right,
        "congruence": differ,
        "interchange": swaps,
        "pumped": (len(strange), len(repeated)),
        "counterexamples": tuple(_shown(questions, candidate, [*wrong, *strange])),
        "conflicts": tuple(
            {"u": _text(questions, u), "v": _text(questions, v), "letter": questions.letters[a]}
            for u, v, a in sorted(conflicting, key=lambda t: len(t[0]) + len(t[1]))[:_SHOWN]
        ),
        "incongruent": tuple(
            {"u": _text(questions, u), "v": _text(questions, v), "continuation": _text(questions, w)}
            for u, v, w in sorted(triples, key=lambda t: sum(map(len, t)))[:_SHOWN]
        ),
    }
    return (conflict, right, differ, swaps, shown["pumped"]), shown


def _disagreeing(questions: Questions, candidate: Candidate, words: Sequence[Word]) -> list[Word]:
    askable = [word for word in words if questions.is_valid(word)]
    said = [questions.output(number) for number in questions.ask(askable)]
    return [w for w, output in zip(askable, said, strict=True) if output != candidate.machine.output(w)]


def _shown(questions: Questions, candidate: Candidate, words: Sequence[Word]) -> list[dict[str, Any]]:
    """Return the shortest counterexamples as names, with the outputs of model and machine."""
    shortest = sorted(set(words), key=lambda word: (len(word), word))[:_SHOWN]
    said = [questions.output(number) for number in questions.ask(shortest)]
    return [
        {
            "word": _text(questions, word),
            "letters": len(word),
            "model": str(a),
            "machine": str(candidate.machine.output(word)),
        }
        for word, a in zip(shortest, said, strict=True)
    ]


def _text(questions: Questions, word: Word) -> str:
    """Write a word as text, with repeated letters as powers."""
    names = questions.names(word)
    parts: list[list[Any]] = []
    for name in names:
        if parts and parts[-1][0] == name:
            parts[-1][1] += 1
        else:
            parts.append([name, 1])
    return " ".join(name if count == 1 else f"{name}^{count}" for name, count in parts)


def _nulls(
    questions: Questions, candidate: Candidate, pairs: int, horizon: int, rng: np.random.Generator
) -> dict[str, Any]:
    own = by_state(questions, candidate, 2 * pairs, horizon, rng)
    measured = {"shuffled_labels": null.shuffled_labels(questions, candidate, own.words, rng)}
    if isinstance(questions, ModelQuestions):
        measured["random_nodes"] = null.random_nodes(questions, candidate, own.words, rng)
    return measured
