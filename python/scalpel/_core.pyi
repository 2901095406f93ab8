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
    counts: _Array,
    mean: _Array,
    scatter: _Array,
    waiting: _Array,
    centered: bool,
    other_counts: _Array,
    other_mean: _Array,
    other_scatter: _Array,
    other_waiting: _Array,
    threads: int = 0,
) -> None: ...
def parallel_backend() -> str: ...
def prefer_huge_pages(address: int, bytes: int) -> None: ...
def subtract_moments(
    counts: _Array,
    mean: _Array,
    scatter: _Array,
    waiting: _Array,
    centered: bool,
    other_counts: _Array,
    other_mean: _Array,
    other_scatter: _Array,
    other_waiting: _Array,
    threads: int = 0,
) -> None: ...
def targets() -> list[_Target]: ...
def topk_indices(x: _Array, k: int, by_value: bool, out: _Array, threads: int = 0) -> None: ...
def topk_mask(x: _Array, k: int, by_value: bool, out: _Array, threads: int = 0) -> None: ...
def update_moments(
    counts: _Array, mean: _Array, scatter: _Array, waiting: _Array, centered: bool, x: _Array, threads: int = 0
) -> int: ...
def center_rows(x: _Array, centered: bool, mean: _Array, out: _Array, threads: int = 0) -> float: ...
def first_bad_row(x: _Array, threads: int = 0) -> int: ...
def block_rows() -> int: ...
def fold_moments(
    counts: _Array, mean: _Array, scatter: _Array, waiting: _Array, centered: bool, threads: int = 0
) -> None: ...
def symmetric_moments(
    counts: _Array, mean: _Array, scatter: _Array, waiting: _Array, centered: bool, out: _Array, threads: int = 0
) -> None: ...
def version() -> str: ...

# ---- tangents, sixteen at a time: csrc/jvp/jvp.h ------------------------------------------------

def tangent_lanes() -> int: ...
def linear_lanes(
    starts: _Array,
    columns: _Array,
    weights: _Array,
    cols: int,
    x: _Array,
    x_index: _Array | None,
    scale: _Array | None,
    out: _Array,
    out_index: _Array | None,
    threads: int = 0,
) -> None: ...
def linear_rows(
    starts: _Array,
    columns: _Array,
    weights: _Array,
    cols: int,
    x: _Array,
    bias: _Array | None,
    out: _Array,
    threads: int = 0,
) -> None: ...
def rows_to_lanes(rows: _Array, lanes: _Array, threads: int = 0) -> None: ...
def lanes_to_rows(lanes: _Array, rows: _Array, threads: int = 0) -> None: ...
def norm_jvp(
    normed: _Array,
    rate: _Array,
    gain: _Array,
    centred: bool,
    over: int,
    x: _Array,
    out: _Array,
    out_index: _Array | None,
    threads: int = 0,
) -> None: ...
def norm_vjp(
    normed: _Array,
    rate: _Array,
    gain: _Array,
    centred: bool,
    over: int,
    x: _Array,
    x_index: _Array | None,
    out: _Array,
    threads: int = 0,
) -> None: ...
def gather_lanes(x: _Array, out: _Array, index: _Array, threads: int = 0) -> None: ...
def scatter_lanes(x: _Array, index: _Array | None, out: _Array, threads: int = 0) -> None: ...
def attention_jvp(
    q: _Array,
    k: _Array,
    v: _Array,
    y: _Array,
    allowed: _Array,
    sink: _Array | None,
    heads: int,
    kv_heads: int,
    scale: float,
    dq: _Array | None,
    dq_index: _Array | None,
    dk: _Array | None,
    dk_index: _Array | None,
    dv: _Array | None,
    dv_index: _Array | None,
    dy: _Array,
    threads: int = 0,
) -> None: ...
def attention_vjp(
    q: _Array,
    k: _Array,
    v: _Array,
    y: _Array,
    allowed: _Array,
    sink: _Array | None,
    heads: int,
    kv_heads: int,
    scale: float,
    dq: _Array | None,
    dq_index: _Array | None,
    dk: _Array | None,
    dk_index: _Array | None,
    dv: _Array | None,
    dv_index: _Array | None,
    dy: _Array,
    threads: int = 0,
) -> None: ...
