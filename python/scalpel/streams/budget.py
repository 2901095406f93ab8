"""Group streams so that the covariance states of each group fit into memory."""

from __future__ import annotations

import re

from ..covariance.exact import BLOCK_ROWS

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_of(memory: str | int) -> int:
    """Convert a number, or a text such as "8GiB" or "500 MB", to a number of bytes.

    Raises:
        ValueError: If ``memory`` is anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    if isinstance(memory, bool) or match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"memory is {memory!r}; give bytes, or a text such as '8GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def state_bytes(dim: int, rank: int | None) -> int:
    """Compute the most bytes that a state can take, including the float32 rows that it buffers before it adds them."""
    if rank is None:
        return 8 * dim * dim + 4 * dim * max(dim, BLOCK_ROWS)
    return 8 * 4 * min(rank, dim) * dim


def groups_of(widths: dict[str, int], memory: str | int, rank: int | None) -> list[list[str]]:
    """Divide the streams, in their order, into groups whose states fit into memory.

    Raises:
        ValueError: If the state of a single stream does not fit.
    """
    budget = bytes_of(memory)
    groups: list[list[str]] = [[]]
    used = 0
    for name, dim in widths.items():
        size = state_bytes(dim, rank)
        if size > budget:
            raise ValueError(
                f"{name} is {dim} wide, and its state takes {size / 2**20:.3g} MiB: more than memory={memory!r}. Give "
                "more, or a rank"
            )
        if used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
