"""The operations on a GPU, beside PyTorch on it and the most that the device can do.

`python benches/bench_cuda.py` checks every answer against the CPU or float64, times with device events, takes all
ratios from one run, and writes docs/cuda_figures.json and .md. Without a GPU, or a build with nvcc, it says so and
writes nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalpel
from bench_jacobian import DENSITIES, LENGTH, model_of, through_torch_func
from measure import commit
from scalpel import lanes
from scalpel._native import runs_on
from scalpel.cli import bench

DOCS = Path(__file__).parents[1] / "docs"
ELEMENTS = 1 << 28  # several times the last-level cache
SETS, ROUNDS = 3, 15
WIDTHS = (512, 2048, 8192, 16384, 65536, 1 << 17)
LONG = 4096
TANGENTS, LAYERS = 64, 8  # csp_yolo2 has eight


def main() -> None:
    if not torch.cuda.is_available() or not runs_on(torch.device("cuda")):
        sys.exit(
            "there is no GPU here, or scalpel was built without nvcc (scalpel.show_config()); nothing was measured"
        )
    content = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "commit": commit(),
        "topk": [
            topk(width, k, dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for width in WIDTHS
            for k in (width // 4, 32)
        ]
        + [topk(2048, 512, torch.float32, ties) for ties in ("ties", "constant")],
        "jvp": [jvp(density) for density in DENSITIES],
        "attention": [attention(length) for length in (512, LONG)],
        "covariance": [covariance(dim, dtype) for dim in (4096, 8192) for dtype in (torch.bfloat16, torch.float32)],
    }
    (DOCS / "cuda_figures.json").write_text(json.dumps(content, indent=1) + "\n")
    (DOCS / "cuda_figures.md").write_text(page(content))


def medians(contenders: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Median milliseconds by device events. Each contender has a call for every set of inputs, and they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-3, ROUNDS):
        for name, calls in contenders.items():
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            calls[turn % len(calls)]()
            ended.record()
            ended.synchronize()
            if turn >= 0:
                times[name].append(begun.elapsed_time(ended))
    return {name: statistics.median(each) for name, each in times.items()}


def check(right: bool, what: str) -> None:
    if not right:
        raise bench.WrongAnswer(f"{what} is wrong; nothing was timed")


# ---- TopK ----------------------------------------------------------------------------------------


def expression(x: Tensor, k: int) -> Tensor:
    indices = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, indices, x.gather(-1, indices))


def topk(width: int, k: int, dtype: torch.dtype, kind: str = "normal") -> dict[str, Any]:
    """``keep_topk``, a clone of the same bytes, and PyTorch's expression."""
    rows = ELEMENTS // width // (2 if dtype == torch.float32 else 1)
    sets = [torch.randn(rows, width, device="cuda").to(dtype) for _ in range(SETS)]
    if kind == "ties":
        sets = [x.round() for x in sets]
    elif kind == "constant":
        sets = [torch.ones_like(x) for x in sets]
    some = sets[0][:64]
    check(
        torch.equal(scalpel.keep_topk(some, k).cpu(), scalpel.keep_topk(some.cpu(), k)), f"keep_topk of width {width}"
    )
    out = torch.empty_like(sets[0])
    slow = [lambda x=x: expression(x[: max(1, rows // 8)], k) for x in sets]
    times = medians(
        {
            "ours": [lambda x=x: scalpel.keep_topk(x, k, out=out) for x in sets],
            "clone": [lambda x=x: out.copy_(x) for x in sets],
            "torch_eighth": slow,
        }
    )
    return {
        "width": width,
        "k": k,
        "dtype": str(dtype)[6:],
        "kind": kind,
        "rows": rows,
        **times,
        "of_clones_bandwidth": times["clone"] / times["ours"],
        "times_torch": 8 * times["torch_eighth"] / times["ours"],
    }


# ---- JVP -----------------------------------------------------------------------------------------


def jvp(density: float) -> dict[str, Any]:
    """Times the products of a model with csp_yolo2's shape.

    The contenders are ours as it chooses, ours with every linear layer sparse or every one dense, and vmap(jvp). The
    density at which sparse and dense take equally long is what SPARSE_BELOW_CUDA should be.
    """
    model = model_of(density, torch.float32, layers=LAYERS).cuda()
    ids = torch.randint(64, (1, LENGTH), device="cuda")
    J = scalpel.jacobian(model, ids, "0.resid_in", "final_resid")
    sets = [torch.randn(TANGENTS, *J.source_shape, device="cuda") for _ in range(SETS)]
    some = sets[0][:2]
    double = model_of(density, torch.float64, layers=LAYERS).cuda()
    exact = through_torch_func(double, ids, some.double())
    check(relative(scalpel.jacobian(double, ids, "0.resid_in", "final_resid").jvp(some.double()), exact) < 1e-9, "jvp")
    del double

    def forced(below: float) -> Callable[[Tensor], Tensor]:
        def product(V: Tensor) -> Tensor:
            chosen, lanes.SPARSE_BELOW_CUDA = lanes.SPARSE_BELOW_CUDA, below
            try:
                return J.jvp(V)
            finally:
                lanes.SPARSE_BELOW_CUDA = chosen

        return product

    ways = {"ours": J.jvp, "sparse": forced(2.0), "dense": forced(0.0)}
    ways["torch"] = lambda V: through_torch_func(model, ids, V)
    times = medians({name: [lambda V=V, way=way: way(V) for V in sets] for name, way in ways.items()})
    return {
        "density": density,
        "tangents": TANGENTS,
        **times,
        "times_torch": times["torch"] / times["ours"],
        "error": relative(J.jvp(some), exact),
        "torch_error": relative(through_torch_func(model, ids, some), exact),
    }


def attention(length: int) -> dict[str, Any]:
    """Times sixteen tangents through attention with a sink, beside vmap(jvp) of the plain expression.

    At length LONG, vmap(jvp) takes one tangent and its time is multiplied by sixteen, because the L × L arrays of
    sixteen tangents would not fit into memory.
    """
    from scalpel.lanes import LANES, Attention, Lanes

    heads, d, scale = 16, 16, 0.25
    q, k, v = (torch.randn(1, length, heads * d, device="cuda") for _ in range(3))
    sink = torch.randn(heads, device="cuda")
    allowed = torch.ones(1, length, length, dtype=torch.bool, device="cuda").tril()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = [part.view(1, -1, heads, d).transpose(1, 2) for part in (q, k, v)]
        scores = (split[0] @ split[1].mT * scale).masked_fill(~allowed[:, None], -torch.inf)
        slot = sink.to(q.dtype).view(1, heads, 1, 1).expand(1, heads, scores.shape[2], 1)
        return (torch.cat([slot, scores], -1).softmax(-1)[..., 1:] @ split[2]).transpose(1, 2).flatten(2)

    at = Attention(q, k, v, plain(q, k, v), allowed, sink, heads, heads, scale)
    tangents = [torch.randn(LANES, 1, length, heads * d, device="cuda") for _ in range(3)]
    lanes = [Lanes.from_rows(part.flatten(1, 2)) for part in tangents]

    def peer(parts: list[Tensor]) -> Tensor:
        return torch.func.vmap(lambda *t: torch.func.jvp(plain, (q, k, v), t)[1])(*parts)

    ours = at.jvp(*lanes).rows(1).view(length, -1)
    exact = torch.func.jvp(plain, tuple(x.double() for x in (q, k, v)), tuple(x[0].double() for x in tangents))[1][0]
    ours_error, theirs = relative(ours, exact), relative(peer([x[:1] for x in tangents])[0, 0], exact)
    check(ours_error < 1e-4, f"attention at L = {length}")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    at.jvp(*lanes)
    beyond = torch.cuda.max_memory_allocated() - before
    share = LANES if length < LONG else 1
    times = medians({"ours": [lambda: at.jvp(*lanes)], "torch": [lambda: peer([p[:share] for p in tangents])]})
    ratio = times["torch"] * LANES / share / times["ours"]
    return {
        "length": length,
        **times,
        "torch_tangents": share,
        "times_torch": ratio,
        "error": ours_error,
        "torch_error": theirs,
        "bytes_beyond": beyond,
    }


def relative(computed: Tensor, exact: Tensor) -> float:
    return float((computed.double() - exact).norm() / exact.norm())


# ---- covariance ----------------------------------------------------------------------------------


def covariance(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Times an update of an uncentered state, beside PyTorch's XᵀX of the same rows in the same dtype."""
    rows = 16384
    sets = [torch.randn(rows, dim, device="cuda").to(dtype) for _ in range(SETS)]
    state = scalpel.StreamingCovariance(dim, center=False).update(sets[0])
    exact = sets[0].double().T @ sets[0].double() / rows
    ours, theirs = relative(state.covariance(), exact), relative(sets[0].T @ sets[0] / rows, exact)
    check(ours < 1e-2 and (dtype == torch.bfloat16 or ours < 2 * theirs), f"the covariance of {dim} {dtype}")
    times = medians({"ours": [lambda x=x: state.update(x) for x in sets], "torch": [lambda x=x: x.T @ x for x in sets]})
    return {
        "dim": dim,
        "dtype": str(dtype)[6:],
        "rows": rows,
        **times,
        "times_torch": times["torch"] / times["ours"],
        "error": ours,
        "torch_error": theirs,
    }


def page(content: dict[str, Any]) -> str:
    lines = [
        "# On a GPU",
        "",
        f"Made by `python benches/bench_cuda.py`: {content['device']}, torch {content['torch']}, commit "
        f"{content['commit']}. Median milliseconds by device events. Every answer was checked before it was timed.",
        "",
    ]
    for name in ("topk", "jvp", "attention", "covariance"):
        rows = content[name]
        lines += [f"## {name}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += [
            "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
