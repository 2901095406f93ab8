"""Machines and Cayley graphs: states on a circle, an arrow a letter."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch
from matplotlib.path import Path

from .layout import LINE, Frame
from .style import INK, MUTED, PAPER, SERIES, SMALL, text_width

_MOST = 24  # nodes that a circle shows so that arrows can be followed


def draw_digraph(data: dict[str, Any]) -> Figure:
    """``nodes`` [{label, note?}], the first marked as the start where ``start`` is true; ``edges`` [{src, dst, label}].

    Arrows of a label share a colour, which the legend names. More nodes than can be followed are said, not drawn.
    """
    nodes, edges = data["nodes"], data["edges"]
    if any(not 0 <= e[end] < len(nodes) for e in edges for end in ("src", "dst")):
        raise ValueError(f"an edge leads to a node that isn't there; nodes are 0 to {len(nodes) - 1}")
    labels = list(dict.fromkeys(str(e["label"]) for e in edges))
    if len(nodes) > _MOST:
        return _too_many(len(nodes), len(edges))
    radius = 0.55 if len(nodes) < 3 else min(1.9, 0.28 * len(nodes) + 0.35)
    size = 0.2 if len(nodes) <= 12 else 0.11
    words = LINE * (len(labels) > 0)
    frame = Frame(2 * radius + 1.5, left=0.1, right=0.1, top=0.1 + words, bottom=0.05)
    axes = frame.axes
    half = (frame.width - 0.2) / 2
    axes.set_xlim(-half, half)
    axes.set_ylim(-radius - 0.75, radius + 0.75)
    axes.set_axis_off()
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(nodes)) / max(1, len(nodes))
    places = radius * np.stack([np.cos(angles), np.sin(angles)], 1) if len(nodes) > 1 else np.zeros((1, 2))
    _arrows(axes, places, angles, edges, labels, size)
    for i, (node, place) in enumerate(zip(nodes, places, strict=True)):
        start = bool(data.get("start")) and i == 0
        axes.add_patch(Circle(place, size, facecolor=PAPER, edgecolor=INK, linewidth=1.8 if start else 1.0, zorder=4))
        _name(axes, str(node["label"]), str(node.get("note", "")), place, angles[i], size, radius)
    handles = [Line2D([], [], color=SERIES[i % len(SERIES)], label=label) for i, label in enumerate(labels)]
    frame.legend(handles, columns=6)
    return frame.figure


def _arrows(
    axes: Any, places: np.ndarray, angles: np.ndarray, edges: list[Any], labels: list[str], size: float
) -> None:
    """Parallel arrows and loops of several letters keep apart: each letter bends by its own amount."""
    seen: dict[tuple[int, int], int] = {}
    for edge in edges:
        src, dst = edge["src"], edge["dst"]
        colour = SERIES[labels.index(str(edge["label"])) % len(SERIES)]
        nth = seen.get((src, dst), 0)
        seen[src, dst] = nth + 1
        look: dict[str, Any] = {"color": colour, "linewidth": 1.2, "zorder": 3}
        if src == dst:
            axes.add_patch(
                FancyArrowPatch(
                    path=_loop(places[src], angles[src], size, nth), arrowstyle="-|>", mutation_scale=8, **look
                )
            )
            continue
        toward = places[dst] - places[src]
        toward = toward / np.hypot(*toward) * size
        axes.add_patch(
            FancyArrowPatch(
                places[src] + toward,
                places[dst] - toward,
                connectionstyle=f"arc3,rad={0.12 + 0.13 * nth:.2f}",
                arrowstyle="-|>",
                mutation_scale=9,
                **look,
            )
        )


def _loop(place: np.ndarray, angle: float, size: float, nth: int) -> Path:
    """From the circle's outer side and back to it, the farther out the more loops there are already."""

    def at(turn: float, distance: float) -> np.ndarray:
        return place + distance * np.array([np.cos(angle + turn), np.sin(angle + turn)])

    far = size + 0.32 + 0.14 * nth
    points = [at(0.45, size), at(0.75, far), at(-0.75, far), at(-0.45, size)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _name(axes: Any, label: str, note: str, place: np.ndarray, angle: float, size: float, radius: float) -> None:
    """The label in its circle where it fits, else beside it, away from the middle; the note always beside."""
    out = np.array([np.cos(angle), np.sin(angle)])
    side = "left" if out[0] > 0.3 else "right" if out[0] < -0.3 else "center"
    look: dict[str, Any] = {"size": SMALL, "va": "center", "zorder": 5}
    inside = text_width(label) < 1.7 * size
    if inside:
        axes.text(*place, label, ha="center", color=INK, **look)
    beside = note if inside else f"{label}  {note}".strip()
    if beside:
        # past the loop that a state may have on its outer side
        away = place + out * (size + 0.44)
        axes.text(*away, beside, ha=side, color=MUTED, **look)


def _too_many(nodes: int, edges: int) -> Figure:
    frame = Frame(0.5, left=0.1, right=0.1, top=0.05, bottom=0.05)
    frame.axes.set_axis_off()
    frame.axes.text(
        0,
        0.5,
        f"{nodes} nodes and {edges} arrows: too many to follow. The numbers below have all of them.",
        color=MUTED,
    )
    return frame.figure
