"""Does the distance to the predicted failure region foretell the failures on held-out real prompts?

Predicted: the law is given, or calibrated on made-up lists with two brackets. Each prompt's distance to the failure
region, in tokens, is stored before the model sees the prompt; the smaller the distance, the likelier a failure.
Measured: the AUROC of that distance for failure, on real nested lists of numpy and scipy cut before their last
brackets and on longer ones made of the same elements. It is compared, prompt by prompt, with the AUROC of the context
length alone and of the model's own logit margin. The alarms of :class:`scalpel.HoleGuard` are counted.
Null: an untrained model's failures; distances exchanged between prompts; and random directions of the (k, n) plane.

The counter's k is every "[", as in the seed. Two other distances are shown beside it and decide nothing: one that
counts open brackets only, and one by the weighted law of what the head attends to. If every prompt has two open
brackets, the distance by open brackets is a constant minus the length: it ranks prompts as the length does, and only
its alarms are informative.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...circuits.task import Task, answer_logits
from ...guard.hole_guard import FailureLaw, HoleGuard
from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...semigroup import ThresholdCounter
from ...tasks.brackets import closers
from ...tasks.refused import Refused
from ..controls import LEAST_ACCURACY
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, longest_asked, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import auroc, aurocs, bootstrap, percentile_interval, redraw, rows_by_unit
from . import critical as c
from .calibration import calibrate
from .guard_prompts import Prompts, held_out_prompts

QUESTION = "Does the distance to the predicted failure region foretell the failures on held-out real prompts?"
SEED_FIGURE = "the seed proposes a safeguard that warns before the hole, and states no figure for it"
FEWEST = 20
RULE = (
    "Reproduced iff the 95 % interval of the distance's AUROC for failure lies above 0.5 and the interval of its lead "
    "over the length alone, paired by prompt, lies above 0. Not reproduced if either interval lies wholly below its "
    "bound; indistinguishable otherwise. Judged on the real prompts alone if the model fails on at least "
    f"{FEWEST} of them and answers at least {FEWEST} right; otherwise on the real and the lengthened prompts together. "
    "Not testable if these are too few as well, if at no length the model tells the two depths apart with the required "
    "accuracy, or if no law was given and the calibration lists have no critical length inside the context."
)
CALIBRATED_AT = 2
MARGINS = tuple(range(-96, 97, 16))
_SCORES = {
    "law": "distance by the law",
    "open": "the same, only open brackets counted",
    "weighted": "distance by the weighted law",
    "n": "length n alone",
    "margin": "the model's own |logit margin|",
}


def run(
    model: CircuitGPT,
    *,
    law: ThresholdCounter | FailureLaw | None = None,
    prompts: int = 400,
    offsets: int = 64,
    nulls: Sequence[str] = NULLS,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
) -> Result:
    """Measure how well a law's distance predicts failures on real nested lists, and how often its guard errs.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        law: A counter, or any object with ``tokens_left(ids)``. By default the seed's counter with θ = 2 / n₅₀(2),
            where n₅₀(2) is measured on made-up lists.
        prompts: The most real prompts that are asked; half as many are lengthened.
        offsets: Positions of the context left free, so that made-up lists can start at different positions.
        nulls: "untrained" scores an untrained model's failures; "shuffled" exchanges distances between prompts;
            "rotated" puts a random direction of the (k, n) plane in the law's place.
        seed: Seed of the prompts and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".

    Returns:
        A Result; ``measured["auroc"]`` holds the AUROC of every score and ``measured["alarms_at_margin_0"]`` the errors
        of the guard.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or its context is too short.
        ValueError: An option is out of range.
    """
    nulls = check_nulls(nulls)
    at_least(2 * FEWEST, prompts=prompts)
    at_least(0, seed=seed)
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; the guard's prompts are text")
    ids = closers(model.tokenizer)
    length = longest_asked(model, offsets, least_accuracy)
    rng = np.random.default_rng([seed, 46])
    lists = {"prompts": 32, "length": length, "seed": 1000 * seed + 6}
    curve = c.ask_long_lists(model, CALIBRATED_AT, **lists)
    able = c.tells_depths({CALIBRATED_AT: curve}, c.ask_long_lists(model, 1, depth=1, **lists))
    options = {"prompts": prompts, "offsets": offsets, "nulls": nulls, "law": "given" if law else "calibrated"}
    provenance = model_provenance(model, least_accuracy=least_accuracy, seed=seed, **options)
    protocol = Protocol("guard", QUESTION, SEED_FIGURE, provenance)

    known, law_words = law is not None, f"a given law ({type(law).__name__})"
    if law is None:
        fitted = c.critical(curve, rng)
        known = fitted.status == "crosses"
        # Without a critical length there is no θ. The longest length asked stands in for it, so that figures can be
        # shown; the verdict is "not testable here".
        law = ThresholdCounter(CALIBRATED_AT / (fitted.value if known else float(length)))
        law_words = f"k/n > {float(law.theta):.4f}, from n₅₀ = {fitted.text()} at k = {CALIBRATED_AT} on made-up lists"
    asked = held_out_prompts(model, prompts, rng)
    guard = HoleGuard(model, law, evidence="all")
    distances = [guard.distance(row) for row in asked.rows]
    tokens_left = np.array([distance.tokens_left for distance in distances])
    k, n = (np.array([getattr(distance, name) for distance in distances], dtype=float) for name in ("k", "n"))
    scores: dict[str, np.ndarray] = {"law": -tokens_left, "n": n}
    if isinstance(law, ThresholdCounter):
        open_guard = HoleGuard(model, law, evidence="open")
        scores["open"] = -np.array([open_guard.distance(row).tokens_left for row in asked.rows])
        weighted, why = _weighted(model, float(CALIBRATED_AT / law.theta), seed)
        if weighted is not None:
            weighted_guard = HoleGuard(model, weighted)
            scores["weighted"] = -np.array([weighted_guard.distance(row).tokens_left for row in asked.rows])
        asked.left_out.extend(why)
    protocol.predict(
        {
            "summary": f"{law_words}: {(tokens_left <= 0).sum()} of {len(tokens_left)} prompts fail, and failure is "
            "likelier the fewer tokens are left",
            "law": law_words,
            "real": int(asked.real.sum()),
            "lengthened": int((~asked.real).sum()),
            "failing": int((tokens_left <= 0).sum()),
            "tokens_left": tokens_left,
            "tokens_left_by_open_brackets": -scores["open"] if "open" in scores else None,
            "k": k,
            "n": n,
            "rule": RULE,
        }
    )
    protocol.measuring()
    preference = ask(model, asked.rows, (ids.one, ids.two))
    failed = preference <= 0
    scores["margin"] = -np.abs(preference)
    parts = {"real": asked.real, "lengthened": ~asked.real, "all": np.ones(len(failed), dtype=bool)}
    by_part = {name: judged(scores, failed, part, asked.prompt, rng) for name, part in parts.items()}
    judged_on = "real" if _enough(failed[asked.real]) else "all"
    part, best = parts[judged_on], by_part[judged_on]
    by_file = judged(scores, failed, part, asked.file, rng)
    rates: dict[str, Any] = {
        name: alarms(-scores[name][part], failed[part], asked.prompt[part], rng)
        for name in ("law", "open", "weighted")
        if name in scores
    }
    null = _nulls(nulls, model, asked, (tokens_left, k, n), failed, part, (ids.one, ids.two), rng)
    verdict = judge(best, _enough(failed[part]) and known and able >= least_accuracy)
    shown = "real prompts" if judged_on == "real" else "real prompts and lengthened ones"
    return protocol.conclude(
        measured={
            "summary": f"{failed[part].sum()} of {part.sum()} {shown} fail; AUROC {_named(best, 'law')} by the law's "
            f"distance, {_named(best, 'n')} by the length alone, {_named(best, 'margin')} by the model's own margin. "
            f"At margin 0 the guard {_alarmed(rates['law'])}"
            + "".join(f". {_also(name, best, rates)}" for name in ("open", "weighted") if name in rates),
            "judged_on": judged_on,
            "auroc": {name: {score: of_part[score]["auroc"] for score in scores} for name, of_part in by_part.items()},
            "law_minus_n": {name: of_part["law_minus_n"]["difference"] for name, of_part in by_part.items()},
            "law_minus_margin": {name: of_part["law_minus_margin"]["difference"] for name, of_part in by_part.items()},
            "prompts": {name: int(p.sum()) for name, p in parts.items()},
            "failures": {name: int(failed[p].sum()) for name, p in parts.items()},
            "files": len(np.unique(asked.file[part])),
            "alarms_at_margin_0": rates,
            "best_balanced_accuracy_at_one_length": able,
            "left_out": [*asked.left_out, *_unfinished(nulls, known)],
        },
        interval={
            "summary": f"law − length {_interval(best['law_minus_n'])}, law − own margin "
            f"{_interval(best['law_minus_margin'])}, by prompt; law − length with whole files resampled "
            f"{_interval(by_file['law_minus_n'])}",
            **by_part,
            "by_file": by_file,
        },
        null=null,
        verdict=verdict,
        figures=_figures(best, {name: -scores[name][part] for name in rates}, failed[part], shown),
    )


def _weighted(model: CircuitGPT, length: float, seed: int) -> tuple[FailureLaw | None, list[str]]:
    """The weighted law that fails at ``length`` for two brackets, or the reason why there is none."""
    assert model.tokenizer is not None
    try:
        short = calibrate(model, (2, 3, 4, 5, 6), seed=seed, thetas=False)
    except Refused as error:
        return None, [f"guard: the weighted law was left out: {error}"]
    law = short.law_failing_at(CALIBRATED_AT, length)
    if not np.isfinite(law.theta):
        return None, ["guard: the weighted law was left out: no key that the head reads has any weight, so it has no θ"]
    return replace(law, tokenizer=model.tokenizer, start=closers(model.tokenizer).start), []


@torch.no_grad()
def ask(model: CircuitGPT, rows: Sequence[Sequence[int]], answers: tuple[int, int]) -> np.ndarray:
    """logit("]]\\n") − logit("]\\n") after each prompt, float64 (prompts,)."""
    order = np.argsort([len(row) for row in rows], kind="stable")  # rows of a batch are padded to the longest
    task = Task.of("nested lists", [rows[i] for i in order], [1] * len(rows), answers)
    logits = answer_logits(model, task, batch=16).double().numpy()
    out = np.empty(len(rows))
    out[order] = logits[:, 1] - logits[:, 0]
    return out


def judged(
    scores: dict[str, np.ndarray],
    failed: np.ndarray,
    part: np.ndarray,
    units: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 500,
) -> dict[str, Any]:
    """AUROC of each score over the prompts of ``part``, and the law's lead over its rivals, paired by resample.

    Intervals are 95 % bootstrap intervals. Prompts with the same number in ``units`` (prompts,) are resampled together.
    """
    chosen, wrong = np.stack([score[part] for score in scores.values()]), failed[part]
    members = rows_by_unit(units[part])

    def areas(drawn: np.ndarray) -> np.ndarray:
        rows = np.concatenate([members[i] for i in drawn])
        return aurocs(chosen[:, rows], wrong[rows])

    draws = np.full((1, len(chosen)), np.nan)
    if members:
        draws = np.stack(redraw(areas, len(members), rng, resamples))
    areas_of_all = aurocs(chosen, wrong)
    column = {name: i for i, name in enumerate(scores)}
    judgement = {name: {"auroc": float(areas_of_all[i]), **_between(draws[:, i])} for name, i in column.items()}
    for name in ("n", "margin"):
        lead = areas_of_all[column["law"]] - areas_of_all[column[name]]
        lead_draws = draws[:, column["law"]] - draws[:, column[name]]
        judgement[f"law_minus_{name}"] = {"difference": float(lead), **_between(lead_draws)}
    return judgement


def _between(draws: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(draws)
    return {"low": low, "high": high}


def alarms(left: np.ndarray, failed: np.ndarray, units: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Shares of missed failures and of false alarms among successes at margin 0, with intervals by prompt.

    ``left``: the distance of each prompt in tokens; ``units`` as in :func:`judged`.
    """
    members = rows_by_unit(units)
    rates: dict[str, Any] = {}
    for name, rows_of_kind in (("missed", failed), ("false", ~failed)):
        wrong = (left > 0) if name == "missed" else (left <= 0)

        def share(drawn: np.ndarray, rows_of_kind: np.ndarray = rows_of_kind, wrong: np.ndarray = wrong) -> float:
            rows = np.concatenate([members[i] for i in drawn])
            return float(wrong[rows][rows_of_kind[rows]].mean()) if rows_of_kind[rows].any() else float("nan")

        value = float(wrong[rows_of_kind].mean()) if rows_of_kind.any() else float("nan")
        low, high = bootstrap(share, len(members), rng, resamples=500) if members else (float("nan"),) * 2
        rates[name] = {"rate": value, "low": low, "high": high, "of": int(rows_of_kind.sum())}
    return rates


def judge(best: dict[str, Any], testable: bool) -> Verdict:
    """The verdict that RULE gives."""
    law, lead = best["law"], best["law_minus_n"]
    if not testable or np.isnan([law["low"], lead["low"]]).any():
        return "not testable here"
    if law["low"] > 0.5 and lead["low"] > 0:
        return "reproduced"
    return "not reproduced" if law["high"] < 0.5 or lead["high"] < 0 else "indistinguishable"


def _enough(failed: np.ndarray) -> bool:
    """Whether there are enough failures and enough successes to judge on."""
    return bool(failed.sum() >= FEWEST and (~failed).sum() >= FEWEST)


def _nulls(
    nulls: Sequence[str],
    model: CircuitGPT,
    asked: Prompts,
    plane: tuple[np.ndarray, np.ndarray, np.ndarray],
    failed: np.ndarray,
    part: np.ndarray,
    answers: tuple[int, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """What the nulls that were asked for give, with their summary. ``plane``: the distances, k and n of all prompts."""
    left, k, n = (coordinate[part] for coordinate in plane)
    wrong, law = failed[part], auroc(-plane[0][part], failed[part])
    null: dict[str, Any] = {}
    words = []
    if "untrained" in nulls:
        theirs = ask(untrained(model), [row for row, kept in zip(asked.rows, part, strict=True) if kept], answers) <= 0
        area = auroc(-left, theirs)
        null["untrained"] = {"auroc": area, "failures": int(theirs.sum()), "prompts": len(theirs)}
        shown = "no AUROC" if np.isnan(area) else f"AUROC {area:.2f}"
        words.append(f"an untrained model fails on {theirs.sum()} of {len(theirs)}, {shown}")
    for name in ("rotated", "shuffled"):
        if name not in nulls:
            continue
        if name == "shuffled":
            draws = np.array([auroc(-rng.permutation(left), wrong) for _ in range(500)])
        else:
            standardised = np.stack([(v - v.mean()) / (v.std() or 1.0) for v in (k, n)])
            angles = rng.uniform(0, 2 * np.pi, size=500)
            draws = np.array([auroc(np.cos(a) * standardised[0] + np.sin(a) * standardised[1], wrong) for a in angles])
        if np.isnan(draws).any():
            words.append(f"{name}: no AUROC, since the model fails on none or on all prompts")
            continue
        low, high = percentile_interval(draws)
        share = float((draws >= law).mean())
        null[name] = {"auroc": float(draws.mean()), "low": low, "high": high, "at_least_the_laws": share}
        what = "distances shuffled" if name == "shuffled" else "a random direction of the (k, n) plane"
        words.append(f"{what}: {draws.mean():.2f} [{low:.2f}, {high:.2f}], {share:.0%} as good as the law or better")
    return {"summary": "; ".join(words) or "no null was asked for", **null}


def _unfinished(nulls: Sequence[str], known: bool) -> list[str]:
    """What has to be said of nulls that were not asked for, and of a missing critical length."""
    notes = [f"The null {name!r} was not asked for." for name in NULLS if name not in nulls]
    if not known:
        notes.append(
            f"The calibration lists (k = {CALIBRATED_AT}) have no critical length inside the context, so there is no "
            "law to judge; what is shown rests on the longest length asked instead."
        )
    return notes


def _named(scores: dict[str, Any], name: str) -> str:
    score = scores[name]
    return "–" if np.isnan(score["auroc"]) else f"{score['auroc']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def _interval(lead: dict[str, float]) -> str:
    return "–" if np.isnan(lead["low"]) else f"{lead['difference']:+.2f} [{lead['low']:+.2f}, {lead['high']:+.2f}]"


def _also(name: str, best: dict[str, Any], rates: dict[str, Any]) -> str:
    measure = {
        "open": "With open brackets only, which rank prompts as the length does",
        "weighted": "By the weighted law",
    }[name]
    return f"{measure}: AUROC {_named(best, name)}, and it {_alarmed(rates[name])}"


def _alarmed(rates: dict[str, Any]) -> str:
    missed, false = _share(rates["missed"]), _share(rates["false"])
    return f"misses {missed} of the failures and gives a false alarm in {false} of the successes"


def _share(rate: dict[str, float]) -> str:
    return "–" if np.isnan(rate["rate"]) else f"{rate['rate']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"


def _figures(best: dict[str, Any], left: dict[str, np.ndarray], failed: np.ndarray, shown: str) -> dict[str, Any]:
    series = []
    for name, distance in left.items():
        suffix = {"law": "", "open": ", open brackets only", "weighted": ", weighted law"}[name]
        for label, group, alarm in (("failures missed", failed, False), ("false alarms", ~failed, True)):
            y = [float(((distance[group] <= m) == alarm).mean()) if group.any() else None for m in MARGINS]
            style = "dashed" if alarm else "line"
            series.append({"label": label + suffix, "x": MARGINS, "y": y, "style": style, "group": name})
    names = [name for name in _SCORES if name in best]
    return {
        "auroc": {
            "kind": "bars",
            "title": f"How well each score predicts failure on {shown}",
            "ylabel": "AUROC for failure",
            "labels": [_SCORES[name] for name in names],
            "values": [best[name]["auroc"] for name in names],
            "low": [best[name]["low"] for name in names],
            "high": [best[name]["high"] for name in names],
            "reference": [{"y": 0.5, "label": "chance"}],
        },
        "alarms": {
            "kind": "curves",
            "title": "Failures missed, and false alarms among successes, by the guard's margin",
            "xlabel": "margin (tokens before the predicted failure)",
            "ylabel": "share",
            "series": series,
            "vlines": [{"x": 0, "label": "margin 0"}],
        },
    }
