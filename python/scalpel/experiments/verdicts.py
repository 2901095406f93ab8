"""The verdicts that an experiment may come to, and their marks: without numpy, so that ``--help`` stays quick."""

from typing import Literal

__all__ = ["MARKS", "VERDICTS", "Verdict"]

Verdict = Literal["reproduced", "not reproduced", "indistinguishable", "not testable here"]

# Each verdict with the mark that stands before it, so that no colour is needed to tell them apart.
MARKS: dict[Verdict, str] = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "indistinguishable": "≈",
    "not testable here": "–",
}
VERDICTS: tuple[Verdict, ...] = tuple(MARKS)
