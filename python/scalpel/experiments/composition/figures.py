"""The pictures of the experiment: the defect by layer, beside its nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .summary import Summary

__all__ = ["figures_of"]

_TITLES = {"after": "targets at all later tokens", "same": "the target at the same token"}


def figures_of(found: Mapping[str, Summary], end: int) -> dict[str, Any]:
    """A picture for each kind of targets: the defect over l, a line for each m, and the nulls."""
    return {f"defect_{kind}": _figure(kind, each, end) for kind, each in found.items()}


def _figure(kind: str, summary: Summary, end: int) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    middles = sorted({row["m"] for row in summary.pairs})
    for m in middles:
        rows = [row for row in summary.pairs if row["m"] == m]
        series.append(
            {
                "label": f"m = {m}",
                "style": "line" if len(rows) > 1 else "points",
                "x": [row["l"] for row in rows],
                "y": [row["defect"] for row in rows],
                "low": [row["interval"][0] for row in rows],
                "high": [row["interval"][1] for row in rows],
            }
        )
    for name, label in (
        ("split_upper", "sides exchanged, 97.5 %"),
        ("frozen", "attention frozen"),
        ("edges", "linear, edges"),
    ):
        by_source: dict[int, list[float]] = {}
        for row in summary.pairs:
            if row[name] is not None:
                by_source.setdefault(row["l"], []).append(row[name])
        if by_source:
            mean = {l: sum(values) / len(values) for l, values in sorted(by_source.items())}  # noqa: E741
            style = "dashed" if len(mean) > 1 else "points"
            series.append({"label": label, "style": style, "x": list(mean), "y": list(mean.values())})
    return {
        "kind": "curves",
        "title": f"Defect of composition, {_TITLES[kind]}",
        "summary": "How far the product of two mean Jacobians, l → m and m → the end, is from that of l → the end, "
        f"by ‖J̄ − I‖; the end is layer {end - 1}. Bands are 95 %. Nulls are means over m.",
        "xlabel": "layer l",
        "ylabel": "relative defect",
        "series": series,
    }
