"""Predictions of the critical lengths by every law and every way to calibrate it, and how far off they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from . import critical as c
from .calibration import BracketLaw, ShortContexts, calibrate, with_errors
from .laws import ELEMENT, OPEN

__all__ = ["compare", "predictions", "rotated_errors", "shuffled_error"]

RESAMPLES = 100
ROTATIONS = 20


def predictions(
    fitted: Mapping[int, c.Critical], short: ShortContexts | None, amounts: Sequence[int], rng: np.random.Generator
) -> dict[str, BracketLaw]:
    """Predict n*(k) by law and calibration, for every amount that the calibration doesn't use.

    "seed", "sink", "constant" and "affine" are fitted to the measured lengths of all calibration amounts. A law named
    "…, one length" takes its one parameter from the first of them. A law named "…, intervention" uses no long context
    at all.

    Args:
        fitted: Critical lengths of the calibration amounts.
        short: What was read at short contexts; None leaves out the laws that need it.
        amounts: All amounts of evidence, those of the calibration included.
        rng: Draws the bootstrap samples.

    Returns:
        The laws by name, each with its lengths in tokens and their standard errors.
    """
    usable = {k: length for k, length in fitted.items() if length.status == "crosses" and len(length.draws) > 1}
    held = [k for k in amounts if k not in fitted]
    laws: dict[str, BracketLaw] = {}
    if len(usable) == len(fitted):
        for name, (law, _) in c.fit_laws({k: length.value for k, length in usable.items()}).items():
            errors = {k: c.predicted_error(name, k, usable) for k in held}
            laws[name] = BracketLaw(name, {k: law(k) for k in held}, errors)
    if short is None:
        return laws
    first = next(iter(fitted))
    samples = [short.sample(rng) for _ in range(RESAMPLES)]
    if first in usable:
        measured, others = usable[first], [k for k in amounts if k != first]
        lengths = rng.choice(measured.draws, size=RESAMPLES)
        drawn = [sample.from_length(first, float(n)) for sample, n in zip(samples, lengths, strict=True)]
        for name, values in short.from_length(first, measured.value).items():
            chosen = {k: values[k] for k in others}
            laws[f"{name}, one length"] = with_errors(f"{name}, one length", chosen, [d[name] for d in drawn])
    drawn = [sample.by_intervention() for sample in samples]
    for name, values in short.by_intervention().items():
        label = f"{name}, intervention"
        laws[label] = with_errors(label, values, [draw[name] for draw in drawn])
    return laws


def compare(
    laws: Mapping[str, BracketLaw], measured: Mapping[int, c.Critical], held: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """How far off each law is on the held-out amounts.

    Returns by law: the errors in tokens; whether each prediction is good enough, as :func:`.critical.within` defines
    it (within one element or one standard error of the difference); and the mean absolute error over the amounts that
    have a critical length. That mean is infinite if the law predicts that one of these amounts never fails.
    """
    table = {}
    for name, law in laws.items():
        crossing = [k for k in held if measured[k].status == "crosses"]
        errors = {k: law.lengths[k] - measured[k].value for k in crossing}
        holds = {k: c.within(law.lengths[k], measured[k], np.nan_to_num(law.errors[k])) for k in held}
        sizes = [float("inf") if np.isnan(e) else abs(e) for e in errors.values()]
        table[name] = {
            "prediction_minus_measured": errors,
            "good_enough": holds,
            "holds": all(holds.values()),
            "mean_absolute_error": float(np.mean(sizes)) if sizes else float("nan"),
        }
    return table


def best(table: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The law with the smallest mean error on the held-out amounts; None if no law has a finite one."""
    finite = {name: score["mean_absolute_error"] for name, score in table.items()}
    finite = {name: error for name, error in finite.items() if np.isfinite(error)}
    return min(finite, key=lambda name: finite[name]) if finite else None


def rotated_errors(
    model: CircuitGPT,
    short: ShortContexts,
    fitted: Mapping[int, c.Critical],
    measured: Mapping[int, c.Critical],
    held: Sequence[int],
    seed: int,
) -> list[float]:
    """Mean absolute errors of the weighted law, calibrated by one length, with random directions in place of u.

    A direction and its opposite are the same up to sign. The sign is chosen so that open brackets have a larger value
    than elements, as they have along u. An error is infinite if the law then predicts nothing for one of the amounts,
    or that it never fails.
    """
    first = next(iter(fitted))
    crossing = [k for k in held if measured[k].status == "crosses"]
    if fitted[first].status != "crosses" or not crossing:
        return []
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(ROTATIONS):
        u = torch.nn.functional.normalize(
            torch.randn(len(short.head.u), generator=generator, dtype=torch.float32, device="cpu"), dim=0
        )
        turned = calibrate(model, short.amounts, seed=seed, head=short.head, u=u.to(short.head.u), thetas=False)
        mean_u = turned.law().u
        if mean_u[OPEN] < mean_u[ELEMENT]:
            turned = replace(turned, values=-turned.values)
        predicted = turned.from_length(first, fitted[first].value)["weighted"]
        error = float(np.mean([abs(predicted[k] - measured[k].value) for k in crossing]))
        errors.append(float("inf") if np.isnan(error) else error)
    return errors


def shuffled_error(law: BracketLaw, measured: Mapping[int, c.Critical], held: Sequence[int]) -> float:
    """Mean absolute error when each amount gets the prediction for another, over all cyclic shifts but 0."""
    crossing = [k for k in held if measured[k].status == "crosses"]
    if len(crossing) < 2:
        return float("nan")
    shifts = range(1, len(crossing))
    errors = [
        abs(law.lengths[crossing[(i + shift) % len(crossing)]] - measured[k].value)
        for shift in shifts
        for i, k in enumerate(crossing)
    ]
    return float(np.mean(errors))
