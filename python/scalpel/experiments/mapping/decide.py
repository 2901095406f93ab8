"""Decide which channels are mapped: the bar, the correction over hooks, setting channels, and ties between claims."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ..statistics import bootstrap, discoveries, percentile_interval
from .claims import BAR, CLAIMS, RIVALS, Setup
from .measure import directions_moved
from .scan import HookScan, Top

__all__ = ["Candidate", "decide", "shares"]

SET_LENGTH = 48  # tokens of the prompts in which channels are set
SET_PROMPTS = 3  # how many of them there are for each amount of evidence
_RESAMPLES = 200


@dataclass(frozen=True)
class Candidate:
    """One channel of a hook (or random direction) that could belong to a claim.

    Attributes:
        hook: The hook.
        node: The channel as "hook:number", or the hook's random direction.
        claim: The claim's group.
        r2: Partial R².
        low, high: The 95 % interval of ``r2`` by prompt.
        p: p of ``r2``, by the maximum over channels and variables.
        movement: How far setting the channel moved the logit difference in the predicted direction.
        movement_low, movement_high: The interval of that.
        random_movement: The 95 % quantile of the same for random channels of the hook; 0 if none were needed.
        random_channels: How many random channels that was.
        told: By R² alone: "mapped", "ambiguous", or the name of a better claim or rival.
        outcome: ``told``, or "does not move the output".
        draws: For each resample (of scored prompts, of the prompts in which it was set, of random channels), whether
            the channel passes the bar and moves the output.
    """

    hook: str
    node: str
    claim: str
    r2: float
    low: float
    high: float
    p: float
    movement: float
    movement_low: float
    movement_high: float
    random_movement: float
    random_channels: int
    told: str
    outcome: str
    draws: np.ndarray = field(repr=False)

    @property
    def mapped(self) -> bool:
        """Whether the channel counts as mapped to its claim."""
        return self.outcome == "mapped" and self.r2 >= BAR

    def row(self) -> dict[str, Any]:
        """The fields but ``draws``, for a Result."""
        return {name: value for name, value in asdict(self).items() if name != "draws"}


@dataclass(frozen=True)
class Decided:
    """What was decided.

    Attributes:
        candidates: The channels that were set, by group.
        significant: The hooks whose best score exceeds the nulls', by group.
        passing: How many channels pass the bar and the nulls, by group and hook.
        untested: How many channels above the bar were not set, because of the cap.
    """

    candidates: dict[str, list[Candidate]]
    significant: dict[str, list[str]]
    passing: dict[str, dict[str, int]]
    untested: int


def decide(model: CircuitGPT, setup: Setup, scans: Mapping[str, HookScan], *, cap: int, seed: int) -> Decided:
    """Decide which channels are mapped.

    For each group, the hooks are corrected by Benjamini and Hochberg. At most ``cap`` channels of a hook and group are
    set, on prompts drawn with ``seed``.
    """
    rng = np.random.default_rng([seed, 19])
    by_prompt = setup.prompts
    scored = np.unique(setup.asked.prompt[setup.asked.score])
    chosen = np.concatenate([scored[by_prompt.k[scored] == k][:SET_PROMPTS] for k in np.unique(by_prompt.k)])
    out = Decided({}, {}, {}, 0)
    untested = 0
    for group, (kind, _) in setup.groups.items():
        hooks = [hook for hook, scan in scans.items() if group in scan.top]
        if not hooks:
            continue
        p = np.array([scans[hook].top[group].best_p for hook in hooks])
        sure = discoveries(np.nan_to_num(p, nan=1.0))
        cut = float(p[sure].max()) if sure.any() else -1.0
        out.significant[group] = [hook for hook, yes in zip(hooks, sure, strict=True) if yes]
        out.passing[group] = {hook: int((scans[hook].top[group].passing_p <= cut).sum()) for hook in hooks}
        channels_set = []
        for hook in out.significant[group]:
            top = scans[hook].top[group]
            high = np.percentile(top.draws, 97.5, axis=0) if len(top.channels) else np.zeros(0)
            candidates = np.flatnonzero((top.p <= cut) & (high >= BAR))
            untested += int((top.r2[candidates[cap:]] >= BAR).sum())
            if len(candidates):
                channels_set += _set(model, setup, scans[hook], group, kind, candidates[:cap], chosen, rng)
        out.candidates[group] = channels_set
    return Decided(out.candidates, out.significant, out.passing, untested)


def _set(
    model: CircuitGPT,
    setup: Setup,
    scan: HookScan,
    group: str,
    kind: str,
    candidates: np.ndarray,
    chosen: np.ndarray,
    rng: np.random.Generator,
) -> list[Candidate]:
    """Set each candidate to the value that its regression predicts for another value of the claimed variable.

    The answer should move as predicted, and further than when random channels of the hook are set.
    """
    top = scan.top[group]
    length = min(SET_LENGTH, setup.prompts.ids.shape[1])
    # Random channels are moved as many of their own standard deviations as the best candidate.
    strongest = int(np.argmax(np.abs(top.beta[candidates]) / top.spread[candidates]))
    factor = float(top.beta[candidates][strongest] / top.spread[candidates][strongest])
    channels = np.concatenate([top.channels[candidates], scan.bystanders])
    slopes = np.concatenate([top.beta[candidates], factor * scan.bystander_spread[kind]])
    variables = np.concatenate([top.variable[candidates], np.full(len(scan.bystanders), top.variable[candidates][0])])
    other, weight = _other_values(setup, group, kind, variables, chosen, length)
    if scan.directions is None:
        directions = np.zeros((len(channels), scan.width), np.float32)
        directions[np.arange(len(channels)), channels] = 1.0
    else:
        directions = scan.directions[channels]

    def moved(part: slice) -> np.ndarray:
        shift = slopes[part, None, None] * other[part]
        change = directions_moved(model, setup.prompts, chosen, scan.hook, directions[part], shift)
        size = np.abs(weight[part]).sum(2)
        return np.asarray((weight[part] * change).sum(2) / np.where(size > 0, size, 1.0))

    movement = moved(slice(len(candidates)))
    intervals = [bootstrap(partial(_mean_of, by_prompt), len(chosen), rng, _RESAMPLES) for by_prompt in movement]
    # Random channels are needed only if some candidate moves the output as predicted.
    needed = len(scan.bystanders) > 0 and any(low > 0 for low, _ in intervals)
    others = moved(slice(len(candidates), None)) if needed else np.zeros((1, len(chosen)))
    most = float(np.quantile(np.abs(others.mean(1)), 0.95))
    again = rng.integers(len(chosen), size=(len(top.draws), len(chosen)))
    apart = rng.integers(len(others), size=(len(top.draws), len(others)))
    redrawn = np.take_along_axis(np.abs(others[:, again].mean(2)).T, apart, 1)
    beyond = movement[:, again].mean(2) > np.quantile(redrawn, 0.95, axis=1)
    set_here = []
    for i, j in enumerate(candidates):
        low, high = intervals[i]
        moves = low > 0 and movement[i].mean() > most
        name = f"{scan.hook}:{top.channels[j]}" if scan.directions is None else f"{scan.hook}, direction"
        r2_low, r2_high = percentile_interval(top.draws[:, j])
        tells = _tied(setup, top, int(j), group)
        set_here.append(
            Candidate(
                hook=scan.hook,
                node=name,
                claim=group,
                r2=float(top.r2[j]),
                low=r2_low,
                high=r2_high,
                p=float(top.p[j]),
                movement=float(movement[i].mean()),
                movement_low=low,
                movement_high=high,
                random_movement=most,
                random_channels=len(scan.bystanders) if needed else 0,
                told=tells,
                outcome=tells if moves else "does not move the output",
                draws=(top.draws[:, j] >= BAR) & beyond[i],
            )
        )
    return set_here


def _mean_of(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())


def _other_values(
    setup: Setup, group: str, kind: str, variables: np.ndarray, chosen: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much the claimed variable changes at every token, and the weight of every token's answer.

    Both are (variables, chosen, length). The sign of a weight is the predicted direction of the answer. A running
    statistic is mirrored at each question: it is moved as far to the other side of what is usual at that n, position
    and token, and more evidence must raise logit("]]\\n") - logit("]\\n"). For the update, a token of the class is
    made to look like none at its own place, and every later answer must fall.
    """
    change = np.zeros((len(variables), len(chosen), length))
    weight = np.zeros_like(change)
    if kind == "single":
        number = int(group.partition("~")[2] or -1) + 1
        is_one = setup.membership[number][setup.prompts.ids[chosen, :length].numpy()] > 0
        change[:] = -1.0 * is_one
        for row, asked in enumerate(setup.prompts.asked[chosen]):
            weight[:, row, asked[asked < length]] = -1.0
        return change, weight
    questions = setup.asked.at.shape[1]
    left = setup.at_asked[:, variables].T.reshape(len(variables), -1, questions)[:, chosen]
    at = setup.asked.at[chosen]
    rows, columns = np.nonzero(at < length)
    change[:, rows, at[rows, columns]] = -2.0 * left[:, rows, columns]
    weight[:, rows, at[rows, columns]] = -left[:, rows, columns]
    return change, weight


def _tied(setup: Setup, top: Top, j: int, group: str) -> str:
    """Judge one channel: "mapped" to the claim, "ambiguous", or the name of a claim or rival that it tells better.

    It is ambiguous if the 95 % interval by prompt of its lead over another claim or rival holds 0.
    """
    if group not in ("mean", "threshold"):
        return "mapped"
    thresholds = len(setup.thetas)
    point = top.others[:, j]
    best = {
        "mean": point[:, 0],
        "threshold": point[:, 1 : 1 + thresholds][:, np.nanargmax(np.nanmean(point[:, 1 : 1 + thresholds], 0))],
        **{name: point[:, 1 + thresholds + i] for i, name in enumerate(RIVALS)},
    }
    own = best.pop(group)
    ahead = {name: percentile_interval(own - other) for name, other in best.items()}
    beaten = [name for name, (_, high) in ahead.items() if high < 0]
    if beaten:
        return min(beaten, key=lambda name: ahead[name][1])
    return "ambiguous" if any(low <= 0 for low, _ in ahead.values()) else "mapped"


def shares(decided: Decided, hooks: list[str]) -> tuple[dict[str, list[str]], tuple[float, float, float]]:
    """The mapped hooks by claim, and the share of hooks mapped to any claim with its 95 % interval by prompt."""
    mapped = {claim: {channel.hook for channel in decided.candidates[claim] if channel.mapped} for claim in CLAIMS}
    by_claim = {claim: sorted(mapped[claim], key=hooks.index) for claim in CLAIMS}
    # A channel that moves the output in only some resamples counts in only those, so that the interval includes the
    # error of the setting.
    passed = [f for claim in CLAIMS for f in decided.candidates[claim] if f.told == "mapped" and f.movement_high > 0]
    count = len({f.hook for f in passed if f.mapped})
    if not passed:
        return by_claim, (0.0, 0.0, 0.0)
    drawn = np.zeros(len(passed[0].draws))
    for hook in {f.hook for f in passed}:
        drawn += np.any([f.draws for f in passed if f.hook == hook], axis=0)
    low, high = percentile_interval(drawn / len(hooks))
    share = count / len(hooks)
    return by_claim, (share, min(low, share), max(high, share))
