"""Critical lengths: where P(correct) falls through one half, with intervals by prompt, and the laws fitted to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import long_lists, preference
from ..statistics import percentile_interval, redraw

DIP = 16  # a curve "stays above" only if P(correct) exceeds one half in every window of so many tokens
ELEMENT = 2  # tokens of an element and its comma; two questions are never closer than that


@dataclass(frozen=True)
class Curve:
    """Answers along prompts.

    ``x`` (prompts, questions): the context length at each question, in tokens. ``right``, bool of the same shape:
    whether the answer is right there.
    """

    x: np.ndarray
    right: np.ndarray

    def sample(self, prompts: np.ndarray) -> "Curve":
        """The curve of the prompts with these indices; repeats are allowed."""
        return Curve(self.x[prompts], self.right[prompts])

    def sign_changes(self) -> float:
        """Mean number of times that the answer changes along a prompt; a clean threshold gives at most one change."""
        return float((self.right[:, 1:] != self.right[:, :-1]).sum(1).mean()) if self.right.shape[1] > 1 else 0.0

    def binned(self, edges: np.ndarray) -> np.ndarray:
        """P(correct) in each bin [edges[i], edges[i+1]); NaN where nothing was asked."""
        which = np.digitize(self.x.ravel(), edges) - 1
        inside = (which >= 0) & (which < len(edges) - 1)
        asked = np.bincount(which[inside], minlength=len(edges) - 1)
        right = np.bincount(which[inside], weights=self.right.ravel()[inside], minlength=len(edges) - 1)
        return np.divide(right, asked, out=np.full(len(asked), np.nan), where=asked > 0)


@dataclass(frozen=True)
class Critical:
    """The length at which P(correct) falls through one half. Figures that the status leaves undefined are NaN.

    Attributes:
        value: Where the logistic fit crosses one half, in tokens. With the status "above", the longest length asked.
        isotonic: Where the best non-increasing curve crosses one half.
        low, high: 95 % bootstrap interval by prompt, over the resamples that cross inside what was asked.
        error: Standard error over the same resamples.
        status: "crosses"; "above" if P(correct) stays above one half as far as was asked; "below" if it is below one
            half from the start; "none" otherwise, since a curve that hovers or comes back has no critical length.
        sign_changes: Mean number of times that the answer changes along a prompt.
        prompts: How many prompts were asked.
        crossing_resamples: How many of the 200 resamples cross.
        draws: The critical lengths of these resamples.
    """

    value: float
    isotonic: float
    low: float
    high: float
    error: float
    status: str
    sign_changes: float
    prompts: int
    crossing_resamples: int
    draws: np.ndarray

    def text(self) -> str:
        """The value with its interval, as a table shows it."""
        if self.status == "above":
            return f"> {self.value:.0f}"
        if self.status == "below":
            return f"< {self.value:.0f}"
        if self.status == "none":
            return "no crossing"
        return f"{self.value:.0f} [{self.low:.0f}, {self.high:.0f}]"


def critical(curve: Curve, rng: np.random.Generator, resamples: int = 200) -> Critical:
    """The critical length of a curve, by a logistic fit of ``right`` on ``x`` that is bootstrapped by prompt."""
    count = len(curve.right)
    value, isotonic, status = crossing(curve)
    crossings = redraw(lambda rows: crossing(curve.sample(rows)), count, rng, resamples)
    draws = np.array([draw for draw, _, kind in crossings if kind == "crosses"])
    low = high = spread = float("nan")
    if status == "crosses" and len(draws):
        low, high = percentile_interval(draws)
        spread = float(np.std(draws))
    return Critical(value, isotonic, low, high, spread, status, curve.sign_changes(), count, len(draws), draws)


def crossing(curve: Curve) -> tuple[float, float, str]:
    """Where P(correct) falls through one half: (by the logistic fit, by the isotonic fit, status).

    The logistic crossing counts only if two things hold. The isotonic crossing, which assumes no shape, lies within
    four elements or a quarter of its length of it. And P(correct) is below 0.4 over the longest quarter of lengths, or
    over the part of that quarter beyond the crossing, so that a curve which sinks to one half and stays there has
    no critical length. A curve that stays above one half on average, but dips to it over any 16 tokens, has none
    either.
    """
    x, index = np.unique(curve.x, return_inverse=True)
    asked = np.bincount(index.ravel()).astype(float)
    p = np.bincount(index.ravel(), weights=curve.right.ravel()) / asked
    least, most = float(x[0]), float(x[-1])
    falling = isotonic_regression(p, weights=asked, increasing=False).x
    under = np.flatnonzero(falling <= 0.5)
    nan = float("nan")
    if len(under) == 0:
        window = ((x - least) // DIP).astype(int)
        dips = np.bincount(window, p * asked)[np.unique(window)] / np.bincount(window, asked)[np.unique(window)]
        return (most, most, "above") if dips.min() > 0.5 else (nan, nan, "none")
    isotonic = float(x[under[0]])
    long = x >= max(least + 0.75 * (most - least), isotonic)
    end = float((p * asked)[long].sum() / asked[long].sum())
    if under[0] == 0:
        return (least, least, "below") if end < 0.4 else (nan, least, "none")
    intercept, slope = logistic_fit(curve.x.ravel().astype(float), curve.right.ravel().astype(float))
    fitted = -intercept / slope if slope < 0 else float("inf")
    near = abs(fitted - isotonic) <= max(4 * ELEMENT, 0.25 * isotonic)
    if end >= 0.4 or not near or not least <= fitted <= most:
        return nan, isotonic, "none"
    return fitted, isotonic, "crosses"


def logistic_fit(x: np.ndarray, y: np.ndarray, ridge: float = 1e-3) -> tuple[float, float]:
    """Fit P(y) = 1 / (1 + exp(-(intercept + slope x))) by Newton's method and return (intercept, slope).

    The small ridge on the standardised slope keeps the fit finite if the answers separate perfectly. The crossing of
    one half then lies in the middle of the gap.
    """
    centre, scale = x.mean(), x.std() or 1.0
    values, index = np.unique(x, return_inverse=True)
    asked = np.bincount(index).astype(float)
    right = np.bincount(index, weights=y)
    design = np.stack([np.ones(len(values)), (values - centre) / scale], 1)
    penalty = np.diag([0.0, ridge])
    weights = np.zeros(2)

    def objective(w: np.ndarray) -> float:
        z = design @ w
        return float((asked * np.logaddexp(0, z) - right * z).sum() + w @ penalty @ w / 2)

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        gradient = design.T @ (asked * p - right) + penalty @ weights
        hessian = design.T @ (design * (asked * p * (1 - p))[:, None]) + penalty + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size, now = 1.0, objective(weights)
        while objective(weights - size * step) > now and size > 1e-8:  # the full step may overshoot
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    slope = weights[1] / scale
    return float(weights[0] - slope * centre), float(slope)


def ask_long_lists(model: CircuitGPT, k: int, *, depth: int = 2, prompts: int, length: int, seed: int) -> Curve:
    """The model's answers along lists of evidence k, up to ``length`` tokens; x is n, the number of attended keys."""
    assert model.tokenizer is not None
    lists = long_lists(model.tokenizer, k, length, prompts, block_size=model.config.block_size, depth=depth, seed=seed)
    right = (preference(model, lists) > 0) == (depth == 2)
    return Curve(lists.n.numpy(), right.numpy())


Law = Callable[[float], float]


def fit_laws(lengths: Mapping[int, float]) -> dict[str, tuple[Law, dict[str, float]]]:
    """Fit each law's n*(k) by least squares to measured critical lengths {k: n}.

    "seed" is n* = k/θ; "sink" is n* = k/θ − σ with σ ≥ 0. The rivals are "constant" and "affine", which is the sink's
    line with the sign of σ left free. With two calibration points the two-parameter laws pass through both.

    Returns:
        By name: (the law as a function of k, its parameters).
    """
    k = np.array(list(lengths), dtype=float)
    n = np.array(list(lengths.values()), dtype=float)
    per_evidence = float((k * n).sum() / (k * k).sum())
    constant = float(n.mean())
    slope, intercept = (float(v) for v in np.polyfit(k, n, 1)) if len(k) > 1 else (0.0, constant)
    # Under σ ≥ 0 the best line keeps the free intercept if that is negative, and has no intercept otherwise.
    sink_slope, sink = (slope, -intercept) if intercept < 0 and slope > 0 else (per_evidence, 0.0)
    return {
        "seed": (lambda k: float(np.ceil(k * per_evidence - 1e-9)), {"theta": 1 / per_evidence}),
        "sink": (lambda k: k * sink_slope - sink, {"theta": 1 / sink_slope, "sigma": sink}),
        "constant": (lambda k: constant, {"n": constant}),
        "affine": (lambda k: intercept + slope * k, {"intercept": intercept, "slope": slope}),
    }


def predicted_error(name: str, k: float, calibration: Mapping[int, Critical]) -> float:
    """Standard error of a law's prediction, from the bootstrap of the lengths to which it was fitted."""
    count = min(len(length.draws) for length in calibration.values())
    return float(
        np.std(
            [
                fit_laws({amount: length.draws[i] for amount, length in calibration.items()})[name][0](k)
                for i in range(count)
            ]
        )
    )


def within(predicted: float, measured: Critical, prediction_error: float = 0.0) -> bool:
    """Whether a prediction is good enough: within one element or one standard error, whichever is larger.

    The standard error is that of the difference, so it includes the calibration's error. If the answer stays right as
    far as was asked, a prediction is good enough if it lies at most one element short of that length.
    """
    if measured.status == "above":
        return predicted >= measured.value - ELEMENT
    if measured.status != "crosses":
        return False
    return abs(predicted - measured.value) <= max(ELEMENT, float(np.hypot(measured.error, prediction_error)))


def bounds(measured: Mapping[Any, Critical]) -> dict[str, list[float]]:
    """The 95 % interval of each critical length, for a Result."""
    return {str(key): [length.low, length.high] for key, length in measured.items()}


def table(measured: Mapping[Any, Critical]) -> dict[str, dict[str, Any]]:
    """Everything known of each critical length, for a Result."""
    return {
        str(key): {name: value for name, value in vars(length).items() if name != "draws"}
        for key, length in measured.items()
    }


def bins(length: int, width: int = 16) -> np.ndarray:
    """Bin edges for curves and maps, in tokens."""
    return np.arange(0, length + width, width)


def series(label: str, curve: Curve, edges: Sequence[float] | np.ndarray, **style: Any) -> dict[str, Any]:
    """A curve as a series of a figure: P(correct) at the middle of each bin, with its 95 % band by prompt."""
    edges = np.asarray(edges, dtype=float)
    p = curve.binned(edges)
    by_prompt = np.array([Curve(curve.x[i : i + 1], curve.right[i : i + 1]).binned(edges) for i in range(len(curve.x))])
    asked = ~np.isnan(by_prompt)
    squares = np.where(asked, (by_prompt - p) ** 2, 0.0).sum(0)
    spread = 1.96 * np.sqrt(squares) / np.maximum(1, asked.sum(0))
    band = {"low": np.clip(p - spread, 0, 1), "high": np.clip(p + spread, 0, 1)}
    return {"label": label, "x": (edges[:-1] + edges[1:]) / 2, "y": p, **band, **style}


def tells_depths(curves: Mapping[int, Curve], flat: Curve, width: int = 16) -> float:
    """The best balanced accuracy over both depths at any one context length, in bins of ``width`` tokens.

    A model that gives the same answer at both depths gets one half. A model that compares k/n with a threshold is
    wrong at depth 1 if the context is short, wrong at depth 2 if it is long, and right in between. Prompts of the two
    depths in one bin don't have exactly the same n, so a model that goes by length alone can get more than one half,
    though never all.
    """
    longest = max(int(curve.x.max()) for curve in [*curves.values(), flat])
    edges = np.arange(0, longest + width, width)
    alone = flat.binned(edges)
    nested = np.stack([curve.binned(edges) for curve in curves.values()])
    best = (nested + alone) / 2
    return float(np.nanmax(best)) if not np.isnan(best).all() else float("nan")
