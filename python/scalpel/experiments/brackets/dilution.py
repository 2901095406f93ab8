"""Does filler in a longer list dilute the evidence, and does the length at which the answer fails grow as k/θ?

Predicted: critical lengths for held-out amounts of evidence k, by several laws and stored before those lengths are
measured. Laws are calibrated in three ways: by the critical lengths of two small amounts, by the critical length of
one of them, and by intervention at short contexts only.
Measured: the length n₅₀(k) at which P(correct) falls through one half at depth 2, on other prompts.
Null: two rival laws, a constant length and one that is affine in k; the untrained model and the shipped twins; random
directions in place of the attention head's own; and each amount judged by the prediction for another.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.refused import Refused
from ..controls import LEAST_ACCURACY, Controls
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, caution, longest_asked, model_provenance
from ..result import Protocol, Result, Verdict
from . import critical as c
from . import dilution_laws as d
from . import head_measures
from .calibration import BracketLaw, ShortContexts
from .calibration import calibrate as read_short
from .laws import CLASSES

QUESTION = "At which context length does the bracket answer fail, and does that length grow as k/θ?"
SEED_FIGURE = "n* = ⌈k/θ⌉ = 14 for k = 2, θ = 0.15"
SEED_LENGTH, SEED_K = 14, 2
# The laws that are drawn: of the ten, those whose lines a reader can tell apart. The table has all of them.
_SHOWN = ("seed", "affine", "constant", "weighted, one length", "weighted, intervention", "sink, one length")
RULE = (
    "Reproduced iff the seed's law, fitted to the calibration amounts, predicts every held-out critical length within "
    "one element (2 tokens) or one standard error of the difference, whichever is larger, and a constant length does "
    "not. Indistinguishable if the constant predicts them too. The affine rival contains the seed's law (intercept 0) "
    "and so succeeds wherever that succeeds; it is informative only where the law fails. Not testable if at no length "
    "the model tells the two depths apart with the required accuracy, if a calibration amount has no critical length "
    "inside the context, or if fewer than two of the held-out amounts have one. A curve that hovers at one half, or "
    "comes back above it, has no critical length."
)


def run(
    model: CircuitGPT,
    *,
    calibrate: Sequence[int] = (2, 3),
    predict: Sequence[int] = (4, 5, 6),
    prompts: int = 64,
    offsets: int = 64,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    controls: Controls | None = None,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """Compare the critical lengths n₅₀(k) of a model at depth 2 with those that the laws predict.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        calibrate: Amounts of evidence to which the laws are fitted, two or more.
        predict: Held-out amounts of evidence, two or more, distinct from ``calibrate``.
        prompts: Lists asked for each amount; they vary in filler, in the text before the list and in first position.
        offsets: Positions of the context left free, so that lists can start at different positions.
        seed: Seed of the prompts and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".
        controls: Models to compare with; by default the untrained model and the twins shipped with this one.
        nulls: "untrained" is one of the controls; "rotated" puts random directions in place of the head's own;
            "shuffled" gives each amount the prediction for another.

    Returns:
        A Result; ``measured["laws"]`` holds each law's errors in tokens.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or its context is too short.
        ValueError: An option is out of range, or the amounts are too few or repeated.
    """
    nulls = check_nulls(nulls)
    at_least(2, prompts=prompts)
    at_least(0, seed=seed)
    length = longest_asked(model, offsets, least_accuracy)
    amounts = (*calibrate, *predict)
    if len(calibrate) < 2 or len(predict) < 2 or len(set(amounts)) < len(amounts):
        raise ValueError(
            f"calibrate is {tuple(calibrate)} and predict is {tuple(predict)}; give two or more amounts "
            "each, all distinct"
        )
    controls = controls or Controls.of(model)
    rng = np.random.default_rng([seed, 1])
    options = {"calibrate": calibrate, "predict": predict, "prompts": prompts, "offsets": offsets, "seed": seed}
    provenance = model_provenance(model, least_accuracy=least_accuracy, **options)
    protocol = Protocol("dilution", QUESTION, SEED_FIGURE, provenance)

    def ask(asked_model: CircuitGPT, k: int, depth: int = 2, salt: int = 0) -> c.Curve:
        return c.ask_long_lists(asked_model, k, depth=depth, prompts=prompts, length=length, seed=1000 * seed + salt)

    fitted = {k: c.critical(ask(model, k, salt=1), rng) for k in calibrate}
    short, left_out = _short_contexts(model, amounts, seed)
    laws = d.predictions(fitted, short, amounts, rng)
    protocol.predict(
        {
            "summary": _predicted_words(laws, predict),
            "calibration": c.table(fitted),
            "critical_length": {name: law.lengths for name, law in laws.items()},
            "standard_error": {name: law.errors for name, law in laws.items()},
            "head": _head_found(short),
            "rule": RULE,
            "mean_rule": head_measures.MEAN_RULE,
        }
    )
    protocol.measuring()
    curves = {k: ask(model, k) for k in amounts}
    measured = {k: c.critical(curve, rng) for k, curve in curves.items()}
    flat = ask(model, 1, depth=1)
    able = c.tells_depths(curves, flat)
    scores = d.compare(laws, measured, predict)
    holds = {name: bool(score["holds"]) for name, score in scores.items()}
    best_law = d.best(scores)
    head = _head_measured(model, short, measured, length, seed)
    # P(correct) over all prompts may have a critical length although the answer wavers along single prompts, so the
    # summary states how often it changes.
    changes = " to ".join(
        f"{extreme(length_50.sign_changes for length_50 in measured.values()):.0f}" for extreme in (min, max)
    )
    null: dict[str, Any] = {
        name: _null(other, ask, amounts, rng)
        for name, other in controls.models.items()
        if name != "untrained" or "untrained" in nulls
    }
    if "rotated" in nulls and short is not None and "weighted, one length" in laws:
        errors = d.rotated_errors(model, short, fitted, measured, predict, seed)
        words = (
            f"weighted law with random directions off by {np.median(errors):.0f} tokens (median of "
            f"{len(errors)}; {min(errors):.0f} at the least)"
            if errors
            else "–"
        )
        null["rotated"] = {"words": words, "mean_absolute_errors": errors}
    if "shuffled" in nulls and best_law is not None:
        error = d.shuffled_error(laws[best_law], measured, predict)
        null["shuffled"] = {
            "words": f"{best_law} law, with the predictions exchanged between amounts, off by {error:.0f} tokens",
            "mean_absolute_error": error,
        }
    edges = c.bins(length)
    crossing = any(length_50.status == "crosses" for length_50 in measured.values())
    return protocol.conclude(
        measured={
            "summary": "; ".join(f"k={k}: {length_50.text()}" for k, length_50 in measured.items())
            + f". Along one prompt the answer changes {changes} times. "
            + best_words(best_law, scores, laws, measured, predict)
            + head.pop("words", ""),
            "against_the_seeds_figure": against_seed(measured.get(SEED_K)),
            "critical_length": c.table(measured),
            "laws": scores,
            "best_law": best_law,
            "law_holds": holds,
            "head": head,
            "left_out": left_out,
            "best_balanced_accuracy_at_one_length": able,
            "depth_1_accuracy_at_any_length": float(flat.right.mean()),
            "caution": caution(model),
        },
        interval={"summary": "95 % bootstrap by prompt", **c.bounds(measured)},
        null={
            "summary": "; ".join(f"{name}: {of_null['words']}" for name, of_null in null.items()),
            **null,
        },
        verdict=verdict(measured, predict, holds, able >= least_accuracy),
        figures={
            "curves": {
                "kind": "curves",
                "title": "P(correct) at depth 2 by length of the context, for each amount of evidence",
                "xlabel": "attended keys n (tokens)",
                "ylabel": "P(correct)",
                "series": [
                    *(c.series(f"k = {k}", curve, edges) for k, curve in curves.items()),
                    c.series("depth 1", flat, edges, style="dashed"),
                ],
                "hlines": [{"y": 0.5, "label": "one half"}],
                "summary": caution(model),
            },
            **({"laws": _law_figure(measured, laws, calibrate)} if crossing else {}),
            **({"head": head_measures.statistic_figure(short.head.name, head["along"], short.theta)} if short else {}),
        },
    )


def _short_contexts(model: CircuitGPT, amounts: Sequence[int], seed: int) -> tuple[ShortContexts | None, list[str]]:
    """What the head does at short contexts, or the reason why nothing could be read."""
    try:
        return read_short(model, amounts, seed=seed), []
    except Refused as error:
        return None, [f"The laws that rest on a head's measurements were left out: {error}"]


def _head_found(short: ShortContexts | None) -> dict[str, Any]:
    """What short contexts tell of the head, for the prediction."""
    if short is None:
        return {}
    law = short.law()
    half = len(short.thetas) // 2
    return {
        "head": short.head.name,
        "share_of_the_depths_difference": short.head.share,
        "shares": short.head.shares,
        "theta": short.theta,
        "theta_by_depth": {2: float(np.nanmedian(short.thetas[:half])), 1: float(np.nanmedian(short.thetas[half:]))},
        "theta_quartiles": [float(v) for v in np.nanpercentile(short.thetas, [25, 75])],
        "prompts_without_theta": int(np.isnan(short.thetas).sum()),
        "weight_by_class": dict(zip(CLASSES, law.weight.tolist(), strict=True)),
        "u_by_class": dict(zip(CLASSES, law.u.tolist(), strict=True)),
        "sigma_tokens": float(short.sigma.mean()),
    }


def _head_measured(
    model: CircuitGPT, short: ShortContexts | None, measured: dict[int, c.Critical], length: int, seed: int
) -> dict[str, Any]:
    """What the head measures along long contexts. It is run after the predictions are stored."""
    if short is None:
        return {}
    along = {k: head_measures.measure(model, short.head, k, length, prompts=16, seed=seed) for k in measured}
    first_amount = next(iter(along))
    verdict = head_measures.is_mean(along[first_amount])
    crossings = {k: head_measures.crossing(measures, short.theta) for k, measures in along.items()}
    words = (
        f" Head {short.head.name} carries {short.head.share:.0%} of the difference between the depths; "
        "what it measures is "
        + ("a mean" if verdict["mean"] else "not a mean (" + ", ".join(verdict.get("fails_by", [])) + ")")
    )
    return {"words": words, "is_mean": verdict, "statistic_crosses_theta_at": crossings, "along": along}


def best_words(
    name: str | None,
    scores: dict[str, dict[str, Any]],
    laws: dict[str, BracketLaw],
    measured: dict[int, c.Critical],
    predict: Sequence[int],
) -> str:
    """How the best law fares on the held-out amounts, as a sentence."""
    if name is None:
        return "No law predicts when these fail."
    score = scores[name]
    by_amount = ", ".join(
        f"k={k} {laws[name].lengths[k]:.0f} ({'within' if score['good_enough'][k] else 'off'})" for k in predict
    )
    return (
        f"Best law on held-out amounts: {name}, off by {score['mean_absolute_error']:.0f} tokens on average "
        f"({by_amount}; {'all' if score['holds'] else 'not all'} within one element or one standard error)."
    )


def against_seed(measured: c.Critical | None) -> str:
    """Whether the measurement agrees with the seed's figure. It is shown and enters no verdict."""
    if measured is None:
        return f"k = {SEED_K} was not measured"
    if measured.status == "crosses" and measured.low <= SEED_LENGTH <= measured.high:
        return f"agrees: {SEED_LENGTH} lies in {measured.text()}"
    return f"disagrees: the seed says {SEED_LENGTH} at k = {SEED_K}, here it is {measured.text()}"


def verdict(measured: dict[int, c.Critical], predict: Sequence[int], holds: dict[str, bool], able: bool) -> Verdict:
    """The verdict that RULE gives."""
    if not able or "seed" not in holds or sum(measured[k].status == "crosses" for k in predict) < 2:
        return "not testable here"
    if not holds["seed"]:
        return "not reproduced"
    return "indistinguishable" if holds["constant"] else "reproduced"


def _null(other: CircuitGPT, ask: Any, amounts: Sequence[int], rng: np.random.Generator) -> dict[str, Any]:
    """Critical lengths of a control, and whether it tells the depths apart: a model that can't has no such lengths."""
    curves = {k: ask(other, k) for k in amounts}
    lengths = {k: c.critical(curve, rng) for k, curve in curves.items()}
    flat = ask(other, 1, depth=1)
    able = c.tells_depths(curves, flat)
    words = f"best balanced accuracy {able:.2f}"
    if able >= LEAST_ACCURACY:
        words = ", ".join(f"k={k}: {length.text()}" for k, length in lengths.items())
    return {
        "words": words,
        "best_balanced_accuracy_at_one_length": able,
        "depth_1_accuracy_at_any_length": float(flat.right.mean()),
        "critical_length": c.table(lengths),
    }


def _predicted_words(laws: dict[str, BracketLaw], predict: Sequence[int]) -> str:
    if not laws:
        return "none: a calibration amount has no critical length in the context"
    by_law = (f"{name} " + "/".join(_tokens(law.lengths[k]) for k in predict) for name, law in laws.items())
    return f"n* at k={'/'.join(map(str, predict))}: " + ", ".join(by_law)


def _tokens(n: float) -> str:
    return "–" if np.isnan(n) else "never" if np.isinf(n) else f"{n:.0f}"


def _law_figure(
    measured: dict[int, c.Critical], laws: dict[str, BracketLaw], calibrate: Sequence[int]
) -> dict[str, Any]:
    crossing = {k: length for k, length in measured.items() if length.status == "crosses"}
    amounts = sorted(measured)
    points = [
        {
            "label": "calibration" if is_calibration else "held out",
            "style": "points",
            "x": [k for k in crossing if (k in calibrate) == is_calibration],
            "y": [crossing[k].value for k in crossing if (k in calibrate) == is_calibration],
            "low": [crossing[k].low for k in crossing if (k in calibrate) == is_calibration],
            "high": [crossing[k].high for k in crossing if (k in calibrate) == is_calibration],
        }
        for is_calibration in (True, False)
    ]
    # A law that predicts "never", or a length far beyond what was asked, would press the points together.
    most = 2 * max([length.value for length in measured.values() if np.isfinite(length.value)], default=1.0)
    lines = [
        {
            "label": name,
            "style": "line" if name in ("seed", "weighted, one length") else "dashed",
            "x": amounts,
            "y": [n if n is not None and n <= most else None for n in (law.lengths.get(k) for k in amounts)],
        }
        for name, law in laws.items()
        if name in _SHOWN and any(np.isfinite(n) and n <= most for n in law.lengths.values())
    ]
    return {
        "kind": "curves",
        "title": "Critical length against evidence: measured, and as each law predicts it",
        "xlabel": "evidence k (brackets in front of the question)",
        "ylabel": "critical length n₅₀ (tokens)",
        "series": [*lines, *points],
    }
