"""Do the three generators lie along the first three components of the gradient?

The seed pairs update with v₁, mean with v₂ and threshold with v₃ of the gradient covariance. The pairs are fixed in
advance, and so is each generator's own hook and direction there, found on other prompts by the regression of
:mod:`.mapping`. The components are those of the covariance of the answer's loss gradient at that hook, over all tokens
of new prompts.

Nulls. Always: each live channel's own direction, among which the generator's |cos| is ranked. "rotated": random
directions of the live channels' space. "untrained": the same pair at the same hook of untrained models. "shuffled": the
pairs exchanged, the same generator against the other two components.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ..controls import LEAST_ACCURACY
from ..mapping.experiment import checked_length
from ..mapping.measure import Prompts
from ..mapping.scan import BAR, CLAIMS, Setup, untrained_seeds
from ..nulls import NULLS, check_nulls, only_beside
from ..provenance import at_least, caution, check_share, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import discoveries, percentile_interval
from .measure import LOSSES, Components, Direction, directions_at, gradients, own_directions

QUESTION = "Does each generator lie along its component of the gradient: update v₁, mean v₂, threshold v₃?"
SEED_FIGURE = "|cos| of g_update with v1 0.94, g_mean with v2 0.87, g_thr with v3 0.79"
SEED = {"update": 0.94, "mean": 0.87, "threshold": 0.79}
GAP, STEADY = 0.1, 0.9
FEWEST = 19  # live channels with which p = 1/(1 + live) can be 0.05
RULE = (
    "Reproduced iff each of the three pairs is significant (p by the rank of |cos| among all live channels' directions "
    "and among random ones, corrected over the three), its 95 % interval by prompt lies above the 95 % quantile of "
    "every null asked for (of untrained models and of exchanged pairs: above the largest), and its component is "
    f"resolved: an eigengap of {GAP:.0%} of the eigenvalue to both neighbours, and a median |cos| with itself of "
    f"{STEADY} over resamples of the prompts. Indistinguishable where only untrained models or exchanged pairs reach "
    "that interval. A generator that no channel tells (partial R² below one half), or one at a hook of fewer than "
    f"{FEWEST} live channels, where no rank is significant, can't be aligned: not testable, unless another pair fails. "
    "Nor testable where the model nowhere tells the depths apart with the accuracy asked; and nothing is reproduced "
    "unless all three nulls are asked for."
)


def run(
    model: CircuitGPT,
    *,
    amounts: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    prompts: int = 8,
    length: int = 128,
    center: bool = True,
    resamples: int = 200,
    draws: int = 999,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """|cos| of each generator's direction with its component of the gradient covariance at its own hook.

    ``amounts``: evidence k, 1 being a list of depth 1; ``prompts``: lists of each amount from which directions are
    fitted, as many others that choose the hook, and as many of other seeds for the gradient; ``length`` in
    tokens; ``center``: covariance, or second moment where false; ``resamples`` of the prompts; ``draws`` of random
    directions; ``least_accuracy``: the balanced accuracy over both depths that the model must reach at some length.
    Refused for a model without a tokenizer that knows the answers.
    """
    asked_nulls = check_nulls(nulls)
    at_least(4, prompts=prompts)
    at_least(20, resamples=resamples)
    at_least(99, draws=draws)
    at_least(0, seed=seed)
    check_share(least_accuracy=least_accuracy)
    length = checked_length(model, amounts, length)
    options = {"amounts": amounts, "prompts": prompts, "length": length, "center": center, "resamples": resamples}
    provenance = model_provenance(
        model, **options, draws=draws, seed=seed, least_accuracy=least_accuracy, nulls=asked_nulls
    )
    protocol = Protocol("alignment", QUESTION, SEED_FIGURE, provenance)
    # Hooks and directions come from calibration prompts, before any gradient is taken.
    setup = Setup.make(model, amounts, prompts, length, draws=0, wrong=0, seed=2 * seed + 5000)
    able = setup.able()
    own = own_directions(model, setup)
    protocol.predict(
        {
            "summary": "; ".join(f"{c} at {own[c].hook} lies along v{i + 1}" for i, c in enumerate(CLAIMS) if c in own)
            or "no hook has a generator's direction",
            "pairs": {claim: f"v{i + 1}" for i, claim in enumerate(CLAIMS)},
            "hook": {claim: one.hook for claim, one in own.items()},
            "channel": {claim: f"{one.hook}:{one.channel}" for claim, one in own.items()},
            "partial_r2": {claim: one.r2 for claim, one in own.items()},
            "direction": {claim: np.round(one.direction, 6).tolist() for claim, one in own.items()},
            "rule": RULE,
        }
    )
    protocol.measuring()
    rng = np.random.default_rng([seed, 23])
    lists = Prompts.make(model, amounts, max(2, prompts // 2), length, 2 * seed + 5001)
    grads = gradients(model, lists, sorted({one.hook for one in own.values()}))
    pairs, spectra = _pairs(own, grads, center=center, resamples=resamples, draws=draws, nulls=asked_nulls, rng=rng)
    if "untrained" in asked_nulls:
        for other in untrained_seeds(model, 3, seed):
            _add_untrained(other, setup, lists, own, pairs, center, rng)
    _judge(pairs)
    return protocol.conclude(
        measured={
            "summary": _words(pairs, able, least_accuracy),
            "best_balanced_accuracy_at_one_length": able,
            "pairs": pairs,
            "gradient": "cross-entropy between the two answers, averaged over a list's questions, at every token; "
            + ("centered" if center else "not centered"),
            "other_gradients": _others(own, grads, rng),
            "caution": caution(model),
            "left_out": _left_out(asked_nulls, own, pairs),
        },
        interval={
            "summary": "; ".join(f"{c} {_span(p['interval'])}" for c, p in pairs.items())
            + f" (95 % bootstrap over {len(lists)} prompts, the direction held fixed)",
            **{claim: pair["interval"] for claim, pair in pairs.items()},
        },
        null={
            "summary": "largest |cos| to beat: "
            + "; ".join(
                f"{claim} " + ", ".join(f"{name} {value:.2f}" for name, value in pair["null"].items())
                for claim, pair in pairs.items()
            ),
            **{claim: pair["null"] for claim, pair in pairs.items()},
        },
        verdict=only_beside(NULLS, asked_nulls, verdict(pairs, able >= least_accuracy)),
        figures=_figures(pairs, spectra),
    )


def verdict(pairs: Mapping[str, Mapping[str, Any]], able: bool) -> Verdict:
    """The verdict by RULE from each pair's ``told``, ``significant``, ``resolved``, ``above``, ``above_random`` and
    ``enough_channels``.
    """
    if not able:
        return "not testable here"
    told = [pair for pair in pairs.values() if pair["told"]]
    for pair in told:
        beyond_chance = pair["significant"] or not pair["enough_channels"]
        if not (beyond_chance and pair["resolved"] and pair["above_random"]):
            return "not reproduced"
    if len(told) < len(CLAIMS) or not all(pair["enough_channels"] for pair in told):
        return "not testable here"
    return "reproduced" if all(pair["above"] for pair in told) else "indistinguishable"


def _pairs(
    own: Mapping[str, Direction],
    grads: Mapping[str, Mapping[str, np.ndarray]],
    *,
    center: bool,
    resamples: int,
    draws: int,
    nulls: Sequence[str],
    rng: np.random.Generator,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """What is measured of each pair, and the share of variance by component at each hook."""
    pairs: dict[str, dict[str, Any]] = {}
    spectra: dict[str, np.ndarray] = {}
    for i, claim in enumerate(CLAIMS):
        if claim not in own or not np.abs(grads["loss"][own[claim].hook]).max() > 0:
            continue
        one = own[claim]
        found = Components.of(grads["loss"][one.hook], center=center, resamples=resamples, rng=rng)
        spectra[one.hook] = found.share
        every, drawn = found.cosines(one.direction)
        channels = np.abs(found.vectors[i][one.live])
        null = {"channels": float(np.quantile(channels, 0.95))}
        p = (1 + int((channels >= every[i]).sum())) / (1 + len(channels))
        if "rotated" in nulls:
            turned = rng.standard_normal((draws, int(one.live.sum())))
            random = np.abs(turned @ found.vectors[i][one.live]) / np.linalg.norm(turned, axis=1)
            null["rotated"] = float(np.quantile(random, 0.95))
            p = max(p, (1 + int((random >= every[i]).sum())) / (1 + draws))
        if "shuffled" in nulls:
            null["shuffled"] = float(np.delete(every, i).max())
        pairs[claim] = {
            "hook": one.hook,
            "component": i + 1,
            "channel": f"{one.hook}:{one.channel}",
            "partial_r2": one.r2,
            "told": one.r2 >= BAR,
            "enough_channels": len(channels) >= FEWEST,
            "cos": float(every[i]),
            "cos_with_each": every.tolist(),
            "interval": list(percentile_interval(drawn[:, i])),
            "p": p,
            "live_channels": len(channels),
            "eigengap": found.gap(i),
            "steadiness": found.steady(i),
            "share_of_variance": found.share[:3].tolist(),
            "null": null,
            "seed": SEED[claim],
        }
    return pairs, spectra


def _add_untrained(
    other: CircuitGPT,
    setup: Setup,
    lists: Prompts,
    own: Mapping[str, Direction],
    pairs: Mapping[str, dict[str, Any]],
    center: bool,
    rng: np.random.Generator,
) -> None:
    """The same pair at the same hook of an untrained model; the largest over such models is kept as the null."""
    hooks = {claim: own[claim].hook for claim in pairs}
    there = directions_at(other, setup, hooks)
    grads = gradients(other, lists, sorted(set(hooks.values())))["loss"] if hooks else {}
    for i, claim in enumerate(CLAIMS):
        if claim in there and np.abs(grads[hooks[claim]]).max() > 0:
            found = Components.of(grads[hooks[claim]], center=center, resamples=0, rng=rng)
            null = pairs[claim]["null"]
            cos = float(found.cosines(there[claim].direction)[0][i])
            null["untrained"] = max(cos, null.get("untrained", 0.0))


def _judge(pairs: Mapping[str, dict[str, Any]]) -> None:
    """Significance corrected over the pairs, and what the verdict needs of each."""
    sure = discoveries(np.array([pair["p"] for pair in pairs.values()]))
    for pair, significant in zip(pairs.values(), sure, strict=True):
        low, null = pair["interval"][0], pair["null"]
        pair["significant"] = bool(significant)
        pair["resolved"] = pair["eigengap"] >= GAP and pair["steadiness"] >= STEADY
        pair["above_random"] = all(low > null[name] for name in ("channels", "rotated") if name in null)
        pair["above"] = all(low > value for value in null.values())


def _others(
    own: Mapping[str, Direction], grads: Mapping[str, Mapping[str, np.ndarray]], rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """|cos| of each pair under every gradient and centering, for a reader who would have chosen another."""
    found: dict[str, dict[str, float]] = {}
    for loss in LOSSES:
        for center in (True, False):
            name = f"{loss}, {'centered' if center else 'not centered'}"
            found[name] = {}
            for i, claim in enumerate(CLAIMS):
                if claim in own and np.abs(grads[loss][own[claim].hook]).max() > 0:
                    one = Components.of(grads[loss][own[claim].hook], center=center, resamples=0, rng=rng)
                    found[name][claim] = float(one.cosines(own[claim].direction)[0][i])
    return found


def _span(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _words(pairs: Mapping[str, Mapping[str, Any]], able: float, least: float) -> str:
    parts = [
        f"{claim}–v{pair['component']} at {pair['hook']} {pair['cos']:.2f} {_span(pair['interval'])}, p = "
        f"{pair['p']:.3f}, {'resolved' if pair['resolved'] else 'not resolved'} (seed {pair['seed']})"
        for claim, pair in pairs.items()
    ]
    said = "|cos| " + "; ".join(parts) if parts else "no generator has a direction at a hook that the answer reads"
    return said if able >= least else f"{said}. The model doesn't do the task: best balanced accuracy {able:.2f}"


def _left_out(asked: Sequence[str], own: Mapping[str, Direction], pairs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = [f"The null “{name}” was not asked for." for name in NULLS if name not in asked]
    for claim in CLAIMS:
        if claim not in own:
            notes.append(f"No hook of four or more channels has a live one for “{claim}”.")
        elif claim not in pairs:
            notes.append(f"The gradient at {own[claim].hook}, the hook of “{claim}”, is zero.")
        elif not pairs[claim]["told"]:
            notes.append(
                f"No channel tells “{claim}” (partial R² {pairs[claim]['partial_r2']:.2f} at best): its direction is "
                "shown and not judged."
            )
        elif not pairs[claim]["resolved"]:
            notes.append(
                f"v{pairs[claim]['component']} at {pairs[claim]['hook']} is not resolved: it has no direction."
            )
    return notes


def _figures(pairs: Mapping[str, Mapping[str, Any]], spectra: Mapping[str, np.ndarray]) -> dict[str, Any]:
    labels, values, low, high = [], [], [], []
    for claim, pair in pairs.items():
        rows = [(f"{claim}–v{pair['component']}", pair["cos"], *pair["interval"])]
        rows += [(f"{claim}: {name}", value, value, value) for name, value in pair["null"].items()]
        for label, value, least, most in rows:
            labels.append(label)
            values.append(value)
            low.append(least)
            high.append(most)
    return {
        "alignment": {
            "kind": "bars",
            "title": "Each generator and its component of the gradient, beside what chance gives",
            "summary": "Channels and rotated: 95 % quantiles; untrained: the largest of three models; shuffled: the "
            "larger with the other two components.",
            "ylabel": "|cos|",
            "labels": labels,
            "values": values,
            "low": low,
            "high": high,
        },
        "spectra": {
            "kind": "curves",
            "title": "Share of the gradient's variance by component, at each generator's hook",
            "xlabel": "component",
            "ylabel": "share of variance",
            "series": [
                {"label": hook, "x": list(range(1, len(share) + 1)), "y": share} for hook, share in spectra.items()
            ],
        },
    }
