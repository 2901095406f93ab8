"""Does a longer list dilute the evidence, and does the length at which the answer fails grow as k/θ?

Laws are fitted to the critical lengths of two small amounts of evidence; their predictions for the other amounts
are stored; only then are those measured, on other prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..models.circuitgpt import CircuitGPT
from . import critical as c
from .controls import LEAST_ACCURACY, Controls, tells_depths
from .provenance import at_least, caution, longest_asked, model_provenance
from .result import Protocol, Result, Verdict

QUESTION = "At which context length does the bracket answer fail, and does that length grow as k/θ?"
SEED_FIGURE = "n* = ⌈k/θ⌉ = 14 for k = 2, θ = 0.15"
SEED_LENGTH, SEED_K = 14, 2
RULE = (
    "Reproduced iff the seed's law, fitted to the calibration amounts, meets every held-out critical length within "
    "one element (2 tokens) or one standard error of the difference, whichever is larger, and a constant length does "
    "not; indistinguishable where the constant meets them too. The affine rival contains the seed's law (intercept "
    "0), so it meets whatever that meets and tells something only where the law fails. Not testable where the model "
    "nowhere tells the depths apart with the accuracy asked, or where fewer than two held-out amounts have a critical "
    "length inside the context: a curve that hovers at one half or comes back has none."
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
) -> Result:
    """Critical lengths n₅₀(k) of ``model`` at depth 2 against the seed's law, the sink's, and two rivals.

    ``calibrate`` and ``predict``: amounts of evidence; ``prompts``: lists per amount, varying filler, head and first
    position (the last ``offsets`` positions of the context are left free for that); ``least_accuracy``: the balanced
    accuracy over both depths that the model must reach at some length for a verdict; ``controls``: the models to
    compare with, by default the untrained one and, for a shipped model, those shipped with it.
    """
    at_least(2, prompts=prompts)
    at_least(0, seed=seed)
    length = longest_asked(model, offsets, least_accuracy)
    amounts = (*calibrate, *predict)
    if len(set(calibrate)) < 2 or len(predict) < 2 or set(calibrate) & set(predict):
        raise ValueError(
            f"calibrate {tuple(calibrate)} and predict {tuple(predict)} must be two amounts each, all distinct"
        )
    controls = controls or Controls.of(model)
    rng = np.random.default_rng([seed, 1])
    options = {"calibrate": calibrate, "predict": predict, "prompts": prompts, "offsets": offsets, "seed": seed}
    provenance = model_provenance(model, least_accuracy=least_accuracy, **options)
    protocol = Protocol("dilution", QUESTION, SEED_FIGURE, provenance)

    def ask(one: CircuitGPT, k: int, depth: int = 2, salt: int = 0) -> c.Curve:
        return c.ask_long_lists(one, k, depth=depth, prompts=prompts, length=length, seed=1000 * seed + salt)

    fitted = {k: c.critical(ask(model, k, salt=1), rng) for k in calibrate}
    usable = {k: one for k, one in fitted.items() if one.status == "crosses"}
    laws = c.fit_laws({k: one.value for k, one in usable.items()}) if len(usable) == len(fitted) else {}
    spread = {name: {k: c.predicted_error(name, k, usable) for k in predict} for name in laws}
    protocol.predict(
        {
            "summary": _words({name: {k: law(k) for k in predict} for name, (law, _) in laws.items()}, predict),
            "calibration": c.table(fitted),
            "critical_length": {name: {k: law(k) for k in predict} for name, (law, _) in laws.items()},
            "standard_error": spread,
            "parameters": {name: parameters for name, (_, parameters) in laws.items()},
            "rule": RULE,
        }
    )
    protocol.measuring()
    curves = {k: ask(model, k) for k in amounts}
    measured = {k: c.critical(curve, rng) for k, curve in curves.items()}
    flat = ask(model, 1, depth=1)
    able = tells_depths(curves, flat)
    errors = {
        name: {k: law(k) - measured[k].value for k in predict if measured[k].status == "crosses"}
        for name, (law, _) in laws.items()
    }
    holds = {
        name: all(c.within(law(k), measured[k], spread[name][k]) for k in predict) for name, (law, _) in laws.items()
    }
    # P(correct) over prompts may have a critical length while single prompts waver; a reader must see how much.
    changes = " to ".join(f"{f(one.sign_changes for one in measured.values()):.0f}" for f in (min, max))
    null = {name: _null(other, ask, amounts, rng) for name, other in controls.models.items()}
    edges = c.bins(length)
    return protocol.conclude(
        measured={
            "summary": "; ".join(f"k={k}: {one.text()}" for k, one in measured.items())
            + f". Along one prompt the answer changes {changes} times",
            "against_the_seeds_figure": against_seed(measured.get(SEED_K)),
            "critical_length": c.table(measured),
            "prediction_minus_measured": errors,
            "law_holds": holds,
            "best_balanced_accuracy_at_one_length": able,
            "depth_1_accuracy_at_any_length": float(flat.right.mean()),
            "caution": caution(model),
        },
        interval={"summary": "95 % bootstrap by prompt", **c.bounds(measured)},
        null={
            "summary": "; ".join(f"{name}: {found['words']}" for name, found in null.items()),
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
            "laws": _law_figure(measured, laws, calibrate),
        },
    )


def against_seed(measured: c.Critical | None) -> str:
    """Whether the seed's figure is what was measured; shown, and used for nothing."""
    if measured is None:
        return f"k = {SEED_K} was not measured"
    if measured.status == "crosses" and measured.low <= SEED_LENGTH <= measured.high:
        return f"agrees: {SEED_LENGTH} lies in {measured.text()}"
    return f"disagrees: the seed says {SEED_LENGTH} at k = {SEED_K}, here it is {measured.text()}"


def verdict(measured: dict[int, c.Critical], predict: Sequence[int], holds: dict[str, bool], able: bool) -> Verdict:
    """The verdict by RULE."""
    if not able or not holds or sum(measured[k].status == "crosses" for k in predict) < 2:
        return "not testable here"
    if not holds["seed"]:
        return "not reproduced"
    return "indistinguishable" if holds["constant"] else "reproduced"


def _null(other: CircuitGPT, ask: Any, amounts: Sequence[int], rng: np.random.Generator) -> dict[str, Any]:
    """Critical lengths of a control and, since a model that can't do the task has none, whether it tells the depths."""
    curves = {k: ask(other, k) for k in amounts}
    lengths = {k: c.critical(curve, rng) for k, curve in curves.items()}
    flat = ask(other, 1, depth=1)
    able = tells_depths(curves, flat)
    words = f"best balanced accuracy {able:.2f}"
    if able >= LEAST_ACCURACY:
        words = ", ".join(f"k={k}: {one.text()}" for k, one in lengths.items())
    return {
        "words": words,
        "best_balanced_accuracy_at_one_length": able,
        "depth_1_accuracy_at_any_length": float(flat.right.mean()),
        "critical_length": c.table(lengths),
    }


def _words(predictions: dict[str, dict[int, float]], predict: Sequence[int]) -> str:
    if not predictions:
        return "none: a calibration amount has no critical length in the context"
    by_law = (f"{name} " + "/".join(f"{of[k]:.0f}" for k in predict) for name, of in predictions.items())
    return f"n* at k={'/'.join(map(str, predict))}: " + ", ".join(by_law)


def _law_figure(
    measured: dict[int, c.Critical], laws: dict[str, tuple[c.Law, dict[str, float]]], calibrate: Sequence[int]
) -> dict[str, Any]:
    seen = {k: one for k, one in measured.items() if one.status == "crosses"}
    amounts = sorted(measured)
    points = [
        {
            "label": "calibration" if part else "held out",
            "style": "points",
            "x": [k for k in seen if (k in calibrate) == part],
            "y": [seen[k].value for k in seen if (k in calibrate) == part],
            "low": [seen[k].low for k in seen if (k in calibrate) == part],
            "high": [seen[k].high for k in seen if (k in calibrate) == part],
        }
        for part in (True, False)
    ]
    lines = [
        {
            "label": name,
            "style": "line" if name == "seed" else "dashed",
            "x": amounts,
            "y": [law(k) for k in amounts],
        }
        for name, (law, _) in laws.items()
    ]
    return {
        "kind": "curves",
        "title": "Critical length against evidence: measured, and what each law says",
        "xlabel": "evidence k (brackets in front of the question)",
        "ylabel": "critical length n₅₀ (tokens)",
        "series": [*lines, *points],
    }
