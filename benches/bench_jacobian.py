"""Jacobian products of a CircuitGPT with csp_yolo2's layer shape, beside torch.func, torch's CSR and the GEMM floor.

`python benches/bench_jacobian.py` checks the answers in float64, times everything in one run, and writes
docs/jacobian.json and, made from it, docs/jacobian.md. Under pytest-benchmark it times the Jacobian case of
`scalpel bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import scalpel
from measure import commit, in_a_process, medians, peak_beyond, where_measured
from scalpel import CircuitGPT
from scalpel.cli import bench
from scalpel.models.circuitgpt.attention import allowed_keys, attention_weights
from scalpel.models.circuitgpt.config import CircuitGPTConfig

LAYERS, WIDTH, HEADS, LENGTH, TANGENTS = 2, 2048, 128, 256, 16
DENSITIES = (0.001, 0.005, 0.015, 0.05, 0.15, 0.5, 1.0)
LOCATIONS = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
DOCS = Path(__file__).parents[1] / "docs"


def test_jvp(timed: Callable[[bench.Case], None], device: str) -> None:
    timed(bench.jacobian_jvp(device=device))


def model_of(density: float, dtype: torch.dtype, seed: int = 0, layers: int = LAYERS) -> CircuitGPT:
    """An untrained model whose block matrices have that share of non-zeros, scaled so that values keep their size."""
    config = CircuitGPTConfig(
        block_size=LENGTH,
        vocab_size=64,
        n_layer=layers,
        n_head=HEADS,
        d_model=WIDTH,
        rms_norm=True,
        sink=True,
        afrac=0.25,
        afrac_loctypes=LOCATIONS,
    )
    model = CircuitGPT(config, seed=seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = linear.weight
            kept = torch.rand(weight.shape, generator=generator) < density
            weight.copy_(torch.randn(weight.shape, generator=generator) * kept / (density * weight.shape[1]) ** 0.5)
    return model.to(dtype)


def through_torch_func(model: CircuitGPT, ids: Tensor, tangents: Tensor) -> Tensor:
    """vmap(jvp) from 0.resid_in to final_resid."""

    def final(delta: Tensor) -> Tensor:
        recorded: list[Tensor] = []

        def add(value: Tensor, name: str) -> Tensor:
            return value + delta

        model.run_with_hooks(ids, fwd_hooks=[("0.resid_in", add), ("final_resid", lambda v, name: recorded.append(v))])
        return recorded[0]

    zero = torch.zeros_like(tangents[0])
    return torch.func.vmap(lambda t: torch.func.jvp(final, (zero,), (t,))[1])(tangents)


class TorchCSR:
    """The jvp written by hand over torch's CSR matrices: tangents are more rows, each linear one sparse product.

    The primal's masks and attention weights are computed once and kept, as scalpel keeps them.
    """

    def __init__(self, model: CircuitGPT, ids: Tensor) -> None:
        self.model = model
        self.allowed = allowed_keys(ids, None)
        self.layers: list[dict[str, Any]] = []
        config = model.config
        x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
        for block in model.transformer.h:
            layer: dict[str, Any] = {"n1": self._norm(block.ln_1, x)}
            a, layer["a"] = self._keep(block.ln_1(x))
            q, k, v = F.linear(a, block.attn.c_attn.weight, block.attn.c_attn.bias).split(config.d_attn, -1)
            (q, layer["q"]), (k, layer["k"]), (v, layer["v"]) = self._keep(q), self._keep(k), self._keep(v)
            weights = attention_weights(q, k, config.n_head, self.allowed, block.attn.attn_imp.sink_logit)
            layer |= {"qh": self._heads(q), "kh": self._heads(k), "vh": self._heads(v), "p": weights}
            y = (weights @ self._heads(v)).transpose(-3, -2).flatten(-2)
            d, layer["d"] = self._keep(block.attn.c_proj(y))
            x = x + d
            layer["n2"] = self._norm(block.ln_2, x)
            a, layer["m"] = self._keep(block.ln_2(x))
            before = block.mlp.c_fc(a)
            after, mask = self._keep(F.gelu(before))
            normal = 0.5 * (1 + torch.erf(before * 0.5**0.5))
            layer["slope"] = (normal + before * torch.exp(-0.5 * before**2) * (2 * torch.pi) ** -0.5) * mask
            d, layer["o"] = self._keep(block.mlp.c_proj(after))
            x = x + d
            for name, linear in (
                ("w_qkv", block.attn.c_attn),
                ("w_y", block.attn.c_proj),
                ("w_fc", block.mlp.c_fc),
                ("w_o", block.mlp.c_proj),
            ):
                layer[name] = linear.weight.to_sparse_csr()
            self.layers.append(layer)

    def _keep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = scalpel.topk_mask(x, x.shape[-1] // 4)
        return x * mask, mask

    def _norm(self, norm: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rate = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        return x * rate, rate, norm.weight

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.model.config.n_head, -1)).transpose(-3, -2)

    def _normed(self, t: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        normed, rate, gain = at
        return gain * rate * (t - normed * (normed * t).mean(-1, keepdim=True))

    def _linear(self, weight: Tensor, t: Tensor) -> Tensor:
        return torch.sparse.mm(weight, t.flatten(0, -2).T).T.unflatten(0, t.shape[:-1])

    def jvp(self, t: Tensor) -> Tensor:
        """(T, 1, L, width) at 0.resid_in → the same at final_resid."""
        scale = (self.model.config.d_attn // self.model.config.n_head) ** -0.5
        for at in self.layers:
            a = self._normed(t, at["n1"]) * at["a"]
            q, k, v = self._linear(at["w_qkv"], a).split(self.model.config.d_attn, -1)
            q, k, v = self._heads(q * at["q"]), self._heads(k * at["k"]), self._heads(v * at["v"])
            scores = (q @ at["kh"].transpose(-1, -2) + at["qh"] @ k.transpose(-1, -2)) * scale
            moved = at["p"] * scores
            moved = moved - at["p"] * moved.sum(-1, keepdim=True)
            y = (moved @ at["vh"] + at["p"] @ v).transpose(-3, -2).flatten(-2)
            t = t + self._linear(at["w_y"], y) * at["d"]
            a = self._normed(t, at["n2"]) * at["m"]
            t = t + self._linear(at["w_o"], self._linear(at["w_fc"], a) * at["slope"]) * at["o"]
        return t


def gemm_floor(model: CircuitGPT) -> Callable[[], None]:
    """The dense products of T + 1 forward passes and nothing else."""
    rows = (TANGENTS + 1) * LENGTH
    pairs = [
        (torch.randn(rows, linear.in_features, dtype=linear.weight.dtype), linear.weight.T)
        for linear in (
            model.transformer.h[0].attn.c_attn,
            model.transformer.h[0].attn.c_proj,
            model.transformer.h[0].mlp.c_fc,
            model.transformer.h[0].mlp.c_proj,
        )
    ]

    def run() -> None:
        for _ in range(LAYERS):
            for x, weight in pairs:
                x @ weight

    return run


def check(model: CircuitGPT, ids: Tensor) -> None:
    """In float64, where no TopK is near a tie: both products, ours and the CSR peer's, against torch.func."""
    model = model.double()
    J = scalpel.jacobian(model, ids)
    V = torch.randn(2, *J.source_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = through_torch_func(model, ids, V)
    pulled = float((J.vjp(expected) * V).sum())  # <Jᵀ J V, V> = <J V, J V>
    for name, product, right in (
        ("ours", J.jvp(V), expected),
        ("torch CSR's", TorchCSR(model, ids).jvp(V), expected),
        ("our vjp's", torch.tensor(pulled, dtype=torch.float64), expected.square().sum()),
    ):
        worst = float((product - right).abs().max() / right.abs().max())
        if not worst <= 1e-9:
            raise bench.WrongAnswer(f"{name} product is {worst:.1e} (relative) off; nothing was timed")


FULL = 0.015  # csp_yolo2's density, at which all peers are timed


def contenders_at(density: float, seed: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many rounds."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (1, LENGTH), generator=generator)
    model = model_of(density, torch.float32, seed)
    J = scalpel.jacobian(model, ids)
    V = torch.randn(TANGENTS, *J.source_shape, generator=generator)
    U = torch.randn(TANGENTS, *J.target_shape, generator=generator)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "jvp": (lambda: J.jvp(V), 7),
        "vjp": (lambda: J.vjp(U), 7),
        "primal": (lambda: scalpel.jacobian(model, ids), 5),
        "GEMM floor": (gemm_floor(model), 3),
        "forward": (lambda: model(ids), 9),
        "dense forward": (lambda: dense_forward(model, ids), 5),
        "vmap(jvp)": (lambda: through_torch_func(model, ids, V), 2 if density == FULL else 1),
    }
    if density == FULL:
        csr = TorchCSR(model, ids)
        contenders["torch CSR"] = (lambda: csr.jvp(V), 3)
    return contenders


def run(densities: tuple[float, ...] = DENSITIES, seed: int = 0) -> dict[str, Any]:
    ids = torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    rows = []
    with torch.no_grad():
        for density in densities:
            check(model_of(density, torch.float64, seed), ids[:, :48])
            rows.append({"density": density, "ms": medians(contenders_at(density, seed))})
            print(density, {name: round(t, 1) for name, t in rows[-1]["ms"].items()}, flush=True)
    memory = {who: in_a_process(__file__, "--memory", who) for who in ("jvp", "vjp", "torch CSR", "vmap(jvp)")}
    return {
        "tangents": TANGENTS,
        "length": LENGTH,
        "rows": rows,
        "memory": memory,
        "environment": bench.environment(),
        "commit": commit(),
    }


def dense_forward(model: CircuitGPT, ids: Tensor) -> Tensor:
    """The public formulation: dense linears, abs + topk + scatter, explicit attention."""
    config = model.config

    def keep(x: Tensor) -> Tensor:
        indices = x.abs().topk(x.shape[-1] // 4, sorted=False).indices
        return torch.zeros_like(x).scatter_(-1, indices, x.gather(-1, indices))

    allowed = allowed_keys(ids, None)
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    for block in model.transformer.h:
        q, k, v = block.attn.c_attn(keep(block.ln_1(x))).split(config.d_attn, -1)
        heads = [part.unflatten(-1, (config.n_head, -1)).transpose(-3, -2) for part in (keep(q), keep(k), keep(v))]
        sink = block.attn.attn_imp.sink_logit.view(-1, 1, 1).expand(1, -1, ids.shape[1], 1)
        scores = heads[0] @ heads[1].transpose(-1, -2) / (config.d_attn // config.n_head) ** 0.5
        scores = torch.cat([sink, scores.masked_fill(~allowed, float("-inf"))], dim=-1)
        y = (scores.softmax(-1)[..., 1:] @ heads[2]).transpose(-3, -2).flatten(-2)
        x = x + keep(block.attn.c_proj(y))
        x = x + keep(block.mlp.c_proj(keep(F.gelu(block.mlp.c_fc(keep(block.ln_2(x)))))))
    return model.lm_head(model.transformer.ln_f(x)) + model.final_logits_bias


def table(result: dict[str, Any]) -> str:
    """docs/jacobian.md. Every figure in it is computed from the result."""
    environment = result["environment"]
    lines = [
        "# Jacobian products: figures",
        "",
        "Made by `python benches/bench_jacobian.py` from the numbers in `jacobian.json`. Do not edit.",
        "",
        f"{LAYERS} layers of csp_yolo2's shape (width {WIDTH}, {HEADS} heads, a quarter of the activations kept), "
        f"{LENGTH} tokens,",
        f"{TANGENTS} tangents from `0.resid_in` to `final_resid`, float32, random weights. Warm medians in",
        "milliseconds; the contenders take turns, after the answers were checked in float64 (over 48 tokens).",
        where_measured(environment, result["commit"]),
        "",
        "- *vmap(jvp)*: torch.func over the same model",
        "- *torch CSR*: the same products, written by hand with torch's CSR matrices",
        "- *GEMM floor*: the dense products of T + 1 forward passes",
        "- *dense forward*: dense linears, abs, topk, gather and scatter, explicit attention with the sink",
        "",
        "| density | jvp | vjp | primal | vmap(jvp) ÷ jvp | torch CSR ÷ jvp | jvp ÷ GEMM floor | forward "
        "| dense forward ÷ it |",
        "|---:" * 9 + "|",
    ]
    for row in result["rows"]:
        ms = row["ms"]
        peers = [f"{ms[p] / ms['jvp']:.1f}×" if p in ms else "" for p in ("vmap(jvp)", "torch CSR")]
        lines.append(
            f"| {row['density']:.1%} | {ms['jvp']:.0f} | {ms['vjp']:.0f} | {ms['primal']:.0f} | {' | '.join(peers)} "
            f"| {ms['jvp'] / ms['GEMM floor']:.3f} | {ms['forward']:.0f} | {ms['dense forward'] / ms['forward']:.1f}× |"
        )
    lines += [
        "",
        f"Peak resident memory in MiB of one product at {FULL:.1%}, its result included, each in a process of its own: "
        + ", ".join(f"{who} {bytes_of['beyond'] / 2**20:.0f}" for who, bytes_of in result["memory"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for jacobian.json and jacobian.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        with torch.no_grad():
            print(json.dumps({"beyond": peak_beyond(contenders_at(FULL, options.seed)[options.memory][0])}))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(tuple(options.densities), options.seed)
    (options.out / "jacobian.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "jacobian.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
