"""Egg-box pictures: a box a D-class, a row an R-class, a column an L-class, a cell an H-class."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .layout import Frame
from .style import INK, LEVELS, MUTED, PAPER, SMALL, WIDTH, text_width

_GROUP = LEVELS[6]
_MOST_CELLS = 400
_LINES = 4  # names in a cell


def draw_eggbox(data: dict[str, Any]) -> Figure:
    """``boxes`` [{cells [rows][columns] lists of names, group bool [rows][columns], above [int]}], by D-class.

    Boxes stand by rank: each below all those above it. Group H-classes are tinted. Cells with more names than fit say
    how many elements they have.
    """
    boxes = data["boxes"]
    for box in boxes:
        if len(box["cells"]) != len(box["group"]) or any(
            len(row) != len(marks) for row, marks in zip(box["cells"], box["group"], strict=True)
        ):
            raise ValueError("cells and group of an egg-box must have the same rows and columns")
    cells = sum(len(row) for box in boxes for row in box["cells"])
    if cells > _MOST_CELLS:
        frame = Frame(0.5, left=0.1, right=0.1, top=0.05, bottom=0.05)
        frame.axes.set_axis_off()
        frame.axes.text(0, 0.5, f"{cells} H-classes in {len(boxes)} D-classes: too many to draw.", color=MUTED)
        return frame.figure
    levels = _levels([box["above"] for box in boxes])
    sizes = [_size(box) for box in boxes]
    rows: list[list[int]] = [
        [i for i, own in enumerate(levels) if own == level] for level in range(max(levels, default=0) + 1)
    ]
    heights = [max(sizes[i][1] * len(boxes[i]["cells"]) for i in row) for row in rows]
    total = sum(heights) + 0.35 * (len(rows) - 1) + 0.2
    frame = Frame(total, left=0.1, right=0.1, top=0.35, bottom=0.1)
    axes = frame.axes
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH - 0.2)
    axes.set_ylim(-total, 0)
    top, places = -0.1, {}
    for row, height in zip(rows, heights, strict=True):
        widths = [sizes[i][0] * len(boxes[i]["cells"][0]) for i in row]
        left = (WIDTH - 0.2 - sum(widths) - 0.5 * (len(row) - 1)) / 2
        for i, width in zip(row, widths, strict=True):
            places[i] = (left + width / 2, top, top - sizes[i][1] * len(boxes[i]["cells"]))
            _box(axes, boxes[i], left, top, *sizes[i])
            left += width + 0.5
        top -= height + 0.35
    for i, box in enumerate(boxes):
        for j in box["above"]:
            axes.plot([places[j][0], places[i][0]], [places[j][2], places[i][1]], color=MUTED, linewidth=0.8, zorder=1)
    frame.legend(
        [
            Patch(facecolor=_GROUP, edgecolor=INK, linewidth=0.6, label="a group"),
            Patch(facecolor=PAPER, edgecolor=INK, linewidth=0.6, label="no group"),
        ],
        columns=2,
    )
    return frame.figure


def _levels(above: list[list[int]]) -> list[int]:
    """How many boxes stand above each on the longest way up."""
    levels: dict[int, int] = {}

    def level(i: int) -> int:
        if i not in levels:
            levels[i] = max((level(j) + 1 for j in above[i]), default=0)
        return levels[i]

    return [level(i) for i in range(len(above))]


def _text(names: list[str]) -> list[str]:
    if len(names) <= _LINES and all(len(name) <= 14 for name in names):
        return names
    return (
        [names[0] if len(names[0]) <= 14 else names[0][:13] + "…", f"of {len(names)}"]
        if len(names) > 1
        else [names[0][:13] + "…"]
    )


def _size(box: dict[str, Any]) -> tuple[float, float]:
    """Inches of a cell."""
    texts = [_text(cell) for row in box["cells"] for cell in row]
    width = max(text_width(line) for text in texts for line in text) + 0.2
    return max(0.34, min(width, 6.0 / max(len(row) for row in box["cells"]))), 0.14 + 0.15 * max(map(len, texts))


def _box(axes: Any, box: dict[str, Any], left: float, top: float, width: float, height: float) -> None:
    for r, (row, marks) in enumerate(zip(box["cells"], box["group"], strict=True)):
        for c, (cell, group) in enumerate(zip(row, marks, strict=True)):
            corner = (left + c * width, top - (r + 1) * height)
            look: dict[str, Any] = {"facecolor": _GROUP if group else PAPER, "edgecolor": INK, "linewidth": 0.6}
            axes.add_patch(Rectangle(corner, width, height, zorder=2, **look))
            axes.text(
                corner[0] + width / 2,
                corner[1] + height / 2,
                "\n".join(_text(cell)),
                ha="center",
                va="center",
                size=SMALL,
                color=INK,
                zorder=3,
                linespacing=1.1,
            )
