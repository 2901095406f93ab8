"""A Llama-shaped model of 16 GB in bfloat16 shards, one layer at a time: time beside reading and GEMM, peak memory.

`python benches/bench_stream.py --folder FOLDER` writes the model there if it is not there yet (16 GB of random
weights), checks a small one against the model in memory, times, and writes docs/stream.json and docs/stream.md.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalpel
from measure import commit, in_a_process, medians, peak_beyond, where_measured
from scalpel.cli import bench
from scalpel.jacobians.stream import stream_layers

WIDTH, MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 4096, 14336, 32, 8, 32, 128256
LENGTH, TANGENTS = 64, 4
DOCS = Path(__file__).parents[1] / "docs"


def config_of(layers: int, **changes: int) -> Any:
    import transformers

    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
    }
    return transformers.LlamaConfig(**(shape | changes), dtype="bfloat16", architectures=["LlamaForCausalLM"])


def write_model(folder: Path) -> None:
    """One shard for each layer. All layers have the same random numbers, which makes no difference to the timing."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def matrix(out: int, inside: int) -> Tensor:
        return (torch.randn(out, inside, generator=generator) * inside**-0.5).bfloat16()

    kv = WIDTH // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj": matrix(WIDTH, WIDTH),
        "self_attn.k_proj": matrix(kv, WIDTH),
        "self_attn.v_proj": matrix(kv, WIDTH),
        "self_attn.o_proj": matrix(WIDTH, WIDTH),
        "mlp.gate_proj": matrix(MLP, WIDTH),
        "mlp.up_proj": matrix(MLP, WIDTH),
        "mlp.down_proj": matrix(WIDTH, MLP),
        "input_layernorm": torch.ones(WIDTH).bfloat16(),
        "post_attention_layernorm": torch.ones(WIDTH).bfloat16(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for i in range(LAYERS):
        tensors = {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
        save_file(tensors, folder / f"layer-{i:02}.safetensors")
        places |= dict.fromkeys(tensors, f"layer-{i:02}.safetensors")
    ends = {name: matrix(VOCAB, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = torch.ones(WIDTH).bfloat16()
    save_file(ends, folder / "ends.safetensors")
    places |= dict.fromkeys(ends, "ends.safetensors")
    config_of(LAYERS).save_pretrained(folder)
    # Written last: a folder with an index is whole.
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def check() -> None:
    """Compares a small model of the same family, streamed from its folder, with the same model in memory."""
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(config_of(3, **small, vocab_size=50)).double().requires_grad_(False)
    ids = torch.arange(12)[None]
    J = scalpel.jacobian(model, ids)
    V = torch.randn(TANGENTS, *J.source_shape, dtype=torch.float64)
    expected = J.jvp(V)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for layer in stream_layers(folder, ids):
            V = layer.jvp(V)
    worst = float((V - expected).abs().max() / expected.abs().max())
    if not worst <= 1e-9:
        raise bench.WrongAnswer(f"the streamed product is {worst:.1e} (relative) off; nothing was timed")


def stream(folder: Path) -> Tensor:
    ids = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    V = torch.randn(TANGENTS, 1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    for layer in stream_layers(folder, ids):
        V = layer.jvp(V)
    return V


def read_all(folder: Path) -> int:
    """Reads the layers' files once, into the same memory, bypassing the system's cache: the fastest way we know."""
    memory, total = memoryview(mmap.mmap(-1, 1 << 26)), 0
    for path in sorted(folder.glob("layer-*.safetensors")):
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        at = 0
        while count := os.preadv(file, [memory], at):
            at += count
            if count < len(memory):
                break
        os.close(file)
        total += at
    return total


def forget(folder: Path) -> None:
    """Drops the files from the system's cache, as before a first run."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of_gemm() -> float:
    """Seconds of the matrix products of T + 1 forward passes in bfloat16: those of one layer, times the layers."""
    rows, kv = (TANGENTS + 1) * LENGTH, WIDTH // HEADS * KV_HEADS
    products = []
    for inside, out in ((WIDTH, WIDTH + 2 * kv), (WIDTH, WIDTH), (WIDTH, 2 * MLP), (MLP, WIDTH)):
        x, weight = torch.randn(rows, inside).bfloat16(), torch.randn(out, inside).bfloat16()
        products.append((x, weight.T, torch.empty(rows, out, dtype=torch.bfloat16)))

    def run() -> None:
        for x, weight, out in products:
            torch.mm(x, weight, out=out)

    return LAYERS * medians({"layer": (run, 5)})["layer"] / 1e3


def run(folder: Path, rounds: int = 2) -> dict[str, Any]:
    check()
    if not (folder / "model.safetensors.index.json").is_file():
        write_model(folder)
    times: dict[str, list[float]] = {"reading": [], "GEMM": [], "streamed": []}
    size = 0
    for _ in range(rounds):
        forget(folder)
        begun = time.perf_counter()
        size = read_all(folder)
        times["reading"].append(time.perf_counter() - begun)
        times["GEMM"].append(seconds_of_gemm())
        forget(folder)
        begun = time.perf_counter()
        if not bool(stream(folder).isfinite().all()):
            raise bench.WrongAnswer("the tangents are not finite")
        times["streamed"].append(time.perf_counter() - begun)
        print({name: round(seconds[-1], 2) for name, seconds in times.items()}, flush=True)
    memory = in_a_process(__file__, "--folder", str(folder), "--memory")
    return {
        "seconds": times,
        "bytes": size,
        "resident": memory["resident"],
        "environment": bench.environment(),
        "commit": commit(),
    }


def peak_resident() -> int:
    """Peak bytes of this process since it began; getrusage would also count what its parent process held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def table(result: dict[str, Any]) -> str:
    """docs/stream.md. Every figure in it is computed from the result."""
    best = {name: min(runs) for name, runs in result["seconds"].items()}
    larger = max(best["reading"], best["GEMM"])
    return "\n".join(
        [
            "# A model larger than memory: figures",
            "",
            "Made by `python benches/bench_stream.py` from the numbers in `stream.json`. Do not edit.",
            "",
            f"Llama's shape: {LAYERS} layers of width {WIDTH}, {HEADS} heads that share {KV_HEADS} heads of keys and "
            f"values, MLP {MLP};",
            f"layers of {result['bytes'] / 1e9:.1f} GB in bfloat16 shards, random weights; {LENGTH} tokens, {TANGENTS} "
            "tangents through all layers. The",
            f"files are dropped from the system's cache before each run; the best of "
            f"{len(result['seconds']['streamed'])} runs counts.",
            where_measured(result["environment"], result["commit"]),
            "",
            "| | |",
            "|---|---:|",
            f"| primal and tangents, streamed | {best['streamed']:.1f} s |",
            f"| reading the layers' files alone, bypassing the cache | {best['reading']:.1f} s |",
            f"| bfloat16 products of T + 1 forward passes alone | {best['GEMM']:.1f} s |",
            f"| streamed ÷ the larger of these | {best['streamed'] / larger:.2f} |",
            f"| peak resident memory of the whole process | {result['resident'] / 2**30:.2f} GiB |",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is to be written")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for stream.json and stream.md")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        peak_beyond(lambda: stream(options.folder))
        print(json.dumps({"resident": peak_resident()}))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.folder)
    (options.out / "stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "stream.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
