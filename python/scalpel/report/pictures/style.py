"""Colours and measures of the pictures.

A picture is drawn in the light theme's colours; inline, each of them becomes a CSS variable with that colour
as its fallback, so that the page's dark theme and its print style reach into the picture. Hence every colour
here is used for one thing only.
"""

from typing import Any

INK, MUTED, RULE, PAPER = "#1d1f21", "#5f6368", "#d9d7d0", "#fdfcf9"

# Okabe & Ito's palette, darkened until text in it can be read on paper (contrast of 4.5 and more).
SERIES = ("#0067a5", "#b84a00", "#007355", "#94457a", "#856000", "#4a545e")

# P(correct) from 0 to 1 in eleven steps, orange to blue: both ends differ in hue for every kind of colour
# vision, and the pale middle is one half, where a critical length lies.
LEVELS = (
    "#a84b00",
    "#c46a1f",
    "#da8b49",
    "#ebb07f",
    "#f5d5b8",
    "#efeeea",
    "#cadff0",
    "#98c1e2",
    "#649fd0",
    "#387db8",
    "#12598f",
)

FAILS = "#dd8f52"

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    FAILS: "--fails",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)},
    **{colour: f"--level-{i}" for i, colour in enumerate(LEVELS)},
}

WIDTH = 6.6  # inches
SIZE = 9.0  # points
SMALL = 8.0


def text_width(text: str, size: float = SMALL) -> float:
    """Inches that the longest line of ``text`` takes, about: the reader's font isn't known."""
    return max((len(line) for line in text.split("\n")), default=0) * size * 0.56 / 72


RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "scalpel",
    "text.parse_math": False,  # a dollar sign in a prompt is a dollar sign
    "font.size": SIZE,
    "font.family": "sans-serif",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "hatch.color": RULE,
    "hatch.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}
