"""The native core of scalpel. Internal: nobody checks that an address is alive."""

from typing import TypedDict

# (address, dtype name, shape, strides in elements)
_Array = tuple[int, str, tuple[int, ...], tuple[int, ...]]

class _Target(TypedDict):
    name: str
    description: str
    needs: str
    built: bool
    supported: bool

def active_target() -> str: ...
def compiler() -> str: ...
def force_target(name: str) -> None: ...
def keep_topk(x: _Array, k: int, by_value: bool, out: _Array, threads: int = 0) -> None: ...
def kernel_calls() -> dict[str, dict[str, tuple[str, int]]]: ...
def max_threads() -> int: ...
def merge_moments(
    count: _Array,
    mean: _Array,
    scatter: _Array,
    centered: bool,
    other_count: _Array,
    other_mean: _Array,
    other_scatter: _Array,
    threads: int = 0,
) -> None: ...
def parallel_backend() -> str: ...
def subtract_moments(
    count: _Array,
    mean: _Array,
    scatter: _Array,
    centered: bool,
    other_count: _Array,
    other_mean: _Array,
    other_scatter: _Array,
    threads: int = 0,
) -> None: ...
def targets() -> list[_Target]: ...
def topk_indices(x: _Array, k: int, by_value: bool, out: _Array, threads: int = 0) -> None: ...
def topk_mask(x: _Array, k: int, by_value: bool, out: _Array, threads: int = 0) -> None: ...
def update_moments(
    count: _Array, mean: _Array, scatter: _Array, centered: bool, x: _Array, threads: int = 0
) -> int: ...
def version() -> str: ...
