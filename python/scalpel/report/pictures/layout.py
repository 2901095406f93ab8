"""The frame that every picture shares: measured in inches, labels outside the plot, a legend above it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .style import MUTED, SMALL, WIDTH

LINE = 0.17  # inches from one line of small text to the next


class Frame:
    """A figure with one plot in it. Lengths in inches: ``height`` of the plot, and the room on its sides."""

    def __init__(
        self, height: float, *, left: float = 0.45, right: float = 0.15, top: float = 0.3, bottom: float = 0.5
    ) -> None:
        self.width, self.height = WIDTH, height + top + bottom
        self.left, self.right, self.top, self.bottom = left, right, top, bottom
        self.figure = Figure(figsize=(self.width, self.height))
        self.axes = self.figure.add_axes((*self.at(left, bottom), *self.at(self.width - left - right, height)))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Inches from the lower left corner as fractions of the figure."""
        return x / self.width, y / self.height

    def labels(self, x: str, y: str) -> None:
        """The axes' names: below at the right end, above at the left end, so that none is read sideways."""
        right = self.width - self.right
        self.figure.text(*self.at(right, 0.08), x, ha="right", va="bottom", size=SMALL, color=MUTED)
        above = self.height - self.top + 0.1
        self.figure.text(*self.at(0.02, above), y, ha="left", va="bottom", size=SMALL, color=MUTED)

    def legend(self, handles: Sequence[Any], *, below: float = 0.0, columns: int = 1) -> None:
        """A key at the top, ``below`` inches under the edge."""
        if handles:
            self.figure.legend(
                handles=handles,
                loc="upper right",
                bbox_to_anchor=self.at(self.width - self.right, self.height - below),
                frameon=False,
                fontsize=SMALL,
                ncols=min(columns, len(handles)),
                borderpad=0,
                borderaxespad=0,
                labelcolor=MUTED,
                handlelength=2.2,
                columnspacing=1.4,
            )


def array(values: Any) -> np.ndarray:
    """Numbers as float64, None as NaN. Raises ValueError where rows differ in length."""
    return np.asarray(values, dtype=np.float64)


__all__ = ["LINE", "Frame", "array"]
