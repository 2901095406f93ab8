"""A prompt's matrices of a Jacobian lens, on a real model: ours, the published estimator by autograd, and the floor.

`python benches/bench_lens.py` reads SmolLM2-135M from the cache of the tests (`pytest -m real` fetches it) or from
`--gguf`, checks the matrices, times everything in one run, measures peak memory in a process of its own, and writes
lens.json and, made from it, lens.md to the folder `--out`. `--dimensions 96` times the rows of 96 dimensions of the
target and scales the sweeps up to all of them; the table says so.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import commit, in_a_process, medians, peak_beyond, where_measured
from scalpel.cli import bench
from scalpel.jacobian_lens.sweeps.positions import valid_tokens
from scalpel.jacobian_lens.sweeps.sweep import lens_of_sweep
from scalpel.jacobians.choosing import pass_between
from scalpel.jacobians.sweep import Sweep, sweep_of

LENGTHS = (64, 128)
SKIP_FIRST, COPIES = 16, 16
FAST_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # else bfloat16 has the floor of float32
AGREE = 1e-3  # relative, of two float32 computations
DOCS = Path(__file__).parents[1] / "docs"
GGUF = Path.home() / ".cache" / "scalpel-tests" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "A lens is fitted on ordinary text, so this is some. The river was low that summer, and the ferry had stopped "
    "running in June. People who wanted to cross walked down to the old mill, where stones stood out of the water, and "
    "carried their shoes. In the evenings the children counted the barges that waited upstream for rain. Nobody could "
    "say when it would come. The newspaper printed the level of the water each morning beside the prices of grain, and "
    "the two moved together. By September the harbour master had repainted his boat twice and read every book in the "
    "library about the tides of other places, although there is no tide in that town."
)


def model_at(path: Path) -> Any:
    from scalpel.models.gguf import plain_model

    if not path.is_file():
        raise SystemExit(f"{path} is not there: run `pytest -m real` once, which fetches it, or name a GGUF by --gguf")
    return plain_model(path).requires_grad_(False)


def ids_at(path: Path, length: int) -> Tensor:
    from scalpel.models.gguf import tokenizer

    return torch.tensor([tokenizer(path).encode(TEXT)[:length]])


def hooks_of(model: Any) -> list[str]:
    """The outputs of all layers but the last."""
    return [f"{layer + 1}.resid_in" for layer in range(model.config.num_hidden_layers - 1)]


# ---- ours ----------------------------------------------------------------------------------------


def our_primal(model: Any, ids: Tensor, precision: str | None = None) -> Sweep:
    hooks = [*hooks_of(model), "final_resid"]
    beside = {"attention_mask": None, "position_ids": None}
    run = pass_between(model, ids, beside, hooks[0], hooks[-1], precision)
    return sweep_of(run, hooks, valid_tokens(ids.shape[1], SKIP_FIRST))


def our_sweep(model: Any, sweep: Sweep, tokens: int, dimensions: int) -> Tensor:
    """The rows of the first ``dimensions``, (layers, dimensions, width)."""
    found = lens_of_sweep(sweep, hooks_of(model), torch.ones(1, tokens), slice(0, dimensions))
    return torch.stack([matrix[:dimensions] for matrix in found.values()])


# ---- the published estimator ---------------------------------------------------------------------


@contextmanager
def kept_outputs(model: Any, kept: list[Tensor]) -> Iterator[None]:
    """Keep the outputs of all layers; the graph begins at the first."""

    def keep(module: Any, given: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not kept:
            tensor = tensor.detach().requires_grad_()
        kept.append(tensor)
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peer_primal(model: Any, ids: Tensor) -> list[Tensor]:
    """The outputs of all layers for copies of the prompt, with the graph between them."""
    kept: list[Tensor] = []
    with torch.enable_grad(), kept_outputs(model, kept):
        model.model(input_ids=ids.repeat(COPIES, 1), use_cache=False)
    return kept


def peer_sweep(outputs: list[Tensor], tokens: slice, dimensions: int) -> Tensor:
    """One backward pass for each sixteen dimensions: each copy has ones at one dimension of all valid positions."""
    *sources, target = outputs
    rows = torch.zeros(len(sources), dimensions, target.shape[-1])
    for start in range(0, dimensions, COPIES):
        count = min(COPIES, dimensions - start)
        cotangent = torch.zeros_like(target)
        for copy in range(count):
            cotangent[copy, tokens, start + copy] = 1
        gradients = torch.autograd.grad(target, sources, cotangent, retain_graph=True)
        for row, gradient in zip(rows, gradients, strict=True):
            row[start : start + count] = gradient[:count, tokens].float().mean(1)
    return rows


# ---- the floor -----------------------------------------------------------------------------------


def floor(model: Any, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products of ``rows`` cotangents with the matrices of the layers that a sweep passes, and nothing else."""
    products = []
    into: dict[int, Tensor] = {}
    given: dict[int, Tensor] = {}
    for block in model.model.layers[1:]:
        attention, mlp = block.self_attn, block.mlp
        for linear in (
            mlp.down_proj, mlp.gate_proj, mlp.up_proj, attention.o_proj, attention.q_proj, attention.k_proj,
            attention.v_proj,
        ):  # fmt: skip
            weight = linear.weight.to(dtype)
            out, wide = weight.shape
            given.setdefault(out, torch.randn(rows, out).to(dtype))
            into.setdefault(wide, torch.empty(rows, wide, dtype=dtype))
            products.append((given[out], weight, into[wide]))

    def run() -> None:
        for x, weight, out in products:
            torch.mm(x, weight, out=out)

    return run


# ---- the bench -----------------------------------------------------------------------------------


def relative(found: Tensor, right: Tensor) -> float:
    """The largest relative error of a layer, in the Frobenius norm."""
    errors = (found - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    return float(errors.max())


def overlap(model: Any, ids: Tensor, narrow: Tensor, right: Tensor) -> float:
    """How many of the eight likeliest tokens both lenses name at a position: the mean over layers and positions."""
    kept: list[Tensor] = []
    with kept_outputs(model, kept):
        model.model(input_ids=ids, use_cache=False)
    named = [
        model.lm_head(model.model.norm(torch.stack(kept[:-1])[:, 0].detach() @ lens.mT)).topk(8).indices
        for lens in (narrow, right)
    ]
    return float((named[0][..., :, None] == named[1][..., None, :]).sum((-1, -2)).float().mean())


def measured(path: Path, length: int, dimensions: int | None, rounds: int) -> dict[str, Any]:
    model, ids = model_at(path), ids_at(path, length)
    width = model.config.hidden_size
    share = min(width, dimensions or width)
    tokens = valid_tokens(length, SKIP_FIRST)
    count = tokens.stop - tokens.start
    sweep, narrow, graph = our_primal(model, ids), our_primal(model, ids, "bfloat16"), peer_primal(model, ids)
    right = peer_sweep(graph, tokens, share)
    ours = our_sweep(model, sweep, count, share)
    error = relative(ours, right)
    if not error <= AGREE:
        raise bench.WrongAnswer(f"the matrices are {error:.1e} (relative) off; nothing was timed")
    in_bfloat16 = our_sweep(model, narrow, count, share)
    result: dict[str, Any] = {
        "length": length,
        "valid": count,
        "width": width,
        "dimensions": share,
        "error": error,
        "bfloat16 error": relative(in_bfloat16, ours),
        "bfloat16 overlap": overlap(model, ids, in_bfloat16, ours) if share == width else None,
    }
    rows = share * count
    once = medians(
        {
            "ours": (lambda: our_primal(model, ids), rounds),
            "ours, bfloat16": (lambda: our_primal(model, ids, "bfloat16"), rounds),
            "peer": (lambda: peer_primal(model, ids), rounds),
        }
    )
    swept = medians(
        {
            "ours": (lambda: our_sweep(model, sweep, count, share), rounds),
            "ours, bfloat16": (lambda: our_sweep(model, narrow, count, share), rounds),
            "peer": (lambda: peer_sweep(graph, tokens, share), rounds),
            "floor": (floor(model, rows, torch.float32), rounds),
            **({"floor, bfloat16": (floor(model, rows, torch.bfloat16), rounds)} if FAST_BFLOAT16 else {}),
        }
    )
    result["primal ms"] = once
    result["sweep ms"] = swept
    result["ms"] = {name: once.get(name, 0.0) + ms * width / share for name, ms in swept.items()}
    return result


def memory(path: Path, length: int, dimensions: int | None) -> int:
    """Peak bytes of a prompt's matrices, primal included, beyond the model and the result."""
    model, ids = model_at(path), ids_at(path, length)
    share = min(model.config.hidden_size, dimensions or model.config.hidden_size)
    count = length - 1 - SKIP_FIRST
    result = (model.config.num_hidden_layers - 1) * model.config.hidden_size**2 * 4
    our_sweep(model, our_primal(model, ids[:, : SKIP_FIRST + 2]), 1, 1)  # what is loaded at the first use
    return peak_beyond(lambda: our_sweep(model, our_primal(model, ids), count, share)) - result


def run(options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--gguf", str(options.gguf)]
    arguments += [] if options.dimensions is None else ["--dimensions", str(options.dimensions)]
    results = []
    for length in options.lengths:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = measured(options.gguf, length, options.dimensions, options.rounds)
        result["memory"] = in_a_process(__file__, "--memory", str(length), *arguments)
        results.append(result)
    return {"model": options.gguf.name, "results": results, "environment": bench.environment(), "commit": commit()}


def table(result: dict[str, Any]) -> str:
    """docs/lens.md. Every figure in it is computed from the result."""
    lines = [
        "# The matrices of a Jacobian lens: figures",
        "",
        "Made by `python benches/bench_lens.py` from the numbers in `lens.json`. Do not edit.",
        "",
        f"One prompt on {result['model']}, all layers but the last, float32 unless it says bfloat16. Warm medians of",
        "one run, in which the contenders take turns, after the matrices were compared.",
        where_measured(result["environment"], result["commit"]),
        f"The peer is the published estimator in plain autograd, {COPIES} cotangents a backward pass, in float32. The",
        "floor is the products with the matrices of the layers that a sweep passes, on the rows of valid positions.",
    ]
    for each in result["results"]:
        ms = each["ms"]
        lines += ["", f"## {each['length']} tokens, of which {each['valid']} are valid", ""]
        if each["dimensions"] < each["width"]:
            lines += [
                f"**Extrapolated**: {each['dimensions']} of {each['width']} dimensions of the target were swept, and",
                "the sweeps' times scaled up; the primal's are added as they are.",
                "",
            ]
        lines += ["| | s | peer ÷ it | ÷ its floor |", "|---|---:|---:|---:|"]
        for name in ("ours", "ours, bfloat16", "peer"):
            its_floor = ms.get("floor, bfloat16" if name.endswith("bfloat16") else "floor", ms["floor"])
            lines.append(
                f"| {name} | {ms[name] / 1e3:.1f} | {ms['peer'] / ms[name]:.2f}× | {ms[name] / its_floor:.2f} |"
            )
        lines += [
            "",
            f"Relative error (Frobenius norm, the worst layer): {each['error']:.1e} against the peer; of bfloat16",
            f"against float32, {each['bfloat16 error']:.1e}. Peak memory beyond the model and the matrices:",
            f"{each['memory'] / 2**20:.0f} MiB.",
        ]
        if each["bfloat16 overlap"] is not None:
            lines.append(f"Of the eight likeliest tokens, bfloat16 names {each['bfloat16 overlap']:.2f} too.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for the JSON and the table")
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the model")
    parser.add_argument("--dimensions", type=int, help="how many of the target's dimensions are timed; all by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is timed")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        with torch.no_grad():
            print(json.dumps(memory(options.gguf, options.memory, options.dimensions)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options)
    (options.out / "lens.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "lens.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
