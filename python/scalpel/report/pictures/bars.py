"""Bars, lying down: their names are words, and words are read along the line."""

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .layout import LINE, Frame, array
from .style import INK, MUTED, RULE, SERIES, SMALL, WIDTH, text_width


def draw_bars(data: dict[str, Any]) -> Figure:
    """One bar a label, its value at its end, its interval across it; a missing value is said in words."""
    labels = [textwrap.fill(str(label), 26) for label in data["labels"]]
    values = array(data["values"])
    low = values if data.get("low") is None else array(data["low"])
    high = values if data.get("high") is None else array(data["high"])
    if any(v.shape != (len(labels),) for v in (values, low, high)):
        raise ValueError(f"values, low and high must have one entry for each of the {len(labels)} labels")
    references = [r for r in data.get("reference", []) if r["y"] is not None]
    left = min(0.15 + max(map(text_width, labels), default=0), WIDTH * 0.42)
    frame = Frame(0.32 * len(labels) + 0.1, left=left, right=0.55, top=0.3 + LINE * len(references))
    axes = frame.axes
    y = np.arange(len(labels))[::-1]
    axes.barh(y, np.nan_to_num(values), height=0.62, color=SERIES[0], linewidth=0)
    axes.hlines(y, low, high, color=INK, linewidth=1.1)
    ends = [v for v in (*values, *low, *high, *(r["y"] for r in references), 0.0) if np.isfinite(v)]
    start, end = min(ends), max(ends)
    if start == end:
        end = start + 1.0
    axes.set_xlim(start - (0.02 * (end - start) if start < 0 else 0), end + 0.02 * (end - start))
    axes.set_ylim(-0.5, max(len(labels), 1) - 0.5)
    for place, value, top in zip(y, values, high, strict=True):
        known = np.isfinite(value)
        axes.annotate(
            f"{value:.3g}" if known else "no measurement",
            (np.nanmax([value, top, 0.0]) if known else 0.0, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
            color=INK if known else MUTED,
            annotation_clip=False,
        )
    for row, line in enumerate(references):
        axes.axvline(line["y"], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        x = frame.left + (line["y"] - axes.get_xlim()[0]) / np.ptp(axes.get_xlim()) * (WIDTH - left - frame.right)
        side = "right" if x > WIDTH * 0.6 else "left"
        above = frame.height - frame.top + 0.08 + LINE * row
        frame.figure.text(*frame.at(x, above), str(line["label"]), ha=side, va="bottom", size=SMALL, color=MUTED)
    axes.set_yticks(y, labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_color(RULE)
    frame.labels(data["ylabel"], "")
    return frame.figure
