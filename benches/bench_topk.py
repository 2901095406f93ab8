"""Compares TopK with PyTorch, NumPy and a plain copy, over widths, k and dtypes.

`python benches/bench_topk.py` checks every answer, times the whole grid in one run (about ten minutes on two
cores), and writes docs/topk.json and, made from it, docs/topk.md. Under pytest-benchmark it times the TopK case of
`scalpel bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scalpel
from measure import commit
from scalpel.cli import bench

WIDTHS = (512, 2048, 8192, 16384, 65536)
KS: dict[str, Callable[[int], int]] = {
    "25 %": lambda width: width // 4,
    "6 %": lambda width: round(0.06 * width),
    "64": lambda width: 64,
    "32": lambda width: 32,
}
DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS = 1 << 26  # 256 MiB of float32: far more than any cache
CORNER_ELEMENTS = 1 << 25
# Calls beside the usual one: the operation, what it ranks by, dtype, width, k (negative: counted from the width).
ASIDE: tuple[tuple[str, str, torch.dtype, int, int], ...] = (
    ("keep_topk", "magnitude", torch.float32, 64, 8),
    ("keep_topk", "magnitude", torch.bfloat16, 64, 8),
    ("keep_topk", "magnitude", torch.float32, 200, 50),
    ("keep_topk", "magnitude", torch.float32, 2048, 1),
    ("keep_topk", "magnitude", torch.bfloat16, 2048, -1),
    ("keep_topk", "magnitude", torch.float32, 1 << 20, 1 << 18),
    ("keep_topk", "magnitude", torch.float16, 2048, 512),
    ("keep_topk", "magnitude", torch.float64, 2048, 512),
    ("keep_topk", "value", torch.float32, 2048, 512),
    ("topk_mask", "magnitude", torch.float32, 2048, 512),
    ("topk_indices", "magnitude", torch.float32, 2048, 512),
)
ROUNDS, SLOW_ROUNDS = 9, 3
DOCS = Path(__file__).parents[1] / "docs"


def test_keep_topk(timed: Callable[[bench.Case], None], device: str) -> None:
    timed(bench.keep_topk(device=device))


def expression(x: Tensor, k: int) -> Tensor:
    """keep_topk in plain PyTorch. topk is called with sorted=False, which saves it a sort."""
    indices = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, indices, x.gather(-1, indices))


def check(x: Tensor, k: int, kept: Tensor, mask: Tensor) -> None:
    """Each row of the mask keeps k entries and no other outranks them; the first rows agree with a stable sort."""
    some = slice(0, max(1, (1 << 22) // x.shape[-1]))
    order = x[some].abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    right = torch.equal(mask[some], torch.zeros_like(mask[some]).scatter_(-1, order, True))
    for rows in range(0, len(x), some.stop):
        part, its_mask = x[rows : rows + some.stop], mask[rows : rows + some.stop]
        size = part.abs()
        right &= bool((its_mask.sum(-1) == k).all())
        least = size.masked_fill(~its_mask, float("inf")).amin(-1)
        right &= bool((size.masked_fill(its_mask, -1).amax(-1) <= least).all())
        right &= torch.equal(kept[rows : rows + some.stop], torch.where(its_mask, part, 0))
    if not right:
        raise bench.WrongAnswer(f"TopK of {tuple(x.shape)} {x.dtype}, k = {k}, is wrong; nothing was timed")


def check_corner(op: str, by: str, x: Tensor, k: int, out: Tensor) -> None:
    """Compares the first rows with a stable sort, in which NaN comes first and the lower index wins ties."""
    some = x[: max(1, (1 << 21) // x.shape[-1])]
    size = some.abs() if by == "magnitude" else some
    order = size.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    mask = torch.zeros(some.shape, dtype=torch.bool).scatter_(-1, order, True)
    answer = out[: len(some)]
    if op == "topk_indices":
        right = torch.equal(answer, order.sort(dim=-1).values)
    elif op == "topk_mask":
        right = torch.equal(answer, mask)
    else:
        right = torch.equal(answer.nan_to_num(1.25), torch.where(mask, some, 0).nan_to_num(1.25))
    if not right:
        raise bench.WrongAnswer(f"{op} by {by} of {tuple(x.shape)} {x.dtype}, k = {k}, is wrong; nothing was timed")


def medians(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds. The contenders take turns, so that other work on the machine affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-1, rounds):  # the first turn warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            result = contenders[name]()
            took = time.perf_counter() - begun
            del result
            if turn >= 0:
                times[name].append(took)
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


def cell(x: Tensor, k: int) -> dict[str, float]:
    """One cell of the grid: checked, then timed."""
    out, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    check(x, k, scalpel.keep_topk(x, k, out=out), scalpel.topk_mask(x, k, out=mask))
    check(x, k, scalpel.keep_topk(x, k), mask)
    times = medians(
        {
            "keep_topk, out=": lambda: scalpel.keep_topk(x, k, out=out),
            "topk_mask, out=": lambda: scalpel.topk_mask(x, k, out=mask),
            "copy_": lambda: out.copy_(x),
            "keep_topk": lambda: scalpel.keep_topk(x, k),
            "clone": lambda: x.clone(),
        },
        ROUNDS,
    )
    magnitude, indices = torch.empty_like(x), torch.empty(*x.shape[:-1], k, dtype=torch.int64)
    values = torch.empty(indices.shape, dtype=x.dtype)

    def expression_out() -> Tensor:
        torch.abs(x, out=magnitude)
        torch.topk(magnitude, k, sorted=False, out=(values, indices))
        return out.zero_().scatter_(-1, indices, torch.gather(x, -1, indices, out=values))

    slow: dict[str, Callable[[], Any]] = {
        "expression, out=": expression_out,
        "expression": lambda: expression(x, k),
        "torch.topk": lambda: torch.topk(x, k, sorted=False, out=(values, indices)),
    }
    if x.dtype == torch.float32:  # numpy has no bfloat16
        array = x.numpy()
        slow["numpy.partition"] = lambda: np.partition(array, x.shape[-1] - k, axis=-1)
    return times | medians(slow, SLOW_ROUNDS)


def corners(rows: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Data on which a selection could be slow. The first kind is what the others are compared with."""
    normal = torch.randn(rows, width, generator=generator)
    ascending = normal.sort(dim=-1).values
    outlier = normal.clone()
    outlier[:, width // 3] = 1e30
    mixed = normal.clone()
    mixed[::2] = 0
    return {
        "normal": normal,
        "sorted up": ascending,
        "sorted down": ascending.flip(-1),
        "sorted by size": normal.abs().sort(dim=-1).values,
        "constant": torch.full((rows, width), 1.5),
        "zeros": torch.zeros(rows, width),
        "two values": torch.where(normal > 0.3, 1.0, 2.0),
        "rounded to 1/4": (normal * 4).round() / 4,
        "one outlier": outlier,
        "mostly zeros (nine in ten)": torch.where(normal.abs() > 1.645, normal, 0.0),
        "each row another scale": normal * 10.0 ** torch.randint(-30, 30, (rows, 1), generator=generator),
        "zero rows between normal ones": mixed,
        "uniform": torch.rand(rows, width, generator=generator),
        "log-normal": (3 * normal).exp(),
        "alternating sizes": normal * torch.where(torch.arange(width) % 2 == 0, 1e-6, 1e6),
        "NaN in a tenth": normal.masked_fill(torch.rand(rows, width, generator=generator) < 0.1, float("nan")),
    }


def corner_table(generator: torch.Generator, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """The time of a call on each kind of data, divided by that on normal data of the same size, k and dtype."""
    ratios = []

    def measure(op: str, by: str, k: int, data: dict[str, Tensor]) -> None:
        normal = data["normal"]
        shape = (len(normal), k) if op == "topk_indices" else normal.shape
        dtype = {"topk_indices": torch.int64, "topk_mask": torch.bool}.get(op, normal.dtype)
        out, call = torch.empty(shape, dtype=dtype), getattr(scalpel, op)
        for x in data.values():
            check_corner(op, by, x, k, call(x, k, by=by, out=out))
        times = medians({name: lambda x=x: call(x, k, by=by, out=out) for name, x in data.items()}, 5)
        what = {"op": op, "by": by, "dtype": str(normal.dtype)[6:], "width": normal.shape[-1], "k": k}
        ratios.extend(what | {"data": name, "ratio": took / times["normal"]} for name, took in times.items())

    for width in widths:
        kinds = corners(CORNER_ELEMENTS // width, width, generator)
        for dtype in DTYPES:
            data = {name: x.to(dtype) for name, x in kinds.items()}
            for k in (32, width // 4, width - width // 16):
                measure("keep_topk", "magnitude", k, data)
    for op, by, dtype, width, k in ASIDE:
        kinds = corners(CORNER_ELEMENTS // 4 // width, width, generator)
        measure(op, by, k % width, {name: x.to(dtype) for name, x in kinds.items()})
    return ratios


def run(widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> dict[str, Any]:
    """Measures the whole grid and the corners."""
    generator = torch.Generator().manual_seed(seed)
    grid = []
    with torch.no_grad():
        for width in widths:
            normal = torch.randn(ELEMENTS // width, width, generator=generator)
            for dtype in DTYPES:
                x = normal.to(dtype)
                for name, k_of in KS.items():
                    ms = cell(x, k_of(width))
                    grid.append({"dtype": str(dtype)[6:], "width": width, "k": name, "k_is": k_of(width), "ms": ms})
                    print(f"{str(dtype)[6:]:9} {width:6} k = {name:4}", {n: round(t, 1) for n, t in ms.items()})
        return {
            "elements": ELEMENTS,
            "rounds": ROUNDS,
            "slow_rounds": SLOW_ROUNDS,
            "seed": seed,
            "commit": commit(),
            "grid": grid,
            "corners": corner_table(generator, (512, 2048, 16384)),
            "environment": bench.environment(),
        }


def table(result: dict[str, Any]) -> str:
    """docs/topk.md. Every figure in it is computed from the result."""
    grid = result["grid"]
    f32_ms = {(c["width"], c["k"]): c["ms"]["keep_topk, out="] for c in grid if c["dtype"] == "float32"}

    def ratios(c: dict[str, Any]) -> dict[str, float | None]:
        ms = c["ms"]
        ours = ms["keep_topk, out="]
        partition = ms.get("numpy.partition")
        return {
            "copy": ours / ms["copy_"],
            "mask": ms["topk_mask, out="] / ours,
            "clone": ms["keep_topk"] / ms["clone"],
            "expression, out=": ms["expression, out="] / ours,
            "expression": ms["expression"] / ms["keep_topk"],
            "topk": ms["torch.topk"] / ours,
            "partition": None if partition is None else partition / ours,
            "f32": None if c["dtype"] == "float32" else f32_ms[c["width"], c["k"]] / ours,
        }

    def ratios_text(r: dict[str, float | None]) -> str:
        less = [f"{r[name]:.2f}" if r.get(name) else "" for name in ("copy", "mask", "clone")]
        more = ("expression, out=", "expression", "topk", "partition", "f32")
        return " | ".join(less + [f"{r[name]:.1f}×" if r.get(name) else "" for name in more])

    cells = [(c, ratios(c)) for c in grid]
    geometric = {
        name: statistics.geometric_mean([r[name] for _, r in cells if r[name] is not None])
        for name in ("copy", "mask", "clone", "expression, out=", "expression", "topk", "partition", "f32")
    }
    worst = {
        "copy": max(r["copy"] for _, r in cells),
        "mask": max(r["mask"] for _, r in cells),
        "clone": max(r["clone"] for _, r in cells),
        "f32": min(r["f32"] for _, r in cells if r["f32"] is not None),
    }
    environment = result["environment"]
    slowest = sorted(result["corners"], key=lambda c: -c["ratio"])
    rounds = f"({result['rounds']} rounds; {result['slow_rounds']} of the slow ones)"
    lines = [
        "# TopK: figures",
        "",
        "Made by `python benches/bench_topk.py` from the numbers in `topk.json`. Do not edit.",
        "",
        f"Median milliseconds and ratios of medians over {result['elements'] >> 20} Mi elements of normal data, after",
        "every answer of ours was checked. The contenders take turns, the slow ones (from *expression* on) among",
        f"themselves {rounds}. {environment['processor']}, {environment['threads']} threads,",
        f"target {environment['target']}, torch {environment['torch']}, "
        f"scalpel {environment['version']}, commit {result['commit']}.",
        "",
        "- *ms*: `keep_topk(x, k, out=y)`; *÷ copy_*: that time divided by `y.copy_(x)`'s",
        "- *mask*: `topk_mask(x, k, out=m)`, divided by `keep_topk(x, k, out=y)`",
        "- *÷ clone*: `keep_topk(x, k)`, whose result asks for huge pages, divided by `x.clone()`, which does not ask",
        "- *expression, out=*: abs, topk, gather and scatter_; *topk*: `torch.topk` alone (both write to memory that",
        "  is already allocated); *partition*: `numpy.partition` alone, which allocates its result and has one thread.",
        "  Each is divided by `keep_topk(x, k, out=y)`",
        "- *expression*: the same expression without `out=`, divided by `keep_topk(x, k)`",
        "- *÷ float32*: how much faster than the same cell in float32",
        "",
        "| dtype | width | k | ms | ÷ copy_ | mask | ÷ clone | expression, out= | expression | topk | partition "
        "| ÷ float32 |",
        "|---" * 2 + "|---:" * 10 + "|",
    ]
    for c, r in cells:
        ms = f"{c['ms']['keep_topk, out=']:.1f}"
        lines.append(f"| {c['dtype']} | {c['width']} | {c['k']} | {ms} | {ratios_text(r)} |")
    lines += [
        f"| geometric mean | | | | {ratios_text(geometric)} |",
        f"| worst cell | | | | {ratios_text(worst)} |",
        "",
        "## Other data",
        "",
        "Times are divided by that of normal data of the same width, k and dtype. The calls are `keep_topk` of float32",
        "and bfloat16 at widths 512, 2048 and 16384, with k of 32, a quarter and fifteen sixteenths of the width, and",
        "those of the second table. The first table shows the slowest call on each kind of data, and how many calls",
        "take more than twice as long.",
        "",
        "| data | time | where | above 2 |",
        "|---|---:|---|---:|",
    ]

    def where(c: dict[str, Any]) -> str:
        return f"{c['op']} by {c['by']}, {c['dtype']}, width {c['width']}, k = {c['k']}"

    for name in dict.fromkeys(c["data"] for c in slowest):
        c = next(c for c in slowest if c["data"] == name)
        if name != "normal":
            above = [d["ratio"] > 2 for d in slowest if d["data"] == name]
            lines.append(f"| {name} | {c['ratio']:.2f} | {where(c)} | {sum(above)} of {len(above)} |")
    lines += ["", "| call | slowest | data |", "|---|---:|---|"]
    for op, by, dtype, width, k in ASIDE:
        call = {"op": op, "by": by, "dtype": str(dtype)[6:], "width": width, "k": k % width}
        c = next(c for c in slowest if c | call == c)
        lines.append(f"| {where(c)} | {c['ratio']:.2f} | {c['data']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for topk.json and topk.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(tuple(options.widths), options.seed)
    (options.out / "topk.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "topk.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
