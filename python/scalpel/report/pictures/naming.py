"""Names of curves where the curves are, so that no legend has to be looked up."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from .layout import LINE, Frame
from .style import PAPER, SMALL, text_width

__all__ = ["CLEAR", "WRAP", "name_in_place", "spread"]

WRAP = 24  # characters of a name on one line
CLEAR: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}  # clears what lies under a name

_SHORT = 12  # characters up to which a name may interrupt its own curve
_STEP = 0.02  # inches along a curve between two places that a name could have
_CLOSE = 0.1  # inches between two ends from which on their names would touch


def name_in_place(frame: Frame, series: Sequence[dict[str, Any]]) -> None:
    """Write each name at the right end of its curve; on it where the ends crowd; beside the last of points.

    ``series`` as curves.py has checked them; the axes' limits must be set.
    """
    scale = _Scale(frame)
    paths = [scale.path(s) for s in series]
    at_end, on_curve, beside = [], [], []
    for i, s in enumerate(series):
        x, y = paths[i][-1]
        others = [p[-1] for j, p in enumerate(paths) if j != i and series[j]["style"] != "points"]
        crowded = any(abs(y - oy) < _CLOSE and abs(x - ox) < 0.5 for ox, oy in others)
        if s["style"] == "points" and x < 0.9 * scale.width:
            beside.append(i)
        elif crowded and len(s["label"]) <= _SHORT and s["style"] != "points":
            on_curve.append(i)
        else:
            at_end.append(i)
    taken: list[np.ndarray] = []
    for i in on_curve:
        place = _clearest(paths, i, text_width(series[i]["label"]) / 2, taken)
        if place is None:
            at_end.append(i)
        else:
            taken.append(place[None])
            _write(frame, series[i], scale.back(place), ha="center", bbox=CLEAR)
    for i in beside:
        _write(frame, series[i], scale.back(paths[i][-1]), (7, -3), ha="left", va="top", bbox=CLEAR)
    _at_end(frame, [series[i] for i in at_end], [paths[i][-1] for i in at_end], scale)


class _Scale:
    """From the axes' units to inches within the plot, and back."""

    def __init__(self, frame: Frame) -> None:
        (self.left, right), (self.low, high) = frame.axes.get_xlim(), frame.axes.get_ylim()
        self.width = frame.width - frame.left - frame.right
        self.height = frame.height - frame.top - frame.bottom
        self.x, self.y = self.width / (right - self.left), self.height / (high - self.low)

    def path(self, s: dict[str, Any]) -> np.ndarray:
        """A series' finite points in inches (points, 2), about _STEP apart where a line joins them."""
        known = np.isfinite(s["y"]) & np.isfinite(s["x"])
        points = np.stack([(s["x"][known] - self.left) * self.x, (s["y"][known] - self.low) * self.y], 1)
        if s["style"] == "points" or len(points) < 2:
            return points
        along = np.append(0.0, np.hypot(*np.diff(points, axis=0).T).cumsum())
        steps = np.linspace(0, along[-1], max(2, round(along[-1] / _STEP)))
        return np.stack([np.interp(steps, along, points[:, i]) for i in (0, 1)], 1)

    def back(self, place: np.ndarray) -> tuple[float, float]:
        return self.left + place[0] / self.x, self.low + place[1] / self.y


def _clearest(paths: list[np.ndarray], i: int, half: float, taken: list[np.ndarray]) -> np.ndarray | None:
    """The place on path ``i`` where a name of that half width is farthest from all else, if it fits."""
    inner = paths[i][len(paths[i]) // 20 : -max(1, len(paths[i]) // 20)]
    others = [p for j, p in enumerate(paths) if j != i] + taken
    if not len(inner) or not others:
        return None
    room = np.array([half + 0.06, 0.16])
    score = cdist(inner / room, np.concatenate(others) / room, "chebyshev").min(1)
    best = int(score.argmax())
    return inner[best] if score[best] > 1 else None


def _at_end(frame: Frame, series: list[dict[str, Any]], ends: list[np.ndarray], scale: _Scale) -> None:
    """Names in the right margin, beside their ends or as near as they leave each other room."""
    names = [textwrap.fill(s["label"], WRAP) for s in series]
    tallest = max((name.count("\n") + 1 for name in names), default=1)
    gap = LINE * tallest * 0.95
    heights = spread([float(end[1]) for end in ends], gap, 0.0, scale.height)
    for s, name, end, height in zip(series, names, ends, heights, strict=True):
        leader = {"arrowstyle": "-", "color": s["colour"], "linewidth": 0.6, "alpha": 0.5, "shrinkB": 3}
        frame.axes.annotate(
            name,
            scale.back(end),
            scale.back(np.array([scale.width, height])),
            color=s["colour"],
            size=SMALL,
            va="center",
            annotation_clip=False,
            linespacing=1.1,
            arrowprops=leader if np.hypot(scale.width - end[0], height - end[1]) > 0.15 else None,
        )


def _write(
    frame: Frame,
    s: dict[str, Any],
    at: tuple[float, float],
    offset: tuple[float, float] = (0, 0),
    **look: Any,
) -> None:
    look = {"va": "center", "size": SMALL, "color": s["colour"], "zorder": 6} | look
    frame.axes.annotate(s["label"], at, offset, textcoords="offset points", annotation_clip=False, **look)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near ``wanted``, in its order, at least ``gap`` apart and, if there is room, in [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], low, placed[-1] + gap if placed else low))
    limit = high
    for j in reversed(range(len(placed))):
        placed[j] = min(placed[j], limit)
        limit = placed[j] - gap
    result = [0.0] * len(wanted)
    for i, place in zip(order, placed, strict=True):
        result[i] = place
    return result
