"""A Jacobian lens of a 16 GB model in bfloat16 shards, one layer in memory at a time: time, and peak memory.

`python benches/bench_lens_stream.py --folder FOLDER` takes the model of `bench_stream.py`, which is written there if it
is not there yet, checks a small one against the model in memory, computes the rows of 64 dimensions of the target for
one prompt in a process of its own, and writes docs/lens_stream.json and docs/lens_stream.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench_stream as model
from measure import commit, in_a_process, where_measured
from scalpel.cli import bench
from scalpel.jacobian_lens.sweeps.folder_sweep import lens_matrices_of_folder, lens_rows_of_folder
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

LENGTH, SKIP_FIRST, ROWS = 64, 16, 64
DOCS = Path(__file__).parents[1] / "docs"


def check() -> None:
    """Compares the matrices of a small model of the same family, streamed, with those of the model in memory."""
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    memory = transformers.LlamaForCausalLM(model.config_of(3, **small, vocab_size=50)).float().requires_grad_(False)
    ids = torch.arange(24)[None]
    right = lens_matrices(memory, ids, layers=[0, 1])
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        (found,) = lens_matrices_of_folder(folder, [ids], layers=[0, 1])
    for layer, matrix in right.items():
        if not torch.allclose(found[layer], matrix, rtol=1e-5, atol=1e-6):
            raise bench.WrongAnswer(f"the streamed matrix of layer {layer} differs; nothing was timed")


def compute(folder: Path) -> dict[str, Any]:
    """Rows 0 to 63 of all layers' matrices, of which only the norms are kept."""
    ids = torch.randint(model.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    norms: dict[int, float] = {}

    def see(prompt: int, layer: int, first: int, rows: Tensor) -> None:
        norms[layer] = norms.get(layer, 0.0) + float(rows.square().sum())

    begun = time.perf_counter()
    layers = range(model.LAYERS - 1)
    done = list(lens_rows_of_folder(folder, [ids], see, layers=layers, dimensions=slice(0, ROWS)))
    seconds = time.perf_counter() - begun
    if done != [[0]] or not all(0 < norm < float("inf") for norm in norms.values()):
        raise bench.WrongAnswer("the rows are not finite, or incomplete")
    return {"seconds": seconds, "layers": len(norms), "resident": model.peak_resident()}


def run(folder: Path) -> dict[str, Any]:
    check()
    if not (folder / "model.safetensors.index.json").is_file():
        model.write_model(folder)
    model.forget(folder)
    found = in_a_process(__file__, "--folder", str(folder), "--compute")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {**found, "bytes": size, "environment": bench.environment(), "commit": commit()}


def table(result: dict[str, Any]) -> str:
    """docs/lens_stream.md. Every figure in it is computed from the result."""
    passes = model.WIDTH / ROWS
    return "\n".join(
        [
            "# A Jacobian lens of a model larger than memory: figures",
            "",
            "Made by `python benches/bench_lens_stream.py` from the numbers in `lens_stream.json`. Do not edit.",
            "",
            f"Llama's shape: {model.LAYERS} layers of width {model.WIDTH}; {result['bytes'] / 1e9:.1f} GB of bfloat16 "
            f"shards with random weights. One prompt of {LENGTH} tokens, rows of {ROWS} of the target's {model.WIDTH}",
            f"dimensions at {result['layers']} layers, one run, the files not in the system's cache before it.",
            where_measured(result["environment"], result["commit"]),
            "",
            "| | |",
            "|---|---:|",
            f"| the primal and {ROWS} rows of every layer's matrix | {result['seconds']:.0f} s |",
            f"| all rows, extrapolated: {passes:.0f} times that | {passes * result['seconds'] / 3600:.1f} h |",
            f"| peak resident memory of the whole process | {result['resident'] / 2**30:.2f} GiB |",
            "",
            "The extrapolation is an upper bound, since the primal and the readings of layers are shared by more rows.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is to be written")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for the JSON and the table")
    parser.add_argument("--compute", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        print(json.dumps(compute(options.folder)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.folder)
    (options.out / "lens_stream.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "lens_stream.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
