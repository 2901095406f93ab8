"""Curves: lines and points with their intervals, named where they end."""

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .layout import LINE, Frame, array
from .naming import CLEAR, WRAP, name_in_place
from .style import INK, MUTED, PAPER, RULE, SERIES, SMALL, WIDTH, text_width

_HEIGHT = 2.7
_STYLES = ("line", "dashed", "points")
_NAMED_IN_PLACE = 8  # more names than this go into a legend


def draw_curves(data: dict[str, Any]) -> Figure:
    """Each series in its group's colour, its interval as a band or bars, reference lines with their names."""
    series = [_checked(s) for s in data["series"]]
    groups = list(dict.fromkeys(s["group"] for s in series))
    for s in series:
        s["colour"] = SERIES[groups.index(s["group"]) % len(SERIES)]
    hlines = [h for h in data.get("hlines", []) if h["y"] is not None]
    vlines = [v for v in data.get("vlines", []) if v["x"] is not None]
    limits = _limits(series, hlines, vlines)
    named = [s for s in series if s["label"] and np.isfinite(s["y"]).any()]
    in_place = len(named) <= _NAMED_IN_PLACE
    left, right = 0.5, 0.15
    if in_place:
        widest = max((text_width(textwrap.fill(s["label"], WRAP)) for s in named), default=0)
        right = min(0.35 + widest, WIDTH * 0.38)
    inches = (WIDTH - left - right) / (limits[0][1] - limits[0][0])
    marks = _rows_of_marks(vlines, limits[0][0], inches)
    above = LINE * (max((row for _, row in marks), default=-1) + 1 + (0.3 if marks else 0))
    legend = 0.0 if in_place else LINE * -(-len(named) // 3)
    frame = Frame(_HEIGHT, left=left, right=right, top=0.3 + legend + above)
    axes = frame.axes
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if all(np.all(s["x"] == np.rint(s["x"])) for s in series):
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
    for i, s in enumerate(series):
        s["width"] = 1.6 + 1.4 * min(2, sum(_covers(later, s, limits[1]) for later in series[i + 1 :]))
        _plot(axes, s)
    _references(frame, hlines, marks, inches)
    frame.labels(data["xlabel"], data["ylabel"])
    if in_place:
        name_in_place(frame, named)
    else:
        frame.legend([Line2D([], [], label=s["label"], **_look(s)) for s in named], columns=3)
    return frame.figure


def _checked(series: dict[str, Any]) -> dict[str, Any]:
    label = str(series.get("label") or "")
    style = series.get("style") or "line"
    if style not in _STYLES:
        raise ValueError(f"style of series {label!r} is {style!r}; allowed: {', '.join(_STYLES)}")
    curve: dict[str, Any] = {"label": label, "style": style, "group": str(series.get("group") or label)}
    curve["x"], curve["y"] = array(series["x"]), array(series["y"])
    for name in ("low", "high"):
        curve[name] = curve["y"] if series.get(name) is None else array(series[name])
    curve["interval"] = series.get("low") is not None or series.get("high") is not None
    if curve["x"].ndim != 1 or any(curve[n].shape != curve["x"].shape for n in ("y", "low", "high")):
        raise ValueError(f"x, y, low and high of series {label!r} must be lists of the same length")
    return curve


def _covers(upper: dict[str, Any], lower: dict[str, Any], limits: tuple[float, float]) -> bool:
    """Whether a line would hide another almost everywhere; the lower one is then drawn wider, to be seen."""
    if "points" in (upper["style"], lower["style"]) or upper["x"].shape != lower["x"].shape:
        return False
    known = np.isfinite(lower["y"])
    apart = np.hypot(upper["x"] - lower["x"], upper["y"] - lower["y"])[known]
    return bool(known.any()) and float(np.mean(apart < 0.01 * (limits[1] - limits[0]))) > 0.9


def _look(s: dict[str, Any]) -> dict[str, Any]:
    points = s["style"] == "points"
    return {
        "color": s["colour"],
        "linestyle": {"line": "-", "dashed": (0, (4, 2.5)), "points": "none"}[s["style"]],
        "linewidth": s["width"],
        "marker": "o" if points else "",
        "markersize": 5.5,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
    }


def _plot(axes: Axes, s: dict[str, Any]) -> None:
    x, y, low, high = s["x"], s["y"], s["low"], s["high"]
    if s["interval"] and s["style"] == "points":
        axes.vlines(x, low, high, color=s["colour"], linewidth=1.0, alpha=0.6, zorder=2)
    elif s["interval"]:
        axes.fill_between(x, low, high, color=s["colour"], alpha=0.15, linewidth=0, zorder=1)
    axes.plot(x, y, zorder=4 if s["style"] == "points" else 3, **_look(s))


def _limits(
    series: list[dict[str, Any]], hlines: list[dict[str, Any]], vlines: list[dict[str, Any]]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Room for every finite value and every reference; a probability shows the whole of 0 to 1."""
    marks_x, marks_y = array([v["x"] for v in vlines]), array([h["y"] for h in hlines])
    x = np.concatenate([marks_x, *(s["x"][np.isfinite(s["y"])] for s in series)])
    y = np.concatenate([marks_y, *(s[n] for s in series for n in ("y", "low", "high"))])
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    if y.size and y.min() >= 0 and y.max() <= 1:
        return _padded(x, 0.02), (-0.03, 1.03)
    return _padded(x, 0.02), _padded(y, 0.06)


def _padded(values: np.ndarray, share: float) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    pad = share * float(np.ptp(values) or 1.0)
    return float(values.min()) - pad, float(values.max()) + pad


def _rows_of_marks(vlines: list[dict[str, Any]], start: float, inches: float) -> list[tuple[dict[str, Any], int]]:
    """Each vertical line with the row above the plot that its name stands on: the first with room for it."""
    ends: list[float] = []
    rows = []
    for line in sorted(vlines, key=lambda v: float(v["x"])):
        at, half = (line["x"] - start) * inches, text_width(str(line["label"])) / 2
        row = next((i for i, end in enumerate(ends) if at - half > end), len(ends))
        ends[row : row + 1] = [at + half + 0.08]
        rows.append((line, row))
    return rows


def _references(
    frame: Frame, hlines: list[dict[str, Any]], marks: list[tuple[dict[str, Any], int]], inches: float
) -> None:
    axes = frame.axes
    left, _ = axes.get_xlim()
    dots: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 2}
    words: dict[str, Any] = {"size": SMALL, "va": "bottom"}
    for line in hlines:
        axes.axhline(line["y"], color=MUTED, **dots)
        place: dict[str, Any] = {"textcoords": "offset points", "bbox": CLEAR, "zorder": 3}
        axes.annotate(str(line["label"]), (left, line["y"]), (4, 3), color=MUTED, **place, **words)
    for line, row in marks:
        axes.axvline(line["x"], color=INK, **dots)
        above = frame.height - frame.top + 0.1 + LINE * (row + 1)
        at = frame.at(frame.left + (line["x"] - left) * inches, above)
        frame.figure.text(*at, str(line["label"]), ha="center", color=INK, **words)
