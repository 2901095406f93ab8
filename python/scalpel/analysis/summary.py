"""Summarising the figures of many chunks as means with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..experiments.statistics import mean_interval

_ALIKE = ("depths",)  # lists that say which entries the others have, alike in all chunks

INTERVAL = "mean ± Student's t (0.975, chunks − 1) × standard deviation / √chunks"


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the records of all chunks, entry by entry.

    A number, or a list of numbers, becomes ``{"mean", "low", "high"}`` of the same shape: the mean over the chunks and
    its 95 % interval by Student's t, which is None for a single chunk. The interval is right where chunks differ like
    independent draws from a normal distribution; successive chunks of a text may be more alike than that. If a chunk
    has no finite value, the mean is None, and ``undefined_in`` counts such chunks. A bool becomes ``{"true", "of"}``:
    in how many chunks it is True, of how many. A string, the list ``depths``, or an entry that no chunk has, stays as
    it is.

    Args:
        records: One dict of figures for each chunk, all with the entries of the first.

    Returns:
        One dict with the same entries.
    """
    return _summary(records)


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise dicts, entry by entry."""
    return {
        name: value if name in _ALIKE else _entry([record.get(name) for record in records])
        for name, value in records[0].items()
    }


def _entry(values: list[Any]) -> Any:
    """Summarise one entry, given its values in all chunks."""
    first = values[0]
    if isinstance(first, dict):
        return _summary([first, *(value or {} for value in values[1:])])
    if isinstance(first, bool):
        return {"true": sum(map(bool, values)), "of": len(values)}
    if all(value is None for value in values) or _is_text(first):
        return first
    array = np.array(values, dtype=np.float64)  # None becomes nan
    mean, low, high = mean_interval(array)
    interval = {"mean": _listed(mean), "low": _listed(low), "high": _listed(high)}
    missing = (~np.isfinite(array)).sum(axis=0)
    return interval | ({"undefined_in": missing.tolist()} if missing.any() else {})


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a string or a list that begins with one."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _listed(values: np.ndarray) -> Any:
    """The array as a number or nested lists, with None in place of numbers that are not finite."""
    return _none(np.asarray(values).tolist())


def _none(value: Any) -> Any:
    if isinstance(value, list):
        return [_none(entry) for entry in value]
    return value if np.isfinite(value) else None
