"""Every law's predictions of the critical lengths, by each way to calibrate it, and how they fare."""

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
    """n*(k) by law and calibration, for every amount that the calibration doesn't use.

    "seed", "sink", "constant" and "affine" are fitted to the measured lengths of all calibration amounts; "…, one
    length" takes its one parameter from the first of them; "…, intervention" uses no long context at all.
    """
    usable = {k: one for k, one in fitted.items() if one.status == "crosses" and len(one.draws) > 1}
    held = [k for k in amounts if k not in fitted]
    found: dict[str, BracketLaw] = {}
    if len(usable) == len(fitted):
        for name, (law, _) in c.fit_laws({k: one.value for k, one in usable.items()}).items():
            errors = {k: c.predicted_error(name, k, usable) for k in held}
            found[name] = BracketLaw(name, {k: law(k) for k in held}, errors)
    if short is None:
        return found
    first = next(iter(fitted))
    samples = [short.sample(rng) for _ in range(RESAMPLES)]
    if first in usable:
        one, others = usable[first], [k for k in amounts if k != first]
        lengths = rng.choice(one.draws, size=RESAMPLES)
        drawn = [part.from_length(first, float(n)) for part, n in zip(samples, lengths, strict=True)]
        for name, values in short.from_length(first, one.value).items():
            chosen = {k: values[k] for k in others}
            found[f"{name}, one length"] = with_errors(f"{name}, one length", chosen, [d[name] for d in drawn])
    drawn = [part.by_intervention() for part in samples]
    for name, values in short.by_intervention().items():
        label = f"{name}, intervention"
        found[label] = with_errors(label, values, [draw[name] for draw in drawn])
    return found


def compare(
    laws: Mapping[str, BracketLaw], measured: Mapping[int, c.Critical], held: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """How each law fares on the held-out amounts: errors in tokens, whether each is good enough, and their mean size.

    Good enough: within one element or one standard error of the difference, see :func:`.critical.within`. The mean is
    over the amounts that have a critical length; it is infinite where the law says that one of these never fails.
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
    """The law with the smallest mean error on held-out amounts; None where none has a finite one."""
    finite = {name: one["mean_absolute_error"] for name, one in table.items()}
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
    """Mean errors of the weighted law by one length when random directions stand for the head's own u.

    A direction and its opposite say the same thing of opposite sign; the one along which open brackets stand above
    elements is taken, as they do along u. Infinite where the law then says that one of the amounts never fails, or
    nothing.
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
        found = turned.law().u
        if found[OPEN] < found[ELEMENT]:
            turned = replace(turned, values=-turned.values)
        said = turned.from_length(first, fitted[first].value)["weighted"]
        error = float(np.mean([abs(said[k] - measured[k].value) for k in crossing]))
        errors.append(float("inf") if np.isnan(error) else error)
    return errors


def shuffled_error(law: BracketLaw, measured: Mapping[int, c.Critical], held: Sequence[int]) -> float:
    """Mean error when each amount gets another's prediction: over every cyclic shift but none."""
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
