"""Critical lengths: where P(correct) crosses one half, with censoring and intervals by prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.circuitgpt import CircuitGPT
from ..tasks.brackets import long_lists, preference

ELEMENT = 2  # tokens of an element and its comma: two questions are never closer


@dataclass(frozen=True)
class Curve:
    """Answers along prompts: ``right`` bool (prompts, questions) at ``x`` (prompts, questions), in tokens."""

    x: np.ndarray
    right: np.ndarray

    def sample(self, prompts: np.ndarray) -> "Curve":
        """The curve of these prompts (indices, repeats allowed)."""
        return Curve(self.x[prompts], self.right[prompts])

    def sign_changes(self) -> float:
        """Mean number of times that the answer changes along a prompt; a clean threshold has one at most."""
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
    """The length at which P(correct) is one half.

    ``value`` in tokens; ``low``, ``high`` its 95 % bootstrap interval; ``error`` its bootstrap standard error;
    ``censored``: "right" where P stays above one half as far as was asked (``value`` is then that length),
    "left" where it is below from the start, None otherwise.
    """

    value: float
    low: float
    high: float
    error: float
    censored: str | None
    sign_changes: float
    prompts: int

    def text(self) -> str:
        """The value with its interval, as a table shows it."""
        if self.censored == "right":
            return f"> {self.value:.0f}"
        if self.censored == "left":
            return f"< {self.value:.0f}"
        return f"{self.value:.0f} [{self.low:.0f}, {self.high:.0f}]"


def critical(curve: Curve, rng: np.random.Generator, resamples: int = 200) -> Critical:
    """Critical length by a logistic fit of right on x, bootstrapped by prompt and censored at the lengths asked."""
    count = len(curve.right)
    value, censored = half_crossing(curve)
    draws = [half_crossing(curve.sample(rng.integers(count, size=count)))[0] for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Critical(value, float(low), float(high), float(np.std(draws)), censored, curve.sign_changes(), count)


def half_crossing(curve: Curve) -> tuple[float, str | None]:
    """Where the logistic fit crosses one half, clipped to the lengths asked, and how it was censored."""
    x, y = curve.x.ravel().astype(float), curve.right.ravel().astype(float)
    least, most = float(x.min()), float(x.max())
    if y.all():
        return most, "right"
    if not y.any():
        return least, "left"
    intercept, slope = logistic_fit(x, y)
    falls = slope < 0
    crossing = -intercept / slope if slope else float("inf")
    if falls and least <= crossing <= most:
        return crossing, None
    # Outside what was asked, or no fall at all: the side is that of the middle of the range.
    above = intercept + slope * (least + most) / 2 > 0
    return (most, "right") if above else (least, "left")


def logistic_fit(x: np.ndarray, y: np.ndarray, ridge: float = 1e-3) -> tuple[float, float]:
    """(intercept, slope) of P(y) = 1 / (1 + exp(-(intercept + slope x))), by Newton's method.

    The small ridge on the standardised slope keeps the fit finite where the answers separate perfectly; the
    crossing of one half is then in the middle of the gap.
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
        while objective(weights - size * step) > now and size > 1e-8:  # damped: the full step may overshoot
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    slope = weights[1] / scale
    return float(weights[0] - slope * centre), float(slope)


def ask_long_lists(model: CircuitGPT, k: int, *, depth: int = 2, prompts: int, length: int, seed: int) -> Curve:
    """Answers of the model along lists of evidence k, up to ``length`` tokens; x is n, the attended keys."""
    assert model.tokenizer is not None
    lists = long_lists(model.tokenizer, k, length, prompts, block_size=model.config.block_size, depth=depth, seed=seed)
    right = (preference(model, lists) > 0) == (depth == 2)
    return Curve(lists.n.numpy(), right.numpy())


Law = Callable[[float], float]


def fit_laws(lengths: Mapping[int, float]) -> dict[str, tuple[Law, dict[str, float]]]:
    """Each law's n*(k), fitted by least squares to measured critical lengths {k: n}, and its parameters.

    seed: n* = k/θ. sink: n* = k/θ − σ with σ ≥ 0. Rivals: a constant; affine in k (the sink's line with the sign
    of σ left free). With two calibration points the two-parameter laws pass through them.
    """
    k = np.array(list(lengths), dtype=float)
    n = np.array(list(lengths.values()), dtype=float)
    per_evidence = float((k * n).sum() / (k * k).sum())
    constant = float(n.mean())
    slope, intercept = (float(v) for v in np.polyfit(k, n, 1)) if len(k) > 1 else (0.0, constant)
    # With σ ≥ 0 the best line has the free intercept where that is negative, and none otherwise.
    sink_slope, sink = (slope, -intercept) if intercept < 0 and slope > 0 else (per_evidence, 0.0)
    return {
        "seed": (lambda k: float(np.ceil(k * per_evidence - 1e-9)), {"theta": 1 / per_evidence}),
        "sink": (lambda k: k * sink_slope - sink, {"theta": 1 / sink_slope, "sigma": sink}),
        "constant": (lambda k: constant, {"n": constant}),
        "affine": (lambda k: intercept + slope * k, {"intercept": intercept, "slope": slope}),
    }


def within(predicted: float, measured: Critical) -> bool:
    """Whether a prediction is good enough: within one element or one standard error, whichever is larger."""
    return measured.censored is None and abs(predicted - measured.value) <= max(ELEMENT, measured.error)


def bounds(measured: Mapping[Any, Critical]) -> dict[str, list[float]]:
    """Intervals by key, for a Result."""
    return {str(key): [one.low, one.high] for key, one in measured.items()}


def table(measured: Mapping[Any, Critical]) -> dict[str, dict[str, Any]]:
    """Everything known of each critical length, for a Result."""
    return {str(key): dict(vars(one)) for key, one in measured.items()}


def bins(length: int, width: int = 16) -> np.ndarray:
    """Bin edges for curves and maps, in tokens."""
    return np.arange(0, length + width, width)


def series(label: str, curve: Curve, edges: Sequence[float] | np.ndarray, **style: Any) -> dict[str, Any]:
    """A curve as a picture's series: P(correct) by bin, at the bins' middles."""
    edges = np.asarray(edges, dtype=float)
    return {"label": label, "x": (edges[:-1] + edges[1:]) / 2, "y": curve.binned(edges), **style}
