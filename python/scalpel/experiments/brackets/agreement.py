"""Does the seed's simulator answer as the model does, over the whole plane of evidence k and context length n?

Predicted: θ is fitted to one amount of evidence. The simulator's answer for every other cell of the plane is stored
before the model is asked there.
Measured: the share of held-out cells in which the model's majority answer, on other prompts, is the predicted one.
Null: a constant critical length, that is, a simulator that ignores k; the untrained model and the shipped twins; and
each row of the plane judged by another row's simulator.

The sink law and the weighted law, which know what the attention head attends to, are judged in the same way and shown
beside the simulator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...semigroup import ThresholdCounter
from ...tasks.refused import Refused
from ..controls import LEAST_ACCURACY, Controls
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, caution, longest_asked, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import percentile_interval
from . import critical as c
from .calibration import ShortContexts
from .calibration import calibrate as read_short

QUESTION = "Does the seed's simulator 1[k/n > θ] answer as the model does, cell by cell of the (k, n) plane?"
SEED_FIGURE = "30 lines reproduce the model: “perfect alignment”"
GOOD = 0.95
RULE = (
    f"Reproduced iff the 95 % interval of the agreement on held-out cells lies above {GOOD} and the interval of its "
    "lead over a constant critical length lies above 0. Not reproduced if either interval lies wholly below its bound; "
    "indistinguishable otherwise. Not testable if at no length the model tells the two depths apart with the required "
    "accuracy, if the calibration amount has no critical length inside the context, or if the model fails in none or "
    "in all of the held-out cells."
)


def run(
    model: CircuitGPT,
    *,
    calibrate: int = 2,
    amounts: Sequence[int] = (2, 3, 4, 5, 6),
    prompts: int = 64,
    offsets: int = 64,
    width: int = 16,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    controls: Controls | None = None,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """Measure how often the simulator and the model agree on held-out cells (k ≠ ``calibrate``) of the (k, n) plane.

    A cell's answer is the model's majority over prompts. The balanced agreement is given too: the mean over the cells
    that the model answers right and those that it answers wrong. Where a model never fails, a simulator that never
    fails agrees everywhere and shows nothing. A sink of a few tokens is smaller than a cell; the experiment
    ``dilution`` measures it more finely.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        calibrate: The amount of evidence k to which θ is fitted.
        amounts: Distinct amounts of evidence; two or more besides ``calibrate``.
        prompts: Lists asked for each amount.
        offsets: Positions of the context left free, so that lists can start at different positions.
        width: Tokens in a bin of context length.
        seed: Seed of the prompts and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".
        controls: Models to compare with; by default the untrained model and the twins shipped with this one.
        nulls: "untrained" is one of the controls; "shuffled" judges each row of the plane by another row's simulator;
            "rotated" has no meaning here and is named among what was left out.

    Returns:
        A Result; its figure "map" shows the plane.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or its context is too short.
        ValueError: An option is out of range, or the amounts are too few or repeated.
    """
    nulls = check_nulls(nulls)
    at_least(2, prompts=prompts)
    at_least(0, seed=seed)
    length = longest_asked(model, offsets, least_accuracy)
    if not 1 <= width <= length // 2:
        raise ValueError(
            f"option 'width' is {width}; the lists have {length} tokens, so a bin has a width of 1 to {length // 2}"
        )
    held = [k for k in amounts if k != calibrate]
    if len(held) < 2 or len(set(amounts)) < len(amounts):
        raise ValueError(
            f"amounts are {tuple(amounts)}; give distinct ones, two or more of them besides the calibration's "
            f"{calibrate}"
        )
    controls = controls or Controls.of(model)
    rng = np.random.default_rng([seed, 2])
    edges = c.bins(length, width)
    options = {"calibrate": calibrate, "amounts": amounts, "prompts": prompts, "offsets": offsets, "width": width}
    provenance = model_provenance(model, least_accuracy=least_accuracy, seed=seed, **options)
    protocol = Protocol("agreement", QUESTION, SEED_FIGURE, provenance)

    def ask(asked_model: CircuitGPT, k: int, salt: int, depth: int = 2) -> c.Curve:
        return c.ask_long_lists(asked_model, k, depth=depth, prompts=prompts, length=length, seed=1000 * seed + salt)

    fitted = c.critical(ask(model, calibrate, 2), rng)
    # Without a critical length of the calibration amount there is no θ. The longest length asked then stands in for
    # it, so that the plane can still be shown; the verdict is "not testable here".
    critical_length = fitted.value if fitted.status == "crosses" else float(length)
    counter = ThresholdCounter(calibrate / critical_length)
    short, left_out = _short_contexts(model, amounts, seed)
    if "rotated" in nulls:
        left_out.append("agreement: the rotated null was left out, since the simulator has no direction to rotate")
    middles = (edges[:-1] + edges[1:]) / 2

    def lengths_by(critical_length: float) -> dict[str, dict[int, float]]:
        """Each law's n*(k), its one parameter taken from the critical length of the calibration amount."""
        lengths = {
            "simulator": {k: k * critical_length / calibrate for k in amounts},
            "constant": dict.fromkeys(amounts, critical_length),
        }
        if short is not None:
            lengths |= {name: short.from_length(calibrate, critical_length)[name] for name in ("sink", "weighted")}
        return lengths

    law_lengths = lengths_by(critical_length)
    silent = [name for name, lengths in law_lengths.items() if np.isnan(list(lengths.values())).any()]
    left_out += [
        f"agreement: the {name} law was left out, since it predicts no length for some of these amounts"
        for name in silent
    ]
    for name in silent:
        del law_lengths[name]

    def rules(critical_length: float) -> dict[str, dict[int, np.ndarray]]:
        """Whether each law predicts a right answer, for each amount of evidence and bin."""
        return {
            name: {k: middles < n for k, n in lengths.items()}
            for name, lengths in lengths_by(critical_length).items()
            if name in law_lengths
        }

    predicted_right = rules(critical_length)
    simulated, constant = predicted_right["simulator"], predicted_right["constant"]
    protocol.predict(
        {
            "summary": f"θ = {float(counter.theta):.4f} from k={calibrate}: n* = "
            + ", ".join(f"{counter.critical_length(k)} (k={k})" for k in held),
            "theta": float(counter.theta),
            "calibration": c.table({calibrate: fitted}),
            "simulated_right": simulated,
            "critical_length": law_lengths,
            "rule": RULE,
        }
    )
    protocol.measuring()
    curves = {k: ask(model, k, 3) for k in amounts}
    flat = ask(model, 1, 3, depth=1)
    able = c.tells_depths(curves, flat)
    p_correct = {k: curve.binned(edges) for k, curve in curves.items()}
    measured_lengths = {k: c.critical(curve, rng) for k, curve in curves.items()}
    score = agreement(curves, held, edges, simulated)
    rival = agreement(curves, held, edges, constant)
    by_law = {name: agreement(curves, held, edges, rule) for name, rule in predicted_right.items()}
    lengths = fitted.draws if fitted.status == "crosses" else np.array([critical_length])
    draws = _resampled(curves, held, edges, rules, lengths, rng)
    interval = list(percentile_interval(np.array([d["simulator"]["plain"] for d in draws])))
    lead = [d["simulator"]["plain"] - d["constant"]["plain"] for d in draws]
    lead_interval = list(percentile_interval(np.array(lead)))
    by_law_interval = {
        name: list(percentile_interval(np.array([draw[name]["plain"] for draw in draws]))) for name in predicted_right
    }
    null: dict[str, Any] = {
        "constant": rival,
        "best_constant_chosen_afterwards": max(
            agreement(curves, held, edges, dict.fromkeys(amounts, middles < cut))["plain"] for cut in edges
        ),
        "simulator_minus_constant": lead_interval,
    }
    if "shuffled" in nulls:
        null["shuffled_evidence"] = _shuffled(curves, held, edges, simulated)
    others = {name: other for name, other in controls.models.items() if name != "untrained" or "untrained" in nulls}
    for name, other in others.items():
        theirs = {k: ask(other, k, 3) for k in held}
        null[name] = agreement(theirs, held, edges, simulated)
    verdict = _verdict(fitted, score, interval, lead_interval, able >= least_accuracy)
    return protocol.conclude(
        measured={
            "summary": f"agreement {score['plain']:.3f} on {score['cells']} held-out cells "
            f"(balanced {_number(score['balanced'])})"
            + "".join(f"; {name} law {by_law[name]['plain']:.3f}" for name in by_law if name in ("sink", "weighted")),
            "against_the_seeds_figure": f"the seed says “perfect”; here {score['plain']:.3f}",
            "agreement": score,
            "agreement_by_law": by_law,
            "left_out": left_out,
            "model_right": p_correct,
            "critical_length": c.table(measured_lengths),
            "best_balanced_accuracy_at_one_length": able,
        },
        interval={
            "summary": f"[{interval[0]:.3f}, {interval[1]:.3f}]",
            "agreement": interval,
            "by_law": by_law_interval,
        },
        null={
            "summary": f"constant n*: {rival['plain']:.3f} (simulator − constant in [{lead_interval[0]:.3f}, "
            f"{lead_interval[1]:.3f}]); best constant chosen afterwards: {null['best_constant_chosen_afterwards']:.3f}"
            + (f"; with another row's simulator: {null['shuffled_evidence']:.3f}" if "shuffled" in nulls else "")
            + "".join(f"; {name}: {null[name]['plain']:.3f}" for name in others),
            **null,
        },
        verdict=verdict,
        figures={
            "map": {
                "kind": "map",
                "title": "The (k, n) plane: P(correct) of the model, and where the simulator says it fails",
                "xlabel": "attended keys n (tokens)",
                "ylabel": "evidence k",
                "x_edges": edges,
                "y": [str(k) for k in amounts],
                "values": [p_correct[k] for k in amounts],
                "summary": caution(model),
                "overlays": [
                    {"label": "simulator", "x": [counter.critical_length(k) for k in amounts], "style": "line"},
                    {"label": "constant", "x": [critical_length for _ in amounts], "style": "dashed"},
                    *(
                        {"label": "weighted law", "x": list(law_lengths["weighted"].values()), "style": "dashed"}
                        for _ in range("weighted" in law_lengths)
                    ),
                    {
                        "label": "measured n₅₀",
                        "x": [
                            measured_lengths[k].value if measured_lengths[k].status == "crosses" else None
                            for k in amounts
                        ],
                        "style": "points",
                    },
                ],
            }
        },
    )


def _short_contexts(model: CircuitGPT, amounts: Sequence[int], seed: int) -> tuple[ShortContexts | None, list[str]]:
    """What the head does at short contexts, or the reason why nothing could be read."""
    try:
        return read_short(model, amounts, seed=seed, thetas=False), []
    except Refused as error:
        return None, [f"agreement: the laws that rest on a head's measurements were left out: {error}"]


def agreement(
    curves: dict[int, c.Curve], held: Sequence[int], edges: np.ndarray, predicted_right: dict[int, np.ndarray]
) -> dict[str, Any]:
    """Share of held-out cells in which a law's answer is the model's majority answer.

    ``predicted_right``: whether the law predicts a right answer, bool (bins,) by amount of evidence.
    """
    p = np.concatenate([curves[k].binned(edges) for k in held])
    simulated = np.concatenate([predicted_right[k] for k in held])
    asked = ~np.isnan(p)
    right, same = p[asked] > 0.5, (p[asked] > 0.5) == simulated[asked]
    balanced = (same[right].mean() + same[~right].mean()) / 2 if right.any() and not right.all() else float("nan")
    return {"plain": float(same.mean()), "balanced": float(balanced), "cells": int(asked.sum())}


def _resampled(
    curves: dict[int, c.Curve],
    held: Sequence[int],
    edges: np.ndarray,
    rules: Callable[[float], dict[str, dict[int, np.ndarray]]],
    lengths: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 200,
) -> list[dict[str, dict[str, Any]]]:
    """Agreement of each rule over resampled prompts and, so that its error is in, resampled calibrations."""
    draws = []
    for _ in range(resamples):
        part = {k: curves[k].sample(rng.integers(len(curves[k].right), size=len(curves[k].right))) for k in held}
        predicted_right = rules(float(rng.choice(lengths)))
        draws.append({name: agreement(part, held, edges, rule) for name, rule in predicted_right.items()})
    return draws


def _shuffled(
    curves: dict[int, c.Curve], held: Sequence[int], edges: np.ndarray, predicted_right: dict[int, np.ndarray]
) -> float:
    """Mean agreement when each row of the plane is judged by another row's simulator, over all cyclic shifts but 0."""
    scores = []
    for shift in range(1, len(held)):
        other = {k: predicted_right[held[(i + shift) % len(held)]] for i, k in enumerate(held)}
        scores.append(agreement(curves, held, edges, other)["plain"])
    return float(np.mean(scores))


def _verdict(
    fitted: c.Critical, score: dict[str, Any], interval: list[float], lead: list[float], able: bool
) -> Verdict:
    """The verdict that RULE gives."""
    if not able or fitted.status != "crosses" or np.isnan(score["balanced"]):
        return "not testable here"
    if interval[1] < GOOD or lead[1] < 0:
        return "not reproduced"
    return "reproduced" if interval[0] > GOOD and lead[0] > 0 else "indistinguishable"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
