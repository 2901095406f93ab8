"""Do three generators explain what the channels do: a detector of "[", its average, and a threshold on the average?

Predicted: three maps explain the activations, as the seed says. Update tells whether this token is "["; mean tells
m = s/n, the share of "[" among the tokens so far; threshold tells 1[m > θ]. Each has its channels, half of the hooks
have such a channel, and the nulls have none.
Measured: the partial R² of each claim for every live channel of every hook, over lists of several amounts of evidence
k, scored on other prompts in other cells of the (k, n) plane. Mean and threshold are scored beyond n, position and the
current token; update is scored beyond n and position. A channel is mapped to a claim if its partial R² is at least one
half and exceeds what the nulls ever reach, if no other variable explains it as well, and if setting the channel to the
value predicted for another m (or token) moves the answer as predicted and further than random channels do.
Null: "untrained" gives the largest score over channels and variables that untrained models reach, which every channel
must beat, since token identity is readable in any embedding; one untrained model also goes through the whole analysis.
"shuffled" uses wrong variables: shares of random classes of tokens. "rotated" uses random directions of each hook
instead of its channels.

Shuffled labels would be too weak a null, since an averaging head carries the share of anything. A mean or a threshold
must beat what the best channel tells of hundreds of random classes, so for these two the rate at which wrong variables
are mapped checks the correction. For the update that rate counts detectors of other tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import closers
from ...tasks.refused import Refused
from ..controls import LEAST_ACCURACY
from ..nulls import NULLS, check_nulls, only_beside
from ..provenance import at_least, caution, check_share, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import clopper_pearson
from .claims import BAR, CLAIMS, LEVELS, READABLE, RIVALS, Setup
from .decide import Decided, decide, shares
from .scan import HookScan, reference, scan, untrained_seeds

QUESTION = "Are there channels that detect “[”, that average it, and that compare the average with a threshold?"
SEED_FIGURE = "3 generators explain 81 activation patterns; 41/81 mapped"
HALF, FALSE = 0.5, 0.01
RULE = (
    "Reproduced iff three things hold: each of the three claims is mapped to a channel of some hook; the share of "
    "hooks with a mapped channel is at least one half, with its whole 95 % interval by prompt; and at most 1 % of the "
    "tests (hook by claim) of the untrained null, and of the wrong variables, are mapped. Indistinguishable if the "
    "interval holds one half, or if these things hold only when channels count that another claim or a rival variable "
    "explains as well. Not testable if at no length the model tells the two depths apart with the required accuracy, "
    "or without the untrained null, which alone tests the update. Nothing is reproduced without the wrong "
    "variables."
)


def run(
    model: CircuitGPT,
    *,
    amounts: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    prompts: int = 16,
    length: int = 128,
    draws: int = 499,
    wrong: int = 20,
    rotations: int = 64,
    cap: int = 24,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """Test for every live channel of a model whether one of the three claims explains it.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        amounts: Amounts of evidence k; 1 stands for a list of depth 1, and three or more others are needed.
        prompts: Lists of each amount to fit on, and as many to score on.
        length: Tokens in a list; at most the context is used.
        draws: Draws of each null's largest score. They bound p from below by 1/(draws + 1).
        wrong: Wrong variables that go through the whole analysis.
        rotations: Random directions of each hook, for the null "rotated".
        cap: The most channels of a hook that are set for each claim.
        seed: Seed of the prompts, of the nulls and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".
        nulls: "untrained", "shuffled" and "rotated", as the module describes them.

    Returns:
        A Result; ``measured["counts"]`` sums it up and ``measured["channels"]`` lists the channels that were set.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or a list of ``length`` tokens is too
            short.
        ValueError: An option is out of range, the amounts are too few, or a null is unknown.
    """
    asked_nulls = check_nulls(nulls)
    at_least(4, prompts=prompts)
    at_least(1, cap=cap, wrong=wrong, rotations=rotations)
    at_least(19, draws=draws)
    at_least(0, seed=seed)
    check_share(least_accuracy=least_accuracy)
    length = checked_length(model, amounts, length)
    options = {"amounts": amounts, "prompts": prompts, "length": length, "draws": draws, "wrong": wrong, "cap": cap}
    provenance = model_provenance(model, **options, seed=seed, least_accuracy=least_accuracy, nulls=asked_nulls)
    protocol = Protocol("mapping", QUESTION, SEED_FIGURE, provenance)
    protocol.predict(
        {
            "summary": "each claim has its channels, half of the hooks have such a channel, and the nulls have none",
            "share_of_hooks": HALF,
            "least_partial_r2": BAR,
            "sign": "more evidence raises logit(]]) - logit(])",
            "rule": RULE,
        }
    )
    protocol.measuring()
    setup = Setup.make(model, amounts, prompts, length, draws=draws, wrong=wrong, seed=seed)
    able = setup.able()
    blank = untrained_seeds(model, 2, seed) if "untrained" in asked_nulls else []
    references = [reference(other, setup, draws) for other in blank]
    shuffled = "shuffled" in asked_nulls
    scans = scan(model, setup, references, shuffled=shuffled, wrong=shuffled)
    decided = decide(model, setup, scans, cap=cap, seed=seed)
    by_claim, share = shares(decided, list(scans))
    null: dict[str, Any] = {}
    if blank:
        # One untrained model is compared with the other, as the trained model is with both.
        bare = scan(blank[0], setup, references[1:], shuffled=shuffled)
        null["untrained"] = _null_row(bare, decide(blank[0], setup, bare, cap=cap, seed=seed), "")
    if shuffled:
        null["shuffled"] = _null_row(scans, decided, "~")
    if "rotated" in asked_nulls:
        turned = scan(model, setup, references, shuffled=shuffled, rotated=rotations)
        null["rotated"] = _null_row(turned, decide(model, setup, turned, cap=cap, seed=seed), "")
    rate = _worst({name: null[name] for name in ("untrained", "shuffled") if name in null} if blank else {})
    loose = _with_ambiguous(decided, list(scans))
    counts = _counts(scans, decided, by_claim, share)
    return protocol.conclude(
        measured={
            "summary": _words(counts, able, least_accuracy),
            "best_balanced_accuracy_at_one_length": able,
            "counts": counts,
            "channels": [candidate.row() for claim in CLAIMS for candidate in decided.candidates[claim]],
            "by_hook": {hook: _hook_row(scans[hook], decided) for hook in scans},
            "thetas": dict(zip((*(f"quantile {q}" for q in LEVELS), "the model's own"), setup.thetas, strict=True)),
            "rivals": f"a channel of a mean or a threshold must not be explained as well by {', '.join(RIVALS)}",
            "caution": caution(model),
            "left_out": _left_out(asked_nulls, decided, draws, len(scans)),
        },
        interval={
            "summary": f"share of hooks with a mapped channel {share[0]:.0%} [{share[1]:.0%}, {share[2]:.0%}] (95 % "
            f"bootstrap over {int(setup.prompts.fits.size // 2)} scored prompts, set prompts and "
            "random channels, with the correction over hooks held fixed)",
            "share_of_hooks": list(share[1:]),
            "null_rate": rate["interval"],
        },
        null={
            "summary": "; ".join([f"{name}: {row['words']}" for name, row in null.items()]) or "no null was asked for",
            **null,
            "rate": rate,
        },
        verdict=only_beside(
            ("shuffled",), asked_nulls, verdict(by_claim, share, rate["rate"], loose, able >= least_accuracy)
        ),
        figures=_figures(scans, by_claim, null, references),
    )


def verdict(
    by_claim: Mapping[str, Sequence[str]],
    share: tuple[float, float, float],
    null_rate: float,
    loose: tuple[bool, float],
    able: bool,
) -> Verdict:
    """The verdict that RULE gives.

    Args:
        by_claim: Mapped hooks by claim.
        share: The share of hooks with a mapped channel, and the ends of its interval.
        null_rate: The mapped share of a null's tests; NaN if the untrained null was not asked for.
        loose: Whether each claim is mapped, and the share of hooks, if ambiguous channels count.
        able: Whether the model can do the task.
    """
    if not able or np.isnan(null_rate):
        return "not testable here"
    if null_rate > FALSE:
        return "not reproduced"
    if all(by_claim[claim] for claim in CLAIMS) and share[2] >= HALF:
        return "reproduced" if share[1] >= HALF else "indistinguishable"
    return "indistinguishable" if loose[0] and loose[1] >= HALF else "not reproduced"


def checked_length(model: CircuitGPT, amounts: Sequence[int], length: int) -> int:
    """``length``, or what the context holds if that is less.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or lists with so many "[" don't fit.
        ValueError: The amounts are too few or repeated, or 1 is not among them.
    """
    if model.tokenizer is None:
        raise Refused("the model has no tokenizer; lists of brackets are text. Set model.tokenizer")
    closers(model.tokenizer)
    if len(set(amounts)) < 4 or min(amounts) != 1 or len(set(amounts)) < len(amounts):
        raise ValueError(
            f"option 'amounts' is {list(amounts)}; give 1, which is depth 1, and three or more different ones above it"
        )
    least = 32 + 4 * max(amounts)
    block = model.config.block_size
    if length < least or block < least:
        raise Refused(
            f"option 'length' is {length} and the context holds {block} tokens; lists with {max(amounts)} “[” need at "
            f"least {least}: give fewer brackets or a longer list"
        )
    return min(length, block)


def _null_row(scans: Mapping[str, HookScan], decided: Decided, mark: str) -> dict[str, Any]:
    """What the whole analysis mapped in a null, by hook and claim and by channel and claim.

    ``mark`` is "~" for the groups of wrong variables and empty for all others.
    """
    groups = [group for group in decided.candidates if (mark in group if mark else "~" not in group)]
    mapped = [channel for group in groups for channel in decided.candidates[group] if channel.mapped]
    pairs = {(channel.hook, channel.claim) for channel in mapped}
    tests, live = len(scans) * len(groups), sum(at_hook.live for at_hook in scans.values()) * len(groups)
    best = {
        claim: max(scans[hook].top[group].best for hook in scans for group in groups if group.startswith(claim))
        for claim in CLAIMS
    }
    row = {
        "mapped_hooks": len({channel.hook for channel in mapped}),
        "mapped": len(pairs),
        "tests": tests,
        "mapped_channels": len(mapped),
        "channel_tests": live,
        "passing_r2_and_p": sum(decided.passing[group][hook] for group in groups for hook in scans),
        "best_r2": best,
        "best_r2_by_hook": {
            claim: {
                hook: max(scans[hook].top[group].best for group in groups if group.startswith(claim)) for hook in scans
            }
            for claim in CLAIMS
        },
        "by_claim": {claim: len({hook for hook, group in pairs if group.startswith(claim)}) for claim in CLAIMS},
    }
    row["words"] = (
        f"{len(pairs)} of {tests} tests mapped ({len(mapped)} of {live} by channel), largest partial R² "
        + ", ".join(f"{claim} {value:.2f}" for claim, value in best.items())
    )
    return row


def _worst(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The null that maps the largest share of its tests (hook by claim), with that share and its interval.

    The interval is Clopper and Pearson's. Without a null the share is NaN.
    """
    if not rows:
        return {"null": None, "rate": float("nan"), "interval": [float("nan")] * 2, "tests": 0}
    name = max(rows, key=lambda name: rows[name]["mapped"] / rows[name]["tests"])
    mapped, tests = rows[name]["mapped"], rows[name]["tests"]
    return {"null": name, "rate": mapped / tests, "interval": list(clopper_pearson(mapped, tests)), "tests": tests}


def _with_ambiguous(decided: Decided, hooks: list[str]) -> tuple[bool, float]:
    """Whether each claim is mapped, and the share of mapped hooks, if ambiguous channels count."""
    loose = {
        claim: {f.hook for f in decided.candidates[claim] if f.mapped or (f.outcome == "ambiguous" and f.r2 >= BAR)}
        for claim in CLAIMS
    }
    return all(loose.values()), len(set().union(*loose.values())) / len(hooks)


def _counts(
    scans: Mapping[str, HookScan],
    decided: Decided,
    by_claim: Mapping[str, list[str]],
    share: tuple[float, float, float],
) -> dict[str, Any]:
    above_bar = [channel for claim in CLAIMS for channel in decided.candidates[claim] if channel.r2 >= BAR]
    outcomes = sorted({channel.outcome for channel in above_bar})
    return {
        "hooks": len(scans),
        "hooks_mapped": len({channel.hook for channel in above_bar if channel.mapped}),
        "share_of_hooks": share[0],
        "hooks_mapped_by_claim": dict(by_claim),
        "live_channels": sum(at_hook.live for at_hook in scans.values()),
        "channels_mapped": len({channel.node for channel in above_bar if channel.mapped}),
        "channels_mapped_by_claim": {
            claim: sum(channel.mapped for channel in decided.candidates[claim]) for claim in CLAIMS
        },
        "channels_passing_r2_and_p_by_claim": {claim: sum(decided.passing[claim].values()) for claim in CLAIMS},
        "channels_not_set_by_the_cap": decided.untested,
        "outcome_of_those_set": {
            claim: {o: sum(channel.outcome == o for channel in above_bar if channel.claim == claim) for o in outcomes}
            for claim in CLAIMS
        },
        "hooks_where_single_tokens_are_readable": {
            name: sum(at_hook.readable[name] >= BAR for at_hook in scans.values()) for name in READABLE
        },
    }


def _hook_row(at_hook: HookScan, decided: Decided) -> dict[str, Any]:
    return {
        "live": at_hook.live,
        "channels": at_hook.width,
        "best_r2": {claim: at_hook.top[claim].best for claim in CLAIMS} | at_hook.rivals,
        "p": {claim: at_hook.top[claim].best_p for claim in CLAIMS},
        "mapped": [c for c in CLAIMS if any(f.mapped and f.hook == at_hook.hook for f in decided.candidates[c])],
    }


def _words(counts: Mapping[str, Any], able: float, least: float) -> str:
    hooks, total = counts["hooks_mapped"], counts["hooks"]
    parts = ", ".join(
        f"{claim} in {len(claim_hooks)}" for claim, claim_hooks in counts["hooks_mapped_by_claim"].items()
    )
    sentence = (
        f"{hooks} of {total} hooks have a mapped channel ({parts}); {counts['channels_mapped']} of "
        f"{counts['live_channels']} live channels are mapped. The seed's 41 of 81 is a share of 51 %; here it is "
        f"{hooks / total:.0%}"
    )
    return (
        sentence if able >= least else f"{sentence}. The model doesn't do the task: best balanced accuracy {able:.2f}"
    )


def _left_out(asked: Sequence[str], decided: Decided, draws: int, hooks: int) -> list[str]:
    notes = [
        "Token classes other than “[” are only reported as readable, since the law doesn't predict what setting them "
        "does.",
        "Labels shuffled between rows are not used as a null: they are so weak that an untrained model beats them.",
    ]
    notes += [f"The null “{name}” was not asked for." for name in NULLS if name not in asked]
    fewest = -(-20 * hooks // (draws + 1))  # at a false discovery rate of 1 in 20, so many hooks must pass together
    if fewest > 1:
        notes.append(
            f"p can't be below 1/{draws + 1}, so a claim must hold in {fewest} hooks or more to be found; raise the "
            "option 'draws' to lower that."
        )
    if decided.untested:
        notes.append(
            f"{decided.untested} channels above the bar were not set, because of the option 'cap'; more may be mapped."
        )
    return notes


def _figures(
    scans: Mapping[str, HookScan],
    by_claim: Mapping[str, list[str]],
    null: Mapping[str, Any],
    references: Sequence[Mapping[str, Mapping[str, np.ndarray]]],
) -> dict[str, Any]:
    labels = [*CLAIMS, *(f"{name}: {claim}" for name in null for claim in CLAIMS)]
    values = [len(by_claim[claim]) for claim in CLAIMS]
    values += [row["by_claim"][claim] for row in null.values() for claim in CLAIMS]
    figures: dict[str, Any] = {
        "hooks": {
            "kind": "bars",
            "title": f"How many of {len(scans)} hooks have a channel mapped to each claim, here and in the nulls",
            "summary": "The bar of a null counts hooks in which any of its variables was mapped.",
            "ylabel": "hooks",
            "labels": labels,
            "values": values,
            "reference": [{"y": len(scans) / 2, "label": "half of the hooks"}],
        }
    }
    x = list(range(len(scans)))
    for claim in CLAIMS:
        series = [
            {"label": "this model", "x": x, "y": [max(0.0, at_hook.top[claim].best) for at_hook in scans.values()]}
        ]
        for name, row in null.items():
            best = [max(0.0, value) for value in row["best_r2_by_hook"][claim].values()]
            series.append({"label": name, "x": x, "y": best, "style": "dashed"})
        figures[f"r2_{claim}"] = {
            "kind": "curves",
            "title": f"Best partial R² of “{claim}” over the channels of each hook",
            "summary": "Hooks in the order of the forward pass: " + ", ".join(f"{i} {h}" for i, h in enumerate(scans)),
            "xlabel": "hook, in the order of the forward pass",
            "ylabel": "partial R², other cells",
            "series": series,
            "hlines": [{"y": BAR, "label": "the bar"}],
        }
    return figures
