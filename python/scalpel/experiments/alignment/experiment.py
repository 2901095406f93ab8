"""Do the three generators lie along the first three components of the gradient?

Predicted: update lies along v₁ of the gradient covariance, mean along v₂ and threshold along v₃, as the seed pairs
them. The pairs are fixed in advance. So are each generator's own hook and its direction there, which the regression of
:mod:`.mapping` finds on other prompts.
Measured: |cos| of each direction with its component of the covariance of the answer's loss gradient at that hook, over
all tokens of new prompts.
Null: the directions of the live channels themselves, among which the generator's |cos| is ranked, always; "rotated",
random directions in the space of the live channels; "untrained", the same pair at the same hook of untrained models;
"shuffled", the same generator with the other two components.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ..controls import LEAST_ACCURACY
from ..mapping.claims import BAR, CLAIMS, Setup
from ..mapping.experiment import checked_length
from ..mapping.measure import Prompts
from ..mapping.scan import untrained_seeds
from ..nulls import NULLS, check_nulls, only_beside
from ..provenance import at_least, caution, check_share, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import discoveries, percentile_interval
from .measure import LOSSES, Components, Direction, directions_at, gradients, own_directions

QUESTION = "Does each generator lie along its component of the gradient: update v₁, mean v₂, threshold v₃?"
SEED_FIGURE = "|cos| of g_update with v1 0.94, g_mean with v2 0.87, g_thr with v3 0.79"
SEED = {"update": 0.94, "mean": 0.87, "threshold": 0.79}
GAP, STEADY = 0.1, 0.9
FEWEST = 19  # with so many live channels the least p, 1/(1 + live), is 0.05
RULE = (
    "Reproduced iff three things hold for each of the three pairs. It is significant: p is the rank of |cos| among the "
    "directions of all live channels and among random ones, corrected over the three pairs. Its 95 % interval by "
    "prompt lies above every null asked for: above the 95 % quantile of channels and of random directions, and above "
    "the largest |cos| of untrained models and of exchanged pairs. Its component is resolved: the eigengap to both "
    f"neighbours is at least {GAP:.0%} of the eigenvalue, and the median |cos| of the component with itself over "
    f"resamples of the prompts is at least {STEADY}. Indistinguishable if only untrained models or exchanged pairs "
    "reach that interval. A generator that no channel tells (partial R² below one half) can't be aligned, nor can one "
    f"at a hook of fewer than {FEWEST} live channels, where no rank is significant; this is not testable, unless "
    "another pair fails. Not testable either if at no length the model tells the two depths apart with the required "
    "accuracy. Nothing is reproduced unless all three nulls are asked for."
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
    """Measure |cos| of each generator's direction with its component of the gradient covariance, at its own hook.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        amounts: Amounts of evidence k; 1 stands for a list of depth 1, and three or more others are needed.
        prompts: Lists of each amount to which directions are fitted; as many others choose the hook, and about as many
            of another seed give the gradient.
        length: Tokens in a list; at most the context is used.
        center: Whether the gradient's covariance is centered; if not, it is the second moment.
        resamples: Bootstrap resamples of the prompts.
        draws: Random directions for the null "rotated".
        seed: Seed of the prompts, of the nulls and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".
        nulls: "rotated", "untrained" and "shuffled", as the module describes them.

    Returns:
        A Result; ``measured["pairs"]`` holds the three pairs.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or a list of ``length`` tokens is too
            short.
        ValueError: An option is out of range, the amounts are too few, or a null is unknown.
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
            "summary": "; ".join(
                f"{claim} at {own[claim].hook} lies along v{i + 1}" for i, claim in enumerate(CLAIMS) if claim in own
            )
            or "no hook has a direction of a generator",
            "pairs": {claim: f"v{i + 1}" for i, claim in enumerate(CLAIMS)},
            "hook": {claim: direction.hook for claim, direction in own.items()},
            "channel": {claim: f"{direction.hook}:{direction.channel}" for claim, direction in own.items()},
            "partial_r2": {claim: direction.r2 for claim, direction in own.items()},
            "direction": {claim: np.round(direction.direction, 6).tolist() for claim, direction in own.items()},
            "rule": RULE,
        }
    )
    protocol.measuring()
    rng = np.random.default_rng([seed, 23])
    lists = Prompts.make(model, amounts, max(2, prompts // 2), length, 2 * seed + 5001)
    grads = gradients(model, lists, sorted({direction.hook for direction in own.values()}))
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
            "summary": "; ".join(f"{claim} {_span(pair['interval'])}" for claim, pair in pairs.items())
            + f" (95 % bootstrap over {len(lists)} prompts, with the direction held fixed)",
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
    """The verdict that RULE gives, from what :func:`_judge` adds to each pair.

    A pair's ``told`` says whether some channel tells the generator; ``able``, whether the model can do the task.
    """
    if not able:
        return "not testable here"
    judged_pairs = [pair for pair in pairs.values() if pair["told"]]
    for pair in judged_pairs:
        beyond_chance = pair["significant"] or not pair["enough_channels"]
        if not (beyond_chance and pair["resolved"] and pair["above_random"]):
            return "not reproduced"
    if len(judged_pairs) < len(CLAIMS) or not all(pair["enough_channels"] for pair in judged_pairs):
        return "not testable here"
    return "reproduced" if all(pair["above"] for pair in judged_pairs) else "indistinguishable"


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
    """What is measured of each pair, and the share of variance of each component, by hook."""
    pairs: dict[str, dict[str, Any]] = {}
    spectra: dict[str, np.ndarray] = {}
    for i, claim in enumerate(CLAIMS):
        if claim not in own or not np.abs(grads["loss"][own[claim].hook]).max() > 0:
            continue
        generator = own[claim]
        components = Components.of(grads["loss"][generator.hook], center=center, resamples=resamples, rng=rng)
        spectra[generator.hook] = components.share
        cosines, cosines_drawn = components.cosines(generator.direction)
        channels = np.abs(components.vectors[i][generator.live])
        null = {"channels": float(np.quantile(channels, 0.95))}
        p = (1 + int((channels >= cosines[i]).sum())) / (1 + len(channels))
        if "rotated" in nulls:
            random_directions = rng.standard_normal((draws, int(generator.live.sum())))
            random = np.abs(random_directions @ components.vectors[i][generator.live]) / np.linalg.norm(
                random_directions, axis=1
            )
            null["rotated"] = float(np.quantile(random, 0.95))
            p = max(p, (1 + int((random >= cosines[i]).sum())) / (1 + draws))
        if "shuffled" in nulls:
            null["shuffled"] = float(np.delete(cosines, i).max())
        pairs[claim] = {
            "hook": generator.hook,
            "component": i + 1,
            "channel": f"{generator.hook}:{generator.channel}",
            "partial_r2": generator.r2,
            "told": generator.r2 >= BAR,
            "enough_channels": len(channels) >= FEWEST,
            "cos": float(cosines[i]),
            "cos_with_each": cosines.tolist(),
            "interval": list(percentile_interval(cosines_drawn[:, i])),
            "p": p,
            "live_channels": len(channels),
            "eigengap": components.gap(i),
            "steadiness": components.steady(i),
            "share_of_variance": components.share[:3].tolist(),
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
    """Add the |cos| of the same pairs at the same hooks of an untrained model; the largest over models is kept."""
    hooks = {claim: own[claim].hook for claim in pairs}
    there = directions_at(other, setup, hooks)
    grads = gradients(other, lists, sorted(set(hooks.values())))["loss"] if hooks else {}
    for i, claim in enumerate(CLAIMS):
        if claim in there and np.abs(grads[hooks[claim]]).max() > 0:
            components = Components.of(grads[hooks[claim]], center=center, resamples=0, rng=rng)
            null = pairs[claim]["null"]
            cos = float(components.cosines(there[claim].direction)[0][i])
            null["untrained"] = max(cos, null.get("untrained", 0.0))


def _judge(pairs: Mapping[str, dict[str, Any]]) -> None:
    """Add to each pair what the verdict needs, with significance corrected over the pairs."""
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
    """|cos| of each pair for every gradient and centering, for readers who would have chosen another."""
    cosines: dict[str, dict[str, float]] = {}
    for loss in LOSSES:
        for center in (True, False):
            name = f"{loss}, {'centered' if center else 'not centered'}"
            cosines[name] = {}
            for i, claim in enumerate(CLAIMS):
                if claim in own and np.abs(grads[loss][own[claim].hook]).max() > 0:
                    components = Components.of(grads[loss][own[claim].hook], center=center, resamples=0, rng=rng)
                    cosines[name][claim] = float(components.cosines(own[claim].direction)[0][i])
    return cosines


def _span(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _words(pairs: Mapping[str, Mapping[str, Any]], able: float, least: float) -> str:
    parts = [
        f"{claim}–v{pair['component']} at {pair['hook']} {pair['cos']:.2f} {_span(pair['interval'])}, p = "
        f"{pair['p']:.3f}, {'resolved' if pair['resolved'] else 'not resolved'} (seed {pair['seed']})"
        for claim, pair in pairs.items()
    ]
    sentence = (
        "|cos| " + "; ".join(parts) if parts else "no generator has a direction at a hook that the answer depends on"
    )
    return (
        sentence if able >= least else f"{sentence}. The model doesn't do the task: best balanced accuracy {able:.2f}"
    )


def _left_out(asked: Sequence[str], own: Mapping[str, Direction], pairs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = [f"The null “{name}” was not asked for." for name in NULLS if name not in asked]
    for claim in CLAIMS:
        if claim not in own:
            notes.append(f"No hook of four or more channels has a live channel for “{claim}”.")
        elif claim not in pairs:
            notes.append(f"The gradient at {own[claim].hook}, the hook of “{claim}”, is zero.")
        elif not pairs[claim]["told"]:
            notes.append(
                f"No channel tells “{claim}” (partial R² {pairs[claim]['partial_r2']:.2f} at best), so its direction "
                "is shown but not judged."
            )
        elif not pairs[claim]["resolved"]:
            notes.append(
                f"v{pairs[claim]['component']} at {pairs[claim]['hook']} is not resolved, so it has no direction."
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
            "title": "Each generator with its component of the gradient, beside what chance gives",
            "summary": "Channels and rotated are 95 % quantiles. Untrained is the largest of three models. Shuffled is "
            "the larger |cos| with the other two components.",
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
