"""Pictures of the (k, n) plane: a failure region, and a heat map of P(correct) with the laws over it."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path

from .layout import Frame, array
from .style import FAILS, INK, LEVELS, MUTED, PAPER, RULE, SIZE, SMALL, text_width

_MARKS = ("o", "s", "^", "D", "v", "P")
_DASHES = {"line": "-", "dashed": (0, (4, 2)), "points": ""}


def draw_region(data: dict[str, Any]) -> Figure:
    """Rows of k, cells of n: where the law says that the answer fails."""
    rows, n_max = data["k"], int(data["n_max"])
    fails = array(data["fails"])
    if fails.shape != (len(rows), n_max + 1):
        raise ValueError(f"fails is of shape {fails.shape}; {len(rows)} rows of n_max + 1 = {n_max + 1} are needed")
    frame = Frame(0.24 * len(rows) + 0.1, left=0.45, top=0.38)
    axes = frame.axes
    missing = np.isnan(fails)
    _tiles(axes, _runs(fails == 1), facecolor=FAILS, edgecolor="none")
    _tiles(axes, _runs(missing), facecolor="none", edgecolor=RULE, hatch="////")
    for row in range(len(rows)):
        failing = np.flatnonzero(fails[row] == 1)
        if len(failing) and failing[0] > 0:
            axes.text(failing[0] - 0.9, row, str(failing[0]), ha="right", va="center", size=SMALL, color=INK)
    axes.set_xlim(-0.5, n_max + 0.5)
    _rows(axes, [str(k) for k in rows])
    frame.labels("context length n", "evidence k")
    handles = [Patch(facecolor=FAILS, edgecolor="none", label="fails, from the n written at its edge on")]
    if missing.any():
        handles.append(Patch(facecolor=PAPER, edgecolor=RULE, hatch="////", label="not known"))
    frame.legend(handles)
    return frame.figure


def draw_map(data: dict[str, Any]) -> Figure:
    """Rows of evidence, columns of length: P(correct) as colour, predicted critical lengths as marks."""
    rows, edges, values = data["y"], array(data["x_edges"]), array(data["values"])
    overlays = data.get("overlays", [])
    if values.shape != (len(rows), len(edges) - 1):
        raise ValueError(f"values is of shape {values.shape}; {(len(rows), len(edges) - 1)} follows from y and x_edges")
    if not np.all(np.diff(edges) > 0):
        raise ValueError("x_edges must ascend")
    if np.any((values < 0) | (values > 1)):
        raise ValueError("values must lie in [0, 1]")
    labels = [str(row) for row in rows]
    frame = Frame(
        max(1.1, 0.42 * len(rows)) + 0.1,
        left=0.3 + max(map(text_width, labels), default=0),
        top=0.38 + 0.2 * ((len(overlays) + 2) // 2),
        right=0.25,
    )
    axes = frame.axes
    level = np.where(np.isnan(values), -1, np.rint(np.nan_to_num(values) * 10)).astype(int)
    cells = [
        (row, edges[i], edges[i + 1], int(level[row, i])) for row in range(len(rows)) for i in range(len(edges) - 1)
    ]
    for step, colour in enumerate(LEVELS):
        _tiles(axes, [c[:3] for c in cells if c[3] == step], facecolor=colour, edgecolor=PAPER, linewidth=0.5)
    unmeasured = [c[:3] for c in cells if c[3] == -1]
    _tiles(axes, unmeasured, facecolor="none", edgecolor=RULE, hatch="////", linewidth=0.0)
    axes.set_xlim(edges[0], edges[-1])
    handles: list[Any] = [
        _overlay(axes, overlay, _MARKS[i % len(_MARKS)], len(rows)) for i, overlay in enumerate(overlays)
    ]
    if unmeasured:
        handles.append(Patch(facecolor=PAPER, edgecolor=RULE, hatch="////", label="no prompts"))
    _rows(axes, labels)
    frame.labels(data["xlabel"], data["ylabel"])
    frame.legend(handles, below=0.2, columns=2)
    _scale(frame)
    return frame.figure


def _overlay(axes: Axes, overlay: dict[str, Any], mark: str, rows: int) -> Line2D:
    """One law's critical length in every row; beyond the axis, an arrow at its edge says so."""
    x = array(overlay["x"])
    if x.shape != (rows,):
        raise ValueError(f"overlay {overlay['label']!r} has {x.size} values for {rows} rows")
    style = overlay.get("style", "line")
    if style not in _DASHES:
        raise ValueError(f"style is {style!r}; allowed: {', '.join(_DASHES)}")
    low, high = axes.get_xlim()
    y = np.arange(rows)
    inside = np.where((x >= low) & (x <= high), x, np.nan)
    measured = style == "points"
    look: dict[str, Any] = {"marker": mark, "markersize": 6.5 if measured else 5.5, "color": INK}
    look |= {"markerfacecolor": INK if measured else PAPER, "markeredgecolor": PAPER if measured else INK}
    look |= {"linestyle": _DASHES[style] or "none", "linewidth": 1.2, "markeredgewidth": 1.0}
    if not measured:
        axes.plot(inside, y, color=PAPER, linewidth=3.0, zorder=3)
    axes.plot(inside, y, zorder=5 if measured else 4, clip_on=False, **look)
    for row in np.flatnonzero(x > high):
        axes.plot([high], [row], zorder=6, clip_on=False, **look)
        arrow: dict[str, Any] = {
            "textcoords": "offset points",
            "va": "center_baseline",
            "annotation_clip": False,
        }
        axes.annotate("→", (high, row), (5, 0), size=SIZE, color=INK, **arrow)
    beyond = " (→ beyond the axis)" if np.any(x > high) else ""
    return Line2D([], [], label=str(overlay["label"]) + beyond, **look)


def _scale(frame: Frame) -> None:
    """The key of the colours, at the top right: eleven steps from 0 to 1."""
    width, height = 0.115, 0.115
    right, top = frame.width - frame.right, frame.height - 0.02
    left = right - width * len(LEVELS) - text_width("1") - 0.06
    for i, colour in enumerate(LEVELS):
        corner = frame.at(left + i * width, top - height)
        size = frame.at(width, height)
        frame.figure.add_artist(Rectangle(corner, *size, facecolor=colour, edgecolor="none"))
    middle = top - height / 2
    for text, at, side in (("P(correct)  0", left - 0.05, "right"), ("1", right, "right")):
        frame.figure.text(*frame.at(at, middle), text, ha=side, va="center_baseline", size=SMALL, color=MUTED)


def _rows(axes: Axes, labels: list[str]) -> None:
    axes.set_ylim(-0.5, len(labels) - 0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _runs(where: np.ndarray) -> list[tuple[int, float, float]]:
    """Row, start and end of each stretch of true cells, a cell being centered on its number."""
    runs = []
    for row, cells in enumerate(where):
        turns = np.flatnonzero(np.diff(np.concatenate(([False], cells, [False])).astype(int)))
        runs += [(row, start - 0.5, end - 0.5) for start, end in zip(turns[::2], turns[1::2], strict=True)]
    return runs


def _tiles(axes: Axes, cells: list[Any], **look: Any) -> None:
    """All cells of one look as one path: small, and without seams."""
    if cells:
        boxes = [
            Path([(a, y - 0.44), (b, y - 0.44), (b, y + 0.44), (a, y + 0.44), (a, y - 0.44)], closed=True)
            for y, a, b in cells
        ]
        axes.add_patch(PathPatch(Path.make_compound_path(*boxes), zorder=1, **look))
