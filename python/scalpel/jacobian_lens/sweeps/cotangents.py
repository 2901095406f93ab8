"""The cotangents that a lens starts at its target, and the options that say which."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .estimators import check_estimator

__all__ = ["check_options", "ones_at", "signs_of"]


def check_options(targets: str, precision: str | None, skip_first: int, groups: int | None, estimator: str) -> None:
    """Check the options of a prompt's matrices.

    Raises:
        ValueError: For one that isn't allowed.
    """
    check_estimator(estimator)
    if targets not in ("after", "same"):
        raise ValueError(f"targets is {targets!r}; allowed: 'after', 'same'")
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision is {precision!r}; allowed: None, 'bfloat16'")
    if skip_first < 0:
        raise ValueError(f"skip_first is {skip_first}; it counts tokens, and is at least 0")
    if groups is not None and groups < 1:
        raise ValueError(f"groups is {groups}; allowed: 1 or more, or None for exact matrices")


def signs_of(
    batch: Any, count: int, targets: str, groups: int | None, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The factor of each of ``count`` valid positions in each sweep, (sweeps, count).

    For "after" there is one sweep, with ones. For "same" each position has a random sign in the sweep of its own group,
    and 0 in the others.
    """
    if targets == "after":
        return torch.ones(1, count, dtype=dtype, device=device)
    groups = count if groups is None else min(groups, count)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    text = ids.detach().cpu().contiguous().numpy().tobytes() if isinstance(ids, Tensor) else b""
    digest = hashlib.blake2b(text, digest_size=7, key=str(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    signs = torch.randint(0, 2, (count,), generator=generator, device="cpu", dtype=torch.int64) * 2 - 1
    own = torch.arange(count, device="cpu") % groups == torch.arange(groups, device="cpu")[:, None]
    return (own * signs).to(device, dtype)


def ones_at(dimensions: slice, factors: Tensor, width: int) -> Tensor:
    """One cotangent for each of the target's ``dimensions``: ``factors`` (tokens,) there, (T, 1, tokens, width)."""
    rows = torch.arange(dimensions.start, dimensions.stop, device=factors.device)
    cotangents = torch.zeros(len(rows), 1, len(factors), width, dtype=factors.dtype, device=factors.device)
    cotangents[torch.arange(len(rows), device=factors.device), 0, :, rows] = factors
    return cotangents
