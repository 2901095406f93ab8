"""Figures of many chunks as means with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..experiments.statistics import mean_interval

INTERVAL = "mean ± Student's t (0.975, chunks − 1) × standard deviation / √chunks"


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all chunks, entry by entry.

    A number, or a list of them, becomes ``{"mean", "low", "high"}`` of its shape: the mean over the chunks and its
    95 % interval by Student's t (None of a single chunk). It is right where chunks differ as draws from a normal
    distribution do, and independently; chunks that lie one after the other in a text may be more alike than that.
    Where a chunk has no finite value, there is no mean: None, and ``undefined_in`` counts these chunks. A truth
    becomes ``{"true", "of"}``; a string, or an entry that no chunk has, stays as it is.
    """
    return {name: _entry([record.get(name) for record in records]) for name in records[0]}


def _entry(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {name: _entry([(value or {}).get(name) for value in values]) for name in first}
    if isinstance(first, bool):
        return {"true": sum(map(bool, values)), "of": len(values)}
    if all(value is None for value in values) or _is_text(first):
        return first
    array = np.array(values, dtype=np.float64)  # None is nan
    mean, low, high = mean_interval(array)
    interval = {"mean": _listed(mean), "low": _listed(low), "high": _listed(high)}
    missing = (~np.isfinite(array)).sum(axis=0)
    return interval | ({"undefined_in": missing.tolist()} if missing.any() else {})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _listed(values: np.ndarray) -> Any:
    return _none(np.asarray(values).tolist())


def _none(value: Any) -> Any:
    if isinstance(value, list):
        return [_none(entry) for entry in value]
    return value if np.isfinite(value) else None
