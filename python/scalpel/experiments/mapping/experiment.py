"""Do three generators explain what the channels do: detector, aggregator, threshold?

The seed says that three maps explain the activations: update (this token is "["), mean (m = s/n, the share of "["
among the tokens so far) and threshold (1[m > θ]). Each is put to every live channel of every hook, over lists of
several amounts of evidence k, and scored by partial R² on other prompts in other cells of the (k, n) plane: the mean
and the threshold beyond n, position and the current token, the update beyond n and position. A channel is mapped to a
claim if that is at least one half, more than the nulls ever give, not told as well by another variable, and if setting
the channel to the value predicted for another m (or token) moves the answer as predicted and further than random
channels do.

Nulls. "untrained": untrained models, whose largest score over channels and variables each channel must beat (token
identity is readable in any embedding), and one of which goes through the whole analysis. "shuffled": wrong variables,
shares of random classes of tokens; shuffled labels would be too weak, since an averaging head carries the share of
anything. A mean or threshold must beat what the best channel tells of hundreds of such classes, so for these two the
rate at which wrong variables are mapped checks the correction; for the update it counts detectors of other tokens.
"rotated": random directions of each hook instead of its channels.
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
from .decide import Decided, decide, shares
from .scan import BAR, CLAIMS, LEVELS, READABLE, RIVALS, HookScan, Setup, reference, scan, untrained_seeds

QUESTION = "Are there channels that detect “[”, that average it, and that compare the average with a threshold?"
SEED_FIGURE = "3 generators explain 81 activation patterns; 41/81 mapped"
HALF, FALSE = 0.5, 0.01
RULE = (
    "Reproduced iff each of the three claims is mapped to a channel of some hook, the share of hooks with a mapped "
    "channel is one half or more (with its whole 95 % interval by prompt), and at most 1 % of each null's tests (hook "
    "by claim, untrained and wrong variables) are mapped. Indistinguishable where the interval holds one half, or "
    "where that holds only if channels count that another claim or a rival variable explains as well. Not testable "
    "where the model nowhere tells the depths apart with the accuracy asked, or without the untrained null, against "
    "which alone the update is held; nor is anything reproduced without the wrong variables."
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
    """Every live channel of ``model`` against the three claims.

    ``amounts``: evidence k, 1 being a list of depth 1; ``prompts``: lists of each amount to fit on, and as many to
    score on, of ``length`` tokens; ``draws``: of each null's largest score, which bounds p from below by
    1/(draws + 1); ``wrong``: wrong variables that go through the whole analysis; ``rotations``: random directions a
    hook; ``cap``: channels of a hook that are set, for each claim; ``least_accuracy``: the balanced accuracy over both
    depths that the model must reach at some length. Refused for a model without a tokenizer that knows the answers.
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
            "summary": "each claim has its channels, half of the hooks have one, and the nulls have none",
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
        # The untrained model is held against the other untrained one, as the trained model is against both.
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
            "channels": [found.row() for claim in CLAIMS for found in decided.found[claim]],
            "by_hook": {hook: _hook_row(scans[hook], decided) for hook in scans},
            "thetas": dict(zip((*(f"quantile {q}" for q in LEVELS), "the model's own"), setup.thetas, strict=True)),
            "rivals": f"a mean or a threshold must not be explained as well by {', '.join(RIVALS)}",
            "caution": caution(model),
            "left_out": _left_out(asked_nulls, decided, draws, len(scans)),
        },
        interval={
            "summary": f"share of hooks with a mapped channel {share[0]:.0%} [{share[1]:.0%}, {share[2]:.0%}] (95 % "
            f"bootstrap over {int(setup.prompts.fits.size // 2)} scored prompts, prompts set, and "
            "random channels; the correction over hooks held fixed)",
            "share_of_hooks": list(share[1:]),
            "null_rate": rate["interval"],
        },
        null={
            "summary": "; ".join([f"{name}: {row['words']}" for name, row in null.items()]) or "none asked for",
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
    """The verdict by RULE. ``share``: of hooks, with its interval; ``loose``: whether each claim is mapped, and the
    share of hooks, if ambiguous channels count; ``null_rate``: NaN where the untrained null wasn't asked for.
    """
    if not able or np.isnan(null_rate):
        return "not testable here"
    if null_rate > FALSE:
        return "not reproduced"
    if all(by_claim[claim] for claim in CLAIMS) and share[2] >= HALF:
        return "reproduced" if share[1] >= HALF else "indistinguishable"
    return "indistinguishable" if loose[0] and loose[1] >= HALF else "not reproduced"


def checked_length(model: CircuitGPT, amounts: Sequence[int], length: int) -> int:
    """``length``, or what the context holds. ValueError where amounts are too few, or too many to fit a list,
    and for a model without a tokenizer that knows the answers.
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
    """What a null's whole analysis mapped: hook by claim, and channel by claim; ``mark`` picks the wrong variables."""
    groups = [group for group in decided.found if (mark in group if mark else "~" not in group)]
    mapped = [found for group in groups for found in decided.found[group] if found.mapped]
    pairs = {(found.hook, found.claim) for found in mapped}
    tests, live = len(scans) * len(groups), sum(one.live for one in scans.values()) * len(groups)
    best = {
        claim: max(scans[hook].top[group].best for hook in scans for group in groups if group.startswith(claim))
        for claim in CLAIMS
    }
    row = {
        "mapped_hooks": len({found.hook for found in mapped}),
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
    """Mapped share of tests, hook by claim, of the null that maps most, with its Clopper-Pearson interval; NaN without
    a null.
    """
    if not rows:
        return {"null": None, "rate": float("nan"), "interval": [float("nan")] * 2, "tests": 0}
    name = max(rows, key=lambda name: rows[name]["mapped"] / rows[name]["tests"])
    mapped, tests = rows[name]["mapped"], rows[name]["tests"]
    return {"null": name, "rate": mapped / tests, "interval": list(clopper_pearson(mapped, tests)), "tests": tests}


def _with_ambiguous(decided: Decided, hooks: list[str]) -> tuple[bool, float]:
    """Whether each claim is mapped, and the share of hooks that are, if ties count."""
    loose = {
        claim: {f.hook for f in decided.found[claim] if f.mapped or (f.outcome == "ambiguous" and f.r2 >= BAR)}
        for claim in CLAIMS
    }
    return all(loose.values()), len(set().union(*loose.values())) / len(hooks)


def _counts(
    scans: Mapping[str, HookScan],
    decided: Decided,
    by_claim: Mapping[str, list[str]],
    share: tuple[float, float, float],
) -> dict[str, Any]:
    found = [f for claim in CLAIMS for f in decided.found[claim] if f.r2 >= BAR]
    outcomes = sorted({f.outcome for f in found})
    return {
        "hooks": len(scans),
        "hooks_mapped": len({f.hook for f in found if f.mapped}),
        "share_of_hooks": share[0],
        "hooks_mapped_by_claim": dict(by_claim),
        "live_channels": sum(one.live for one in scans.values()),
        "channels_mapped": len({f.node for f in found if f.mapped}),
        "channels_mapped_by_claim": {c: sum(f.mapped for f in decided.found[c]) for c in CLAIMS},
        "channels_passing_r2_and_p_by_claim": {c: sum(decided.passing[c].values()) for c in CLAIMS},
        "channels_not_set_by_the_cap": decided.untested,
        "outcome_of_those_set": {
            claim: {o: sum(f.outcome == o for f in found if f.claim == claim) for o in outcomes} for claim in CLAIMS
        },
        "hooks_where_single_tokens_are_readable": {
            name: sum(one.readable[name] >= BAR for one in scans.values()) for name in READABLE
        },
    }


def _hook_row(one: HookScan, decided: Decided) -> dict[str, Any]:
    return {
        "live": one.live,
        "channels": one.width,
        "best_r2": {claim: one.top[claim].best for claim in CLAIMS} | one.rivals,
        "p": {claim: one.top[claim].best_p for claim in CLAIMS},
        "mapped": [c for c in CLAIMS if any(f.mapped and f.hook == one.hook for f in decided.found[c])],
    }


def _words(counts: Mapping[str, Any], able: float, least: float) -> str:
    hooks, total = counts["hooks_mapped"], counts["hooks"]
    parts = ", ".join(f"{claim} in {len(found)}" for claim, found in counts["hooks_mapped_by_claim"].items())
    said = (
        f"{hooks} of {total} hooks have a mapped channel ({parts}); {counts['channels_mapped']} of "
        f"{counts['live_channels']} live channels. The seed's 41 of 81 is a share of 51 %, here it is "
        f"{hooks / total:.0%}"
    )
    return said if able >= least else f"{said}. The model doesn't do the task: best balanced accuracy {able:.2f}"


def _left_out(asked: Sequence[str], decided: Decided, draws: int, hooks: int) -> list[str]:
    notes = [
        "Token classes other than “[” are only reported as readable: the law makes no prediction of what setting them "
        "does.",
        "Labels shuffled between rows are not used as a null: they are too weak, an untrained model beats them.",
    ]
    notes += [f"The null “{name}” was not asked for." for name in NULLS if name not in asked]
    fewest = -(-20 * hooks // (draws + 1))  # hooks that must pass together at a false discovery rate of 1 in 20
    if fewest > 1:
        notes.append(
            f"p can't be below 1/{draws + 1}, so a claim must hold in {fewest} hooks or more to be found: raise "
            "the option 'draws'."
        )
    if decided.untested:
        notes.append(
            f"{decided.untested} channels above the bar were not set, by the option 'cap'; more may be mapped."
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
            "title": f"Hooks, of {len(scans)}, with a channel mapped to each claim, and in the nulls",
            "summary": "A null's bar counts hooks in which any of its variables was mapped.",
            "ylabel": "hooks",
            "labels": labels,
            "values": values,
            "reference": [{"y": len(scans) / 2, "label": "half of the hooks"}],
        }
    }
    x = list(range(len(scans)))
    for claim in CLAIMS:
        series = [{"label": "this model", "x": x, "y": [max(0.0, one.top[claim].best) for one in scans.values()]}]
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
