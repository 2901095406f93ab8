"""Jacobian products of dense decoders: GPT-2's width beside vmap(jvp) and the GEMM floor, and attention's memory.

`python benches/bench_dense_jacobian.py` checks the answers, times everything in one run, measures peak memory in
processes of their own, and writes docs/dense_jacobian.json and, made from it, docs/dense_jacobian.md.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalpel
from measure import commit, in_a_process, medians, peak_beyond, where_measured
from scalpel.cli import bench
from scalpel.jacobians.rows.attention import DenseAttention, Mask
from scalpel.lanes import Attention, Lanes

WIDTH, LAYERS, HEADS, LENGTH, TANGENTS = 768, 4, 12, 128, 16
LONG, LONG_TANGENTS = 4096, 8
DOCS = Path(__file__).parents[1] / "docs"


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    """An untrained GPT-2 of the given shape."""
    import transformers

    torch.manual_seed(0)
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": LENGTH, "vocab_size": 1000}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    return model.to(dtype)


def through_torch_func(model: Any, ids: Tensor, V: Tensor) -> Tensor:
    """vmap(jvp) from the first layer's input to the last layer's output, over the layers themselves."""
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=V.dtype).triu(1)[None, None]
    body = model.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))

    def final(delta: Tensor) -> Tensor:
        y = x + delta
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for block in body.h:
                y = block(y, attention_mask=mask)
                y = y[0] if isinstance(y, tuple) else y
        return y

    zero = torch.zeros_like(x)
    return torch.func.vmap(lambda t: torch.func.jvp(final, (zero,), (t,))[1])(V)


def gemm_floor(model: Any, dtype: torch.dtype) -> Callable[[], None]:
    """The dense products of T + 1 forward passes and nothing else."""
    rows, block = (TANGENTS + 1) * LENGTH, model.transformer.h[0]
    products = []
    for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        weight = layer.weight.to(dtype)
        x = torch.randn(rows, weight.shape[0]).to(dtype)
        products.append((x, weight, torch.empty(rows, weight.shape[1], dtype=dtype)))

    def run() -> None:
        for _ in range(LAYERS):
            for x, weight, out in products:
                torch.mm(x, weight, out=out)

    return run


def check(ids: Tensor) -> float:
    """Ours against torch.func in float64; gives the relative error of the bfloat16 mode."""
    model = model_of(torch.float64)
    J = scalpel.jacobian(model, ids)
    V = torch.randn(TANGENTS, *J.source_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    right = through_torch_func(model, ids, V[:2])
    pushed = J.jvp(V[:2])
    worst = float((pushed - right).abs().max() / right.abs().max())
    adjoint = float((J.vjp(pushed) * V[:2]).sum() / pushed.square().sum()) - 1
    if not (worst <= 1e-9 and abs(adjoint) <= 1e-9):
        raise bench.WrongAnswer(f"the products are {worst:.1e} and {adjoint:.1e} (relative) off; nothing was timed")
    exact = J.jvp(V)
    narrow = scalpel.jacobian(model_of(), ids, precision="bfloat16").jvp(V.float())
    return float((narrow.double() - exact).norm() / exact.norm())


def time_gpt2() -> dict[str, Any]:
    ids = torch.randint(1000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    error = check(ids)
    model = model_of()
    J, narrow = scalpel.jacobian(model, ids), scalpel.jacobian(model, ids, precision="bfloat16")
    V = torch.randn(TANGENTS, *J.source_shape, generator=torch.Generator().manual_seed(2))
    ms = medians(
        {
            "GEMM floor": (gemm_floor(model, torch.float32), 7),
            "bfloat16 GEMM floor": (gemm_floor(model, torch.bfloat16), 7),
            "jvp": (lambda: J.jvp(V), 7),
            "primal and jvp": (lambda: scalpel.jacobian(model, ids).jvp(V), 7),
            "vjp": (lambda: J.vjp(V), 7),
            "bfloat16 jvp": (lambda: narrow.jvp(V), 7),
            "vmap(jvp)": (lambda: through_torch_func(model, ids, V), 3),
        }
    )
    return {"ms": ms, "bfloat16 error": error}


def attention_memory(kind: str) -> dict[str, int]:
    """Peak bytes of one product over a long text beyond what is allocated before, and the bytes of the tangents."""
    torch.manual_seed(0)
    rows = (1, LONG, HEADS, WIDTH // HEADS)
    q, k, v = (torch.randn(rows) for _ in range(3))
    if kind == "dense":
        at = DenseAttention(q, k, v, Mask(None, None), (WIDTH // HEADS) ** -0.5)
        dq, dk, dv = (torch.randn(LONG_TANGENTS, *rows) for _ in range(3))
        out = torch.zeros(LONG_TANGENTS, *rows)
        return {"beyond": peak_beyond(lambda: at.jvp(dq, dk, dv, out, 0)), "tangents": 4 * out.nbytes}
    if kind == "dense vjp":
        at = DenseAttention(q, k, v, Mask(None, None), (WIDTH // HEADS) ** -0.5)
        u = torch.randn(LONG_TANGENTS, *rows)
        # Its result is the tangents of q, k and v.
        return {"beyond": peak_beyond(lambda: at.vjp(u)) - 3 * u.nbytes, "tangents": 4 * u.nbytes}
    flat = [each.flatten(-2) for each in (q, k, v)]
    allowed = torch.ones(1, LONG, LONG, dtype=torch.bool).tril()
    lanes_at = Attention(*flat, torch.zeros_like(flat[0]), allowed, None, HEADS, HEADS, (WIDTH // HEADS) ** -0.5)
    index = torch.rand(LONG, WIDTH).argsort(-1)[:, : WIDTH // 4].sort(-1).values.contiguous()
    kept = [Lanes(torch.randn(LONG, WIDTH // 4, 16), index, WIDTH) for _ in range(3)]
    there = LONG * WIDTH * 16 * 4  # lanes of y: the result
    beyond = peak_beyond(lambda: lanes_at.jvp(*kept)) - there
    return {"beyond": beyond, "tangents": there + sum(each.values.nbytes for each in kept)}


def run() -> dict[str, Any]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = time_gpt2()
    for kind in ("dense", "dense vjp", "lanes"):
        result[f"memory, {kind}"] = in_a_process(__file__, "--memory", kind)
    return result | {"environment": bench.environment(), "commit": commit()}


def table(result: dict[str, Any]) -> str:
    """docs/dense_jacobian.md. Every figure in it is computed from the result."""
    ms = result["ms"]
    lines = [
        "# Jacobian products of dense decoders: figures",
        "",
        "Made by `python benches/bench_dense_jacobian.py` from the numbers in `dense_jacobian.json`. Do not edit.",
        "",
        f"GPT-2's width ({WIDTH}, {HEADS} heads), {LAYERS} layers, {LENGTH} tokens, {TANGENTS} tangents from",
        "`0.resid_in` to `final_resid`, untrained. Warm medians; the contenders take turns, after the answers were",
        "checked in float64.",
        where_measured(result["environment"], result["commit"]),
        "The GEMM floor is the dense products of T + 1 forward passes, written to memory that is already allocated.",
        "",
        "| | ms | ÷ its GEMM floor | vmap(jvp) ÷ it |",
        "|---|---:|---:|---:|",
    ]
    for name in ("jvp", "primal and jvp", "vjp", "bfloat16 jvp", "vmap(jvp)"):
        floor = ms["bfloat16 GEMM floor" if name.startswith("bfloat16") else "GEMM floor"]
        lines.append(f"| {name} | {ms[name]:.0f} | {ms[name] / floor:.2f} | {ms['vmap(jvp)'] / ms[name]:.2f}× |")
    limit = 8 * LONG_TANGENTS * LONG * WIDTH
    lines += [
        "",
        f"Relative error of the bfloat16 mode (Frobenius norm, against float64): {result['bfloat16 error']:.1e}.",
        "",
        f"## Attention over {LONG} tokens, {LONG_TANGENTS} tangents, the same width",
        "",
        "Peak resident memory in a process of its own, beyond the primal and the tangents of q, k, v and y.",
        f"A (heads, L, L) array for each tangent takes {HEADS * LONG * LONG * 4 * LONG_TANGENTS >> 20} MiB in all.",
        "",
        "| | MiB beyond | ÷ 8·T·L·width bytes | the tangents themselves, MiB |",
        "|---|---:|---:|---:|",
    ]
    names = {
        "dense": "rows of tangents, jvp",
        "dense vjp": "rows of tangents, vjp",
        "lanes": "lanes (16, of which 8 are used), a quarter of q, k and v kept, jvp",
    }
    for kind, name in names.items():
        memory = result[f"memory, {kind}"]
        beyond = memory["beyond"]
        lines.append(f"| {name} | {beyond / 2**20:.0f} | {beyond / limit:.2f} | {memory['tangents'] / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for the JSON and the table")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        with torch.no_grad():
            print(json.dumps(attention_memory(options.memory)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = run()
    (options.out / "dense_jacobian.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "dense_jacobian.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
