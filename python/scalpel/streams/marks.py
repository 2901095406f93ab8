"""Compute digests of a corpus and a loss function that are the same in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..hooks.inputs import Limits, read_inputs
from ..models.marks import value_mark


def batch_mark(batch: Any) -> bytes:
    """Return bytes that distinguish a batch from others: everything in it, including labels."""
    read_inputs(batch, Limits())  # raises an error if it is not a batch
    values = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    return b"|".join(f"{name} ".encode() + value_mark(values[name]) for name in sorted(values, key=str))


def corpus_mark(batches: Iterable[Any]) -> str:
    """Compute the SHA-256 of all batches in their order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch_mark(batch))
    return digest.hexdigest()


def function_mark(function: Any) -> str:
    """Return a function's name and the SHA-256 of its code, its defaults and the values that it closes over."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"{name} {hashlib.sha256(value_mark(function)).hexdigest()}"
