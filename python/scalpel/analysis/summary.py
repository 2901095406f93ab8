"""Figures of many chunks as means with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

DRAWS = 2000


def summarise(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The figures of all chunks, entry by entry.

    A number, or a list of them, becomes ``{"mean", "low", "high"}`` of its shape: the mean over the chunks and its
    95 % percentile bootstrap interval (chunks drawn with replacement; None of a single chunk). Where a chunk has no
    finite value, there is no mean: None, and ``undefined_in`` counts these chunks. A truth becomes
    ``{"true", "of"}``; a text, or an entry that no chunk has, stays as it is.
    """
    picks = np.random.default_rng(seed).integers(len(records), size=(DRAWS, len(records)))
    return {name: _entry([record.get(name) for record in records], picks) for name in records[0]}


def _entry(values: list[Any], picks: np.ndarray) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {name: _entry([(value or {}).get(name) for value in values], picks) for name in first}
    if isinstance(first, bool):
        return {"true": sum(map(bool, values)), "of": len(values)}
    if all(value is None for value in values) or _is_text(first):
        return first
    array = np.array(values, dtype=np.float64)  # None is nan
    mean = array.mean(axis=0)
    low = high = np.full_like(mean, np.nan)
    if len(values) > 1:
        weights = np.stack([np.bincount(row, minlength=len(values)) for row in picks]) / len(values)
        known = np.isfinite(mean)
        drawn = np.tensordot(weights, np.where(known, array, 0.0), axes=1)
        low, high = (np.where(known, end, np.nan) for end in np.percentile(drawn, [2.5, 97.5], axis=0))
    found = {"mean": _listed(mean), "low": _listed(low), "high": _listed(high)}
    missing = (~np.isfinite(array)).sum(axis=0)
    return found | ({"undefined_in": missing.tolist()} if missing.any() else {})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _listed(values: np.ndarray) -> Any:
    return _none(np.asarray(values).tolist())


def _none(value: Any) -> Any:
    if isinstance(value, list):
        return [_none(each) for each in value]
    return value if np.isfinite(value) else None
