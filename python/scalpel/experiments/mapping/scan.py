"""Score every channel of every hook for every claimed variable, beside the largest scores of the nulls."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ..statistics import draw_weights
from .claims import BAR, READABLE, RIVALS, Setup
from .measure import Scores, groups_of, record

__all__ = ["HookScan", "Top", "recorded", "reference", "scan", "scores_of", "untrained_seeds"]

_NEAR, _TOP = 0.3, 24  # the bootstrap keeps channels from this R² on, at most so many for each hook and group
_OTHERS = 20  # random channels that are set for comparison
_RESAMPLES = 200


@dataclass(frozen=True)
class Top:
    """The best channels (or directions) of one hook for one group.

    Attributes:
        channels: Their numbers, (channels,); so are the next five.
        variable: The variable of the group that each tells best.
        r2: Partial R² of that variable.
        beta: Slope of the channel on it.
        spread: Standard deviation of the channel.
        p: p of the R² among the largest scores of the nulls.
        draws: That R² for each resample of the prompts, (resamples, channels).
        others: R² of the mean, the thresholds and :data:`RIVALS`, (resamples, channels, variables).
        passing_p: p of all live channels above the bar.
        best: The largest R² of any live channel.
        best_p: Its p.
    """

    channels: np.ndarray
    variable: np.ndarray
    r2: np.ndarray
    beta: np.ndarray
    spread: np.ndarray
    p: np.ndarray
    draws: np.ndarray
    others: np.ndarray
    passing_p: np.ndarray
    best: float
    best_p: float


@dataclass(frozen=True)
class HookScan:
    """What was found at one hook.

    Attributes:
        hook: Its name.
        live: How many channels are live.
        width: How many channels there are.
        top: The best channels by group.
        bystanders: Random live channels that are among the best for no group.
        bystander_spread: Their standard deviation, by kind of rows.
        readable: Best R² for each token class of which the law predicts nothing.
        rivals: Best R² for each rival variable.
        directions: If random directions replace the channels, these (directions, channels).
    """

    hook: str
    live: int
    width: int
    top: dict[str, Top]
    bystanders: np.ndarray
    bystander_spread: dict[str, np.ndarray]
    readable: dict[str, float]
    rivals: dict[str, float]
    directions: np.ndarray | None = None


def untrained_seeds(model: CircuitGPT, count: int, seed: int) -> list[CircuitGPT]:
    """Untrained models of the same shape and density: ``untrained(model)`` first, then others with other seeds."""
    models = [untrained(model)]
    for i in range(1, count):
        other = copy.copy(model)  # it shares the weights and has only its own card, which names the seed
        other.card = {"recipe": {"seed": 1000 * (seed + 1) + i}}
        models.append(untrained(other))
    return models[:count]


def recorded(model: CircuitGPT, setup: Setup) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (hook, values at the questions, values at single tokens), both (rows, channels)."""
    at = np.concatenate([setup.asked.at, setup.single.at], 1)
    questions = setup.asked.at.shape[1]
    for group in groups_of(model, at.size):
        values = record(model, setup.prompts, group, at)
        for hook in group:
            here = values.pop(hook).reshape(*at.shape, -1)
            yield hook, here[:, :questions].reshape(-1, here.shape[2]), here[:, questions:].reshape(-1, here.shape[2])


def scores_of(setup: Setup, asked: np.ndarray, single: np.ndarray) -> dict[str, Scores]:
    """Scores of recorded values by kind of rows, for every variable of the setup and every channel."""
    return {
        "asked": Scores.of(setup.asked, setup.at_asked, asked),
        "single": Scores.of(setup.single, setup.at_single, single),
    }


def _weights(count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    return draw_weights(count, rng, draws).astype(np.float32)


def reference(model: CircuitGPT, setup: Setup, draws: int) -> dict[str, dict[str, np.ndarray]]:
    """Draws of the largest R² of any channel and variable in an untrained model, by hook and group.

    The prompts are resampled ``draws`` times.
    """
    rng = np.random.default_rng([setup.seed, 13])
    by_hook = {}
    for hook, asked, single in recorded(model, setup):
        scores = scores_of(setup, asked, single)
        weights = {kind: _weights(of_kind.prompts, draws, rng) for kind, of_kind in scores.items()}
        by_hook[hook] = {
            name: np.max(
                [
                    np.nan_to_num(scores[kind].reweighted(weights[kind], v), nan=-np.inf).max(1)
                    for v in range(columns.start, columns.stop)
                ],
                axis=0,
            )
            for name, (kind, columns) in setup.groups.items()
        }
    return by_hook


def scan(
    model: CircuitGPT,
    setup: Setup,
    references: Sequence[Mapping[str, Mapping[str, np.ndarray]]],
    *,
    shuffled: bool = True,
    rotated: int = 0,
    wrong: bool = False,
) -> dict[str, HookScan]:
    """Score every hook for every claim.

    Args:
        model: The model.
        setup: Lists, rows and variables.
        references: Draws of untrained models, as :func:`reference` gives them.
        shuffled: Whether running statistics are also compared with those of wrong classes.
        rotated: If above 0, this many random directions of each hook take the place of its channels.
        wrong: Whether the groups of wrong classes are scored too.
    """
    rng = np.random.default_rng([setup.seed, 17, rotated])
    scans = {}
    for hook, asked, single in recorded(model, setup):
        directions = None
        if rotated:
            asked, single, directions = _turned(asked, single, setup, rotated, rng)
        scores = scores_of(setup, asked, single)
        drawn = _null_maxima(setup, asked) if shuffled else {}
        top = {}
        for name, (kind, columns) in setup.groups.items():
            if "~" in name and not wrong:
                continue
            nulls = [np.concatenate([drawn_maxima[hook][name] for drawn_maxima in references])] if references else []
            claim = name.partition("~")[0]
            nulls += [drawn[claim]] if claim in drawn else []
            top[name] = _top(scores[kind], columns, nulls, kind == "asked", len(setup.thetas), rng)
        near = np.unique(np.concatenate([of_group.channels for of_group in top.values()]))
        alive = np.flatnonzero(scores["asked"].live & scores["single"].live)
        free = np.setdiff1d(alive, near)
        bystanders = rng.permutation(free)[:_OTHERS]
        wide = 1 + len(setup.thetas)
        scans[hook] = HookScan(
            hook,
            int((scores["asked"].live | scores["single"].live).sum()),
            asked.shape[1],
            top,
            bystanders,
            {kind: of_kind.spread[bystanders] for kind, of_kind in scores.items()},
            {name: float(scores["single"].best([1 + i]).max()) for i, name in enumerate(READABLE)},
            {name: float(scores["asked"].best([wide + i]).max()) for i, name in enumerate(RIVALS)},
            directions,
        )
    return scans


def _turned(
    asked: np.ndarray, single: np.ndarray, setup: Setup, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project both kinds of rows on random unit directions of the channels, which are first scaled to equal spread.

    The third result is how far the hook's values move along each direction for a change of one.
    """
    spread = np.maximum(asked[setup.asked.fit].std(0), single[setup.single.fit].std(0))
    alive = spread > 1e-5 * max(spread.max(), 1e-30)
    turn = rng.standard_normal((min(count, max(1, int(alive.sum()))), asked.shape[1])).astype(np.float32) * alive
    turn /= np.maximum(np.linalg.norm(turn, axis=1, keepdims=True), 1e-30)
    scale = np.where(alive, spread, 1.0).astype(np.float32)
    return asked / scale @ turn.T, single / scale @ turn.T, turn * scale


def _null_maxima(setup: Setup, values: np.ndarray) -> dict[str, np.ndarray]:
    """The largest R² of any channel for each wrong class drawn, (draws,), for "mean" and for "threshold"."""
    chosen = setup.asked.fit | setup.asked.score
    fit = setup.asked.fit[chosen]
    left = setup.asked.design.residuals(values)[chosen]
    left = left[:, values[setup.asked.fit].std(0) > 1e-5 * max(values[setup.asked.fit].std(0).max(), 1e-30)]
    total = np.square(left[~fit]).sum(0)
    norm = np.square(setup.null[fit]).sum(0)
    beta = (setup.null[fit].T @ left[fit]) / np.maximum(norm, 1e-9)[:, None]
    captured = 2 * beta * (setup.null[~fit].T @ left[~fit]) - beta**2 * np.square(setup.null[~fit]).sum(0)[:, None]
    best = np.where(norm > 1e-9 * fit.sum(), (captured / np.maximum(total, 1e-30)).max(1, initial=-np.inf), -np.inf)
    best = best.reshape(-1, 1 + len(setup.thetas))
    return {"mean": best[:, 0], "threshold": best[:, 1:].max(1)}


def _top(
    scores: Scores, columns: slice, nulls: list[np.ndarray], rivals: bool, thetas: int, rng: np.random.Generator
) -> Top:
    best = scores.best(columns)
    variable = columns.start + np.nan_to_num(scores.r2[columns], nan=-np.inf).argmax(0)
    p = (
        np.max([(1 + (maxima[:, None] >= best).sum(0)) / (1 + len(maxima)) for maxima in nulls], axis=0)
        if nulls
        else None
    )
    p = np.full(len(best), np.nan) if p is None else p
    near = np.argsort(-best)[:_TOP]
    near = near[best[near] >= _NEAR]
    weights = _weights(scores.prompts, _RESAMPLES, rng)
    draws = (
        np.stack([scores.reweighted(weights, int(variable[c]), np.array([c]))[:, 0] for c in near], 1)
        if len(near)
        else np.zeros((_RESAMPLES, 0))
    )
    seen = range(1 + thetas + len(RIVALS)) if rivals and len(near) else range(0)
    others = [scores.reweighted(weights, v, near) for v in seen]
    return Top(
        channels=near,
        variable=variable[near],
        r2=best[near],
        beta=scores.beta[variable[near], near],
        spread=scores.spread[near],
        p=p[near],
        draws=draws,
        others=np.stack(others, 2) if others else np.zeros((_RESAMPLES, len(near), 0)),
        passing_p=p[best >= BAR],
        best=float(best.max(initial=-np.inf)),
        best_p=float(p[best.argmax()]) if len(best) else float("nan"),
    )
