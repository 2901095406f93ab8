"""One token of generation: with kept keys and values, without, and through transformers' cache, beside the floor.

`python benches/bench_generation.py` checks that all give the same logits, times everything in one run, and writes
docs/generation.json and, made from it, docs/generation.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalpel
from measure import commit, medians, where_measured
from scalpel.cli import bench
from scalpel.models.circuitgpt.key_values import KeyValueCache

MODELS, CONTEXTS, ROUNDS = ("bracket-mini", "python-small"), (30, 300), 200
DOCS = Path(__file__).parents[1] / "docs"
_THEIRS = "transformers' cache"


def kept(model: scalpel.CircuitGPT, ids: Tensor) -> tuple[Callable[[], Tensor], int]:
    """A step after the keys and values of all tokens but the last, and the bytes of these."""
    cache = KeyValueCache(model.config, 1, ids.shape[1], model.device, model.dtype)
    model(ids[:, :-1], past=cache)

    def step() -> Tensor:
        cache.length = ids.shape[1] - 1
        return model(ids[:, -1:], past=cache)[0, -1]

    return step, cache.nbytes


def through_transformers(model: scalpel.CircuitGPT, ids: Tensor) -> Callable[[], Tensor]:
    """The same step by transformers' class and its growing cache, which is cut back after each."""
    from transformers import AutoModelForCausalLM, DynamicCache

    wrapped: Any = AutoModelForCausalLM.from_pretrained(model.folder)
    cache = DynamicCache()
    wrapped(ids[:, :-1], past_key_values=cache, use_cache=True)

    def step() -> Tensor:
        logits: Tensor = wrapped(ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
        cache.crop(-1)
        return logits

    return step


def floor(model: scalpel.CircuitGPT) -> Callable[[], None]:
    """The products of one token with every dense matrix, and nothing else."""
    embeddings = ("transformer.wte", "transformer.wpe")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith(embeddings)]
    rows = [torch.randn(1, matrix.shape[1]) for matrix in matrices]

    def run() -> None:
        for row, matrix in zip(rows, matrices, strict=True):
            torch.nn.functional.linear(row, matrix)

    return run


def time_model(name: str, context: int) -> dict[str, Any]:
    """Time one model at one length of context, after checking that all ways give the same logits."""
    model = scalpel.CircuitGPT.from_pretrained(name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=generator)
    step, nbytes = kept(model, ids)
    other = through_transformers(model, ids)
    whole = model(ids)[0, -1]
    worst = max(float((way() - whole).abs().max()) for way in (step, other, other))
    near = [tie for tie in model.near_ties(ids, 1e-6) if tie.hook != "logits"]
    if worst > 1e-5 and not near:
        raise bench.WrongAnswer(f"{name}: the logits differ by {worst:.1e} without a near tie; nothing was timed")
    ms = medians(
        {
            "floor": (floor(model), ROUNDS),
            "kept": (step, ROUNDS),
            _THEIRS: (other, ROUNDS),
            "whole": (lambda: model(ids), ROUNDS),
        }
    )
    return {"ms": ms, "bytes": nbytes, "largest difference": worst, "near ties": len(near)}


def table(result: dict[str, Any]) -> str:
    """docs/generation.md. Every figure in it is computed from the result."""
    lines = [
        "# One token of generation: figures",
        "",
        "Made by `python benches/bench_generation.py` from the numbers in `generation.json`. Do not edit.",
        "",
        "A text of so many tokens, and the logits of one more. Warm medians; the contenders take turns, after their",
        "logits were compared. The floor is the products of one token with every matrix of the model, as torch",
        "computes them dense, and nothing else.",
        where_measured(result["environment"], result["commit"]),
        "",
        "| model | context | whole pass, ms | keys and values kept, ms | whole ÷ kept | kept ÷ floor "
        "| transformers' cache, ms | bytes kept | largest difference of a logit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ms = row["ms"]
        lines.append(
            f"| {row['model']} | {row['context']} | {ms['whole']:.2f} | {ms['kept']:.2f} | "
            f"{ms['whole'] / ms['kept']:.1f}× | {ms['kept'] / ms['floor']:.1f} | {ms[_THEIRS]:.2f} | {row['bytes']} | "
            f"{row['largest difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for the JSON and the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        rows = [
            {"model": name, "context": context} | time_model(name, context) for name in MODELS for context in CONTEXTS
        ]
    result = {"rows": rows, "environment": bench.environment(), "commit": commit()}
    (options.out / "generation.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "generation.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
