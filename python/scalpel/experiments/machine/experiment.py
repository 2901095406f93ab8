"""Do tokens act on the model like the letters of a finite machine, and where does that end?

Predicted: for a bracket model, words of elements and rows look like a machine of three states as long as every word is
shorter than the measured critical length; beyond it that machine has to break, since a mean over the context is no
finite machine. For a model that was trained on a machine: it is that machine.
Measured: the machine extracted from short words and the one from long words, with the conflict, fidelity and congruence
of each on new words.
Null: an untrained model; classes read off random nodes; and shuffled class labels. The shipped models of a mod-3
counter, a flip-flop and parity are positive controls, which show that the method finds machines where there are some.
"""

from typing import Any

import numpy as np

from ...models.circuitgpt.checkpoint import shipped_models
from ...models.circuitgpt.model import CircuitGPT
from ...semigroup.extraction.extract import extract
from ...semigroup.extraction.questions import ModelQuestions
from ...semigroup.extraction.result import Extraction
from ...semigroup.machine import MooreMachine
from ...semigroup.threshold import ThresholdCounter
from ...tasks.bracket_words import BRACKET_WORDS
from ...tasks.brackets import closers
from ...tasks.refused import Refused
from ..brackets import critical as c
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, model_provenance
from ..result import Protocol, Result, Verdict
from .figures import figures

QUESTION = "Do tokens act like the letters of a finite machine, and where does that end?"
SEED_FIGURE = "reasoning is an orbit of a semigroup of tokens; no figure is given"
RULE = (
    "An extraction is finite iff the number of classes is the same for prefixes of N, 2N and 4N letters and, on new "
    "words, the bounds of conflict, fidelity and congruence hold in every cell, as do the shares of swapped caches and "
    "of words that repeat a piece. Reproduced iff the short and the long extraction come out as predicted. If every "
    "word asked is shorter than the measured critical length, that is finite. If words reach beyond it, that is a "
    "counter, or a refusal with counterexamples and a conflict whose lower bound exceeds the limit; a refusal for lack "
    "of words proves nothing. Not testable if the model gives the same answer to every word. For a model that was "
    "trained on a machine, the prediction is finite and that machine."
)
SHOWN = 0.02  # a machine is said to break if the lower bound of its conflict exceeds this share
POSITIVE = ("mod3-mini", "flip-flop-mini", "parity-mini")


def run(
    model: CircuitGPT,
    *,
    short: int = 3,
    long: int = 12,
    prefixes: int = 128,
    pairs: int = 160,
    positive: int = 112,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """Extract a machine from short words and one from long words, beside the nulls and the positive controls.

    For a model that was trained on a machine, a single extraction is compared with that machine.

    Args:
        model: A CircuitGPT with a tokenizer that holds the answers as single tokens, or one that was trained on a
            machine.
        short: N of the short extraction, which asks words of up to 8N letters.
        long: N of the long extraction; at most what the context holds.
        prefixes: Prefixes that are told apart, as ``semigroup.extract`` takes them.
        pairs: Pairs of new words for each cell, as ``semigroup.extract`` takes them.
        positive: Pairs for each cell with the shipped models of machines; 0 leaves these out.
        nulls: "untrained" extracts from an untrained model; "rotated" reads the classes off random nodes; "shuffled"
            shuffles their labels.
        seed: Seed of the words and of the nulls.

    Returns:
        A Result; ``measured["congruence_failures"]`` lists the prompts at which the machine breaks.

    Raises:
        Refused: The model has no tokenizer, or its tokenizer splits an answer.
        ValueError: An option is out of range, or a null is unknown.
    """
    nulls = check_nulls(nulls)
    at_least(1, short=short, long=long)
    at_least(0, positive=positive, seed=seed)
    options = {"short": short, "long": long, "prefixes": prefixes, "pairs": pairs, "positive": positive, "seed": seed}
    protocol = Protocol("machine", QUESTION, SEED_FIGURE, model_provenance(model, **options))
    if "machine" in model.card:
        return _of_a_machine(model, protocol, prefixes, pairs, nulls, seed)
    return _of_brackets(model, protocol, (short, long), prefixes, pairs, positive, nulls, seed)


def _of_brackets(
    model: CircuitGPT,
    protocol: Protocol,
    horizons: tuple[int, int],
    prefixes: int,
    pairs: int,
    positive: int,
    nulls: tuple[str, ...],
    seed: int,
) -> Result:
    questions = _questions(model)
    rng = np.random.default_rng([seed, 9])
    length = model.config.block_size - 64
    horizons = (horizons[0], min(horizons[1], questions.longest() // 8))
    if length < 64 or horizons[1] <= horizons[0]:
        return _not_testable(protocol, f"a context of {model.config.block_size} tokens is too short for long words")
    critical = c.critical(c.ask_long_lists(model, 2, prompts=32, length=length, seed=1000 * seed + 9), rng)
    longest = [_longest_tokens(questions, 8 * horizon) for horizon in horizons]
    crosses = critical.status == "crosses"
    finite = [not crosses or tokens < critical.value for tokens in longest]
    words = [
        f"words of up to {tokens} tokens {'finite' if is_finite else 'not finite'}"
        for tokens, is_finite in zip(longest, finite, strict=True)
    ]
    protocol.predict(
        {
            "summary": f"critical length {critical.text()} tokens (k = 2): {', '.join(words)}",
            "critical_length": c.table({2: critical}),
            "longest_words_tokens": longest,
            "finite": finite,
            "rule": RULE,
        }
    )
    protocol.measuring()
    short, long = (
        _extract(model, horizon, prefixes, pairs, seed, nulls=bool(nulls) and horizon == horizons[0])
        for horizon in horizons
    )
    failures = _failures(questions, short, long)
    controls = {name: _positive(name, positive, seed) for name in POSITIVE if positive and name in shipped_models()}
    machine = short.machine or short.candidate
    counter = _counter(seed)
    shown = {"short words": short, "long words": long, "the seed's counter": counter}
    pictures, left_out = figures(machine, shown)
    return protocol.conclude(
        measured={
            "summary": f"{_brief('short', short)}; {_brief('long', long)}",
            "short": short.to_dict(),
            "long": long.to_dict(),
            "congruence_failures": failures,
            "models_of_machines": controls,
            "the_seeds_counter": {"verdict": counter.verdict, "classes": [level.classes for level in counter.growth]},
            **({"left_out": left_out} if left_out else {}),
        },
        interval={"summary": "bounds hold in all cells at once with 95 % confidence (Clopper-Pearson, Bonferroni)"},
        null=_null(short.nulls, controls, nulls),
        verdict=_verdict(short, long, finite),
        figures=pictures,
    )


def _of_a_machine(
    model: CircuitGPT, protocol: Protocol, prefixes: int, pairs: int, nulls: tuple[str, ...], seed: int
) -> Result:
    trained_on = machine_of(model)
    protocol.predict(
        {
            "summary": f"finite, and {model.card['machine'].get('known_as', 'the machine it was trained on')}",
            "machine": trained_on.to_dict(),
            "rule": RULE,
        }
    )
    protocol.measuring()
    extraction = _extract_trained(model, prefixes, pairs, seed, nulls=bool(nulls))
    same = extraction.machine is not None and extraction.machine.equivalent(trained_on)
    pictures, left_out = figures(extraction.machine or extraction.candidate, {"words": extraction})
    return protocol.conclude(
        measured={
            "summary": f"{extraction.summary()}; {'the' if same else 'not the'} machine that it was trained on",
            "extraction": extraction.to_dict(),
            **({"left_out": left_out} if left_out else {}),
        },
        interval={"summary": "bounds hold in all cells at once with 95 % confidence (Clopper-Pearson, Bonferroni)"},
        null=_null(extraction.nulls, {}, nulls),
        verdict="reproduced" if same else "not reproduced",
        figures=pictures,
    )


def _brief(name: str, extraction: Extraction) -> str:
    figures = []
    if extraction.conflict is not None and extraction.fidelity is not None:
        figures = [
            f"conflict {extraction.conflict.value:.1%}, at most {extraction.conflict.worst:.1%} in a cell",
            f"fidelity {extraction.fidelity.value:.1%}",
        ]
    states = "" if extraction.machine is None else f" with {extraction.growth[-1].classes} states"
    return f"{name} words {extraction.verdict}{states}" + (f" ({', '.join(figures)})" if figures else "")


def _counter(seed: int) -> Extraction:
    """What an extraction makes of a mean: that of the seed's own law as a function of words, to compare with."""
    law = ThresholdCounter("0.15")
    return extract(
        lambda words: [law.decide(word.count("["), len(word)) for word in words],
        ["[", "x"],
        horizon=5,
        prefixes=128,
        pairs=32,
        nulls=False,
        seed=seed,
    )


def machine_of(model: CircuitGPT) -> MooreMachine:
    """The machine on which a model was trained, from its card."""
    described = model.card["machine"]
    return MooreMachine(
        tuple(described["letters"]),
        tuple(map(tuple, described["transitions"])),
        tuple(described["outputs"]),
        described["start"],
    )


def _questions(model: CircuitGPT) -> ModelQuestions:
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; bracket words are text. Set model.tokenizer")
    closers(model.tokenizer)  # refuses a tokenizer that splits the answers
    words = BRACKET_WORDS
    return ModelQuestions(
        model, words.alphabet, words.answers, prefix=words.prefix, suffix=words.suffix, valid=words.valid
    )


def _longest_tokens(questions: ModelQuestions, letters: int) -> int:
    """About how many tokens the longest valid word of ``letters`` letters has: empty rows only, or elements only."""
    x, opened, closed = range(3)
    return max(len(questions.ids((x,) * letters)), len(questions.ids((opened, closed) * (letters // 2))))


def _extract(model: CircuitGPT, horizon: int, prefixes: int, pairs: int, seed: int, nulls: bool) -> Extraction:
    words = BRACKET_WORDS
    return extract(
        model,
        words.alphabet,
        words.answers,
        prefix=words.prefix,
        suffix=words.suffix,
        valid=words.valid,
        horizon=horizon,
        prefixes=prefixes,
        pairs=pairs,
        nulls=nulls,
        seed=seed,
    )


def _extract_trained(model: CircuitGPT, prefixes: int, pairs: int, seed: int, nulls: bool) -> Extraction:
    machine = machine_of(model)
    outputs = [str(output) for output in machine.outputs]
    return extract(
        model, machine.letters, list(dict.fromkeys(outputs)), prefixes=prefixes, pairs=pairs, nulls=nulls, seed=seed
    )


def _positive(name: str, pairs: int, seed: int) -> dict[str, Any]:
    """What the extraction gives for a shipped model that was trained on a machine."""
    model = CircuitGPT.from_pretrained(name)
    extraction = _extract_trained(model, 64, pairs, seed, nulls=False)
    trained_on = machine_of(model)
    return {
        "trained_on": model.card["machine"]["known_as"],
        "verdict": extraction.verdict,
        "states": 0 if extraction.machine is None else extraction.machine.states,
        "that_machine": extraction.machine is not None and extraction.machine.equivalent(trained_on),
        "conflict_at_most": None if extraction.conflict is None else extraction.conflict.worst,
        "fidelity": None if extraction.fidelity is None else extraction.fidelity.value,
        "seconds": extraction.seconds,
    }


def _failures(questions: ModelQuestions, short: Extraction, long: Extraction) -> list[dict[str, Any]]:
    """Prompts that the short words' machine puts in one class and that the model answers differently.

    "dilution" adds elements to an open row. "distractors" adds closed rows to a list of depth 1, or unmatched brackets
    in a comment before it. For each, the first length at which the model's answer differs from the machine's is given.
    """
    machine = short.machine or short.candidate
    if machine is None:
        return []
    room = questions.longest()
    x, opened, closed = range(3)
    families = {
        "dilution: elements in an open row": lambda m: (opened,) + (x,) * m,
        "distractors: closed rows at depth 1": lambda m: (opened, closed) * m,
        "elements at depth 1": lambda m: (x,) * m,
    }
    rows = []
    for name, word in families.items():
        sizes = [m for m in range(1, room) if len(word(m)) <= min(room, 8 * long.options["horizon"])]
        answers = questions.ask([word(m) for m in sizes])
        expected = [machine.output(word(m)) for m in sizes]
        wrong = [m for m, a, b in zip(sizes, answers, expected, strict=True) if questions.output(a) != b]
        rows.append(
            {
                "prompts": name,
                "asked_up_to": sizes[-1],
                "first_failure": wrong[0] if wrong else None,
                "failures": len(wrong),
                "the_machine_says": str(expected[0]),
            }
        )
    return [*rows, _comment(questions, machine)]


def _comment(questions: ModelQuestions, machine: MooreMachine) -> dict[str, Any]:
    """From 0 to 16 unmatched brackets in a comment before a list of depth 1 with three elements."""
    tokenizer = questions.model.tokenizer
    assert tokenizer is not None
    start = list(closers(tokenizer).start)
    word = (0, 0, 0)
    wrong = []
    counts = range(17)
    for count in counts:
        comment = tokenizer.encode("# " + "[" * count + " \n")
        ids = [*start, *comment, *questions.ids(word)[len(start) :]]
        if questions.answer(ids) != machine.output(word):
            wrong.append(count)
    novel = " (the comment without any bracket is answered wrong already)" if 0 in wrong else ""
    return {
        "prompts": f"distractors: unmatched brackets in a comment{novel}",
        "asked_up_to": counts[-1],
        "first_failure": wrong[0] if wrong else None,
        "failures": len(wrong),
        "the_machine_says": str(machine.output(word)),
    }


def _null(extraction_nulls: dict[str, Any], controls: dict[str, Any], asked: tuple[str, ...]) -> dict[str, Any]:
    names = {"shuffled_labels": "shuffled", "random_nodes": "rotated", "untrained": "untrained"}
    nulls = {name: value for name, value in extraction_nulls.items() if names.get(name) in asked}
    parts = []
    if "shuffled_labels" in nulls:
        parts.append(f"conflict with shuffled labels {nulls['shuffled_labels']['mean']:.0%}")
    if "random_nodes" in nulls:
        parts.append(f"conflict with classes read off random nodes {nulls['random_nodes']['mean']:.0%}")
    if "untrained" in nulls:
        other = nulls["untrained"]
        parts.append(f"untrained: {other['verdict']}, {'the same' if other['same_machine'] else 'another'} machine")
    if controls:
        exact = sum(control["that_machine"] for control in controls.values())
        parts.append(f"{exact} of {len(controls)} models of known machines come out as their machine")
    return {"summary": "; ".join(parts) or "not measured", **nulls}


def _verdict(short: Extraction, long: Extraction, finite: list[bool]) -> Verdict:
    """The verdict that RULE gives."""
    if short.candidate is None or len(set(map(str, short.candidate.outputs)) - {"not valid"}) < 2:
        return "not testable here"
    as_predicted = [
        extraction.verdict == "finite" if is_finite else _breaks(extraction)
        for extraction, is_finite in zip((short, long), finite, strict=True)
    ]
    return "reproduced" if all(as_predicted) else "not reproduced"


def _breaks(extraction: Extraction) -> bool:
    """Whether trials show that the model leaves the machine. A refusal for lack of words doesn't show that."""
    if extraction.verdict == "counter":
        return True
    lower_bounds = [rate.shown for rate in (extraction.conflict, extraction.congruence) if rate is not None]
    return (
        extraction.verdict == "refused" and max(lower_bounds, default=0.0) > SHOWN and bool(extraction.counterexamples)
    )


def _not_testable(protocol: Protocol, why: str) -> Result:
    protocol.predict({"summary": f"nothing: {why}", "rule": RULE})
    protocol.measuring()
    return protocol.conclude(measured={"summary": why}, interval={}, null={}, verdict="not testable here")
