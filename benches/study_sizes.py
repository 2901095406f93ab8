"""Which size of model dilutes? Trains several by the same recipe and measures each; hours, not minutes.

    python benches/study_sizes.py RUNS_FOLDER docs/bracket-sizes.md

A run that was stopped goes on where it was. The table is what chose bracket-mini's size: the smallest of those that
answer at least 95 % of the held-out real prompts. The choice looked at dilution too, so that bracket-mini dilutes is no
evidence that models of this kind do; the table is.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scalpel.experiments import critical as c
from scalpel.training.bracket_mini import accuracy_card, bracket_tokenizer
from scalpel.training.corpus import interpreter_sources
from scalpel.training.loop import train
from scalpel.training.recipe import Recipe

SIZES: dict[str, dict[str, Any]] = {
    "1-layer": {},
    "2-layers": {"n_layer": 2, "steps": 3000},
    "2-layers-sparser": {"n_layer": 2, "density": 0.15},
}
AMOUNTS = (2, 3, 4, 5, 6)


def measure(name: str, recipe: Recipe, folder: Path) -> dict[str, str]:
    """A row of the table: what was trained, how well it answers, and where it fails."""
    sources = interpreter_sources()
    tokenizer = bracket_tokenizer(sources, recipe.vocab_size)
    trained = train(recipe, sources, tokenizer, folder / f"{name}.pt")
    model = trained.model.eval()
    model.tokenizer = tokenizer
    accuracy = accuracy_card(model)
    length = recipe.block_size - 64
    rng = np.random.default_rng(0)
    lengths = {k: c.critical(c.ask_long_lists(model, k, prompts=64, length=length, seed=0), rng) for k in AMOUNTS}
    flat = c.ask_long_lists(model, 1, depth=1, prompts=64, length=length, seed=0)
    return {
        "size": f"{recipe.n_layer} layers, d_model {recipe.d_model}",
        "density": f"{recipe.density:.2f}",
        "steps": str(recipe.steps),
        "loss, nats": f"{trained.loss:.3f}",
        "real prompts": f"{accuracy['all']:.3f}",
        "depth 1, any length": f"{flat.right.mean():.3f}",
        **{f"n₅₀, k = {k}": one.text() for k, one in lengths.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("table", type=Path)
    given = parser.parse_args()
    rows = [measure(name, replace(Recipe(), **options), given.runs) for name, options in SIZES.items()]
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    given.table.write_text(
        "# Sizes tried for bracket-mini\n\nMade by `benches/study_sizes.py`, one seed each; n₅₀ in tokens with its 95 % "
        "bootstrap interval by prompt; “>” means right at every length asked.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
