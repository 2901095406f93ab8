"""A circuit: columns in the order of the forward pass, kept nodes in them, weights as lines."""

from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .layout import Frame
from .style import INK, MUTED, RULE, SERIES, SMALL

_KINDS = {
    "weight": ("weight above 0", SERIES[0]),
    "negative": ("weight below 0", SERIES[1]),
    "residual": ("same residual channel", RULE),
    "score": ("multiplied in a score", SERIES[3]),
    "mix": ("mixed by that score", SERIES[2]),
}


def draw_layered(data: dict[str, Any]) -> Figure:
    """``columns`` [{label, nodes [names]}], ``edges`` [{src, dst, kind, weight?}] between the names.

    A line's width grows with the weight's magnitude. ``sizes``: name → share of one for the dot, such as how many
    seeds keep the node.
    """
    columns, edges = data["columns"], data["edges"]
    sizes = data.get("sizes", {})
    place: dict[str, tuple[float, float]] = {}
    for x, column in enumerate(columns):
        for i, node in enumerate(column["nodes"]):
            place[node] = (x, (i + 0.5) / len(column["nodes"]))
    unknown = [e[end] for e in edges for end in ("src", "dst") if e[end] not in place]
    if unknown:
        raise ValueError(f"an edge joins {unknown[0]!r}, which stands in no column")
    tallest = max((len(column["nodes"]) for column in columns), default=1)
    frame = Frame(min(5.0, max(2.0, 0.09 * tallest + 0.6)), left=0.55, right=0.2, top=0.45, bottom=0.75)
    axes = frame.axes
    axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    used = _lines(axes, edges, place)
    dots = np.array(list(place.values())).reshape(-1, 2)
    area = [4 + 16 * float(sizes.get(node, 0.5)) for node in place]
    axes.scatter(dots[:, 0], dots[:, 1], s=area, color=INK, linewidth=0, zorder=4)
    for x, column in enumerate(columns):
        count = len(column["nodes"])
        axes.text(x, -0.02, f"{column['label']}\n{count}", ha="right", va="top", size=SMALL, color=MUTED, rotation=35)
    handles = [Line2D([], [], color=colour, label=label) for kind, (label, colour) in _KINDS.items() if kind in used]
    frame.legend(handles, columns=3)
    return frame.figure


def _lines(axes: Any, edges: list[Any], place: dict[str, tuple[float, float]]) -> set[str]:
    largest = max((abs(e["weight"]) for e in edges if e.get("weight") is not None), default=1.0) or 1.0
    groups: dict[str, tuple[list[Any], list[float]]] = {}
    for edge in edges:
        weight = edge.get("weight")
        kind = "negative" if edge["kind"] == "weight" and weight is not None and weight < 0 else edge["kind"]
        width = 0.6 if weight is None else 0.25 + 1.5 * abs(weight) / largest
        lines, widths = groups.setdefault(kind, ([], []))
        lines.append([place[edge["src"]], place[edge["dst"]]])
        widths.append(width)
    for kind, (lines, widths) in groups.items():
        colour = _KINDS[kind][1]
        axes.add_collection(
            LineCollection(lines, linewidths=widths, colors=colour, zorder=1 if kind == "residual" else 2)
        )
    return set(groups)
