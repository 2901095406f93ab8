"""Compares StreamingCovariance with plain torch and scikit-learn in one run, after the answers were checked.

`python benches/bench_covariance.py` takes about four minutes and writes docs/covariance.json and docs/covariance.md.
`pytest benches/bench_covariance.py` times the covariance case of `scalpel bench` instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scalpel
from measure import commit, medians, where_measured
from scalpel import StreamingCovariance
from scalpel.cli import bench

DOCS = Path(__file__).parents[1] / "docs"
EIGEN_DIM, EIGEN_ROWS, LEADING = 2048, 256, 32
SKETCH_DIM, SKETCH_ROWS, SKETCH_BATCHES = 4096, 1024, 6


def test_covariance_update(timed: Callable[[bench.Case], None], device: str) -> None:
    timed(bench.covariance_update(device=device))


# ---- rows ----------------------------------------------------------------------------------------


def decaying(power: float, rows: int, dim: int) -> Iterator[Tensor]:
    """Batches whose eigenvalues fall as i^-power, in randomly rotated axes."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (dim,), generator=generator) * 2.0 - 1
    scale = torch.arange(1, dim + 1) ** (-power / 2)
    while True:
        x = torch.randn(rows, dim, generator=generator) * scale
        # a rotation that costs d log d: the Fourier transform of real rows, as an orthogonal matrix
        bins = torch.fft.rfft(x * signs, norm="ortho")
        inner = bins[:, 1:-1] * 2**0.5
        yield torch.cat([bins[:, :1].real, inner.real, inner.imag, bins[:, -1:].real], dim=1)


def activations(rows: int, dim: int) -> Iterator[Tensor]:
    """Real rows: all hooks of the shipped bracket-mini side by side, then its logits, over its training texts."""
    from scalpel.tasks.corpus import documents, interpreter_sources

    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    assert model.tokenizer is not None
    kept: list[Tensor] = []
    count = 0
    for document in documents(interpreter_sources(), np.random.default_rng(0)):
        ids = model.tokenizer.encode(document.text)[: model.config.block_size]
        with torch.no_grad():
            logits, acts = model.run_with_cache(torch.tensor([ids]))
        kept.append(torch.cat([*(value[0] for value in acts.values()), logits[0]], dim=1)[:, :dim])
        count += len(ids)
        while count >= rows:
            whole = torch.cat(kept)
            yield whole[:rows].clone()
            kept, count = [whole[rows:]], count - rows


KINDS: dict[str, Callable[[int, int], Iterator[Tensor]]] = {
    "activations of bracket-mini": activations,
    "decay 1/i": lambda rows, dim: decaying(1.0, rows, dim),
    "decay 1/i²": lambda rows, dim: decaying(2.0, rows, dim),
}


def error_of(covariance: Tensor, x: Tensor) -> float:
    """The largest error against two passes in float64, relative to the largest entry."""
    wide = x.double() - x.double().mean(dim=0)
    expected = wide.T @ wide / len(x)
    return float((covariance - expected).abs().max() / expected.abs().max())


# ---- what is timed -------------------------------------------------------------------------------


def exact(dim: int, rows: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    narrow = x.bfloat16()
    states = [StreamingCovariance(dim) for _ in range(3)]
    for _ in range(1 + dim // rows):  # beyond the first rows, which wait until there are as many as columns
        for state in states:
            state.update(x)
    fresh = StreamingCovariance(dim).update(x).covariance()
    if error_of(fresh, x) > 3e-7:
        raise bench.WrongAnswer(f"the covariance of {dim} columns is {error_of(fresh, x):.1e} off")
    product, half, narrow_product = torch.empty(dim, dim), torch.empty(dim // 2, dim), narrow.T @ narrow

    def streamed() -> None:
        for part in x.split(256):
            states[1].update(part)

    times = medians(
        {
            "ours": (lambda: states[0].update(x), rounds),
            "ours in batches of 256": (streamed, rounds),
            "ours, bfloat16": (lambda: states[2].update(narrow), rounds),
            "XᵀX": (lambda: torch.mm(x.T, x, out=product), rounds),
            "half of XᵀX": (lambda: torch.mm(x.T[: dim // 2], x, out=half), rounds),
            "XᵀX, bfloat16": (lambda: torch.mm(narrow.T, narrow, out=narrow_product), rounds),
        }
    )
    print(dim, {name: round(value, 1) for name, value in times.items()}, flush=True)
    return {"dim": dim, "rows": rows, "ms": times}


def errors() -> list[dict[str, Any]]:
    measured = []
    for rows, dim, shift in ((4096, 512, 0.0), (4096, 512, 1000.0), (300, 64, 0.0), (300, 64, 1000.0)):
        ours, theirs = [], []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            turn = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
            x = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ turn + shift).float()
            ours.append(error_of(StreamingCovariance(dim).update(x).covariance(), x))
            theirs.append(error_of(torch.cov(x.T, correction=0).double(), x))
        measured.append({"rows": rows, "dim": dim, "mean": shift, "ours": max(ours), "torch": max(theirs)})
    return measured


def leading(kind: str) -> dict[str, Any]:
    """Times the top of the spectrum after each batch. Our time includes the update; torch gets its XᵀX for free."""
    state = StreamingCovariance(EIGEN_DIM)
    batches = KINDS[kind](EIGEN_ROWS, EIGEN_DIM)
    for _ in range(16):
        state.update(next(batches))
    state.eigh(LEADING)
    ours, torchs, worst = [], [], 0.0
    for turn in range(9):
        x = next(batches)
        begun = time.perf_counter()
        values, vectors = state.update(x).eigh(LEADING)
        ours.append(time.perf_counter() - begun)
        C = state.covariance()
        apart = torch.linalg.vector_norm(vectors @ C - values[:, None] * vectors, dim=1).max() / values[0]
        worst = max(worst, float(apart))
        narrow = C.float()
        if turn % 3 == 0:
            begun = time.perf_counter()
            torch.linalg.eigh(narrow)
            torchs.append(time.perf_counter() - begun)
    if worst > 1e-5:
        raise bench.WrongAnswer(f"a residual is {worst:.1e} of the largest eigenvalue")
    times = {"kind": kind, "ours": statistics.median(ours) * 1e3, "torch": statistics.median(torchs) * 1e3}
    print(times, worst, flush=True)
    return times | {"residual": worst}


def sketches(kind: str, rank: int) -> dict[str, Any]:
    """Milliseconds for each batch, and the share of the variance of all batches that the directions hold."""
    from sklearn.decomposition import IncrementalPCA

    source = KINDS[kind](SKETCH_ROWS, SKETCH_DIM)
    batches = [next(source) for _ in range(SKETCH_BATCHES)]
    whole = StreamingCovariance(SKETCH_DIM)
    for x in batches:
        whole.update(x)
    C = whole.covariance()
    total = float(C.trace())

    def captured(vectors: Tensor) -> float:
        Q = torch.linalg.qr(vectors.double().T).Q
        return float((Q * (C @ Q)).sum()) / total

    incremental = IncrementalPCA(rank)
    tracker = StreamingCovariance(SKETCH_DIM, rank)
    directions = StreamingCovariance(SKETCH_DIM, rank, "frequent_directions")
    wider = StreamingCovariance(SKETCH_DIM, 2 * rank, "frequent_directions")
    ways: dict[str, Callable[[Tensor], Any]] = {
        "tracker": tracker.update,
        "Frequent Directions": directions.update,
        "Frequent Directions, rank doubled": wider.update,
        "IncrementalPCA": lambda x: incremental.partial_fit(x.numpy()),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():  # not in turn: the threads of numpy's BLAS would hold up torch's
        for x in batches:
            begun = time.perf_counter()
            way(x)
            times[name].append(time.perf_counter() - begun)
    begun = time.perf_counter()
    together = torch.cat(batches)
    _, _, V = torch.pca_lowrank(together, q=rank)
    lowrank = (time.perf_counter() - begun) / len(batches)
    vectors = {
        "tracker": tracker.eigh().vectors,
        "Frequent Directions": directions.eigh().vectors,
        "Frequent Directions, rank doubled": wider.eigh(rank).vectors,
        "IncrementalPCA": torch.from_numpy(incremental.components_),
    }
    measured = {
        name: {"ms": statistics.median(took[1:]) * 1e3, "captured": captured(vectors[name])}
        for name, took in times.items()
    }
    measured["pca_lowrank, all at once"] = {"ms": lowrank * 1e3, "captured": captured(V.T)}
    best = float(torch.linalg.eigvalsh(C)[-rank:].sum()) / total
    shown = {name: (round(way["ms"], 1), round(way["captured"], 4)) for name, way in measured.items()}
    print(kind, rank, best, shown, flush=True)
    return {"kind": kind, "rank": rank, "best": best, "ways": measured}


def run() -> dict[str, Any]:
    return {
        "exact": [exact(2048, 4096, 9), exact(8192, 4096, 3)],
        "errors": errors(),
        "leading": [leading(kind) for kind in KINDS],
        "sketches": [sketches(kind, rank) for kind in KINDS for rank in (32, 64)],
        "environment": bench.environment(),
        "commit": commit(),
    }


# ---- the page ------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """docs/covariance.md. Every figure in it is computed from the result."""
    lines = [
        "# Streaming covariance: figures",
        "",
        "Made by `python benches/bench_covariance.py` from the numbers in `covariance.json`. Do not edit.",
        "",
        "Warm medians in milliseconds. The contenders take turns in one process, after the answers were checked.",
        where_measured(result["environment"], result["commit"]),
        "",
        "## Exact update, float32 rows",
        "",
        "*XᵀX* is torch's product alone, with no mean, no float64 and no state. A symmetric product needs half of it.",
        "",
        "| | " + " | ".join(f"d = {each['dim']}, {each['rows']} rows" for each in result["exact"]) + " |",
        "|---|" + "---:|" * len(result["exact"]),
    ]
    for name in result["exact"][0]["ms"]:
        lines.append(f"| {name} | " + " | ".join(f"{each['ms'][name]:.0f}" for each in result["exact"]) + " |")
    ratios = (
        ("XᵀX ÷ ours", "XᵀX", "ours"),
        ("ours ÷ half of XᵀX", "ours", "half of XᵀX"),
        ("batches of 256 ÷ one batch", "ours in batches of 256", "ours"),
        ("float32 ÷ bfloat16, both ours", "ours", "ours, bfloat16"),
        ("XᵀX ÷ ours, both bfloat16", "XᵀX, bfloat16", "ours, bfloat16"),
    )
    for words, above, below in ratios:
        cells = (f"{each['ms'][above] / each['ms'][below]:.2f}" for each in result["exact"])
        lines.append(f"| **{words}** | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Torch's bfloat16 product is rounded to bfloat16 and not centered; ours is float32 and centered.",
        "",
        "## Error against two passes in float64, float32 rows",
        "",
        "Relative to the largest entry; the worst of five draws. Torch's is `torch.cov` in float32.",
        "",
        "| rows | d | mean, in deviations | ours | torch |",
        "|---:|---:|---:|---:|---:|",
    ]
    for each in result["errors"]:
        lines.append(
            f"| {each['rows']} | {each['dim']} | {each['mean']:.0f} | {each['ours']:.1e} | {each['torch']:.1e} |"
        )
    lines += [
        "",
        f"## Top {LEADING} of d = {EIGEN_DIM} after each batch of {EIGEN_ROWS} rows, update included",
        "",
        "| rows | ours | torch.linalg.eigh, float32 | ratio | largest residual ÷ λ₁ |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in result["leading"]:
        lines.append(
            f"| {each['kind']} | {each['ours']:.0f} | {each['torch']:.0f} | {each['torch'] / each['ours']:.1f}× | "
            f"{each['residual']:.1e} |"
        )
    lines += [
        "",
        f"## Sketches of d = {SKETCH_DIM}, batches of {SKETCH_ROWS}",
        "",
        "*Captured* is the share of all rows' variance that the directions hold, and *best* that of the eigenvectors.",
        "",
        "| rows | rank | best | | ms per batch | IncrementalPCA ÷ it | captured |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for each in result["sketches"]:
        peer = each["ways"]["IncrementalPCA"]["ms"]
        for name, way in each["ways"].items():
            lines.append(
                f"| {each['kind']} | {each['rank']} | {each['best']:.4f} | {name} | {way['ms']:.0f} | "
                f"{peer / way['ms']:.1f}× | {way['captured']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for covariance.json and covariance.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run()
    (options.out / "covariance.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "covariance.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
