"""Semigroups, orbits, extraction, ablation effects and pruning, each beside its peer, after the answers were checked.

`python benches/bench_algebra.py` takes about eight minutes and writes docs/algebra.json and docs/algebra.md;
`--without-pruning` leaves out pruning, which takes four of these minutes.
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
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

import scalpel
from measure import commit, medians, where_measured
from scalpel import circuits, semigroup
from scalpel.cli import bench

DOCS = Path(__file__).parents[1] / "docs"
ROUNDS = 5


def full_transformations(n: int) -> dict[str, list[int]]:
    return {"swap": [1, 0, *range(2, n)], "turn": [*range(1, n), 0], "collapse": [0, 0, *range(2, n)]}


def semigroups() -> dict[str, Any]:
    """Times the enumeration of T_7 (823,543 elements) by Scalpel and by libsemigroups alone, from maps to a size."""
    from libsemigroups_pybind11 import FroidurePin, ReportGuard, Transf

    generators = full_transformations(7)
    quiet = ReportGuard(False)

    def ours() -> int:
        return semigroup.TransformationSemigroup(generators).size

    def alone() -> int:
        return int(FroidurePin([Transf(images) for images in generators.values()]).size())

    assert ours() == alone() == 7**7
    times = medians({"ours": (ours, ROUNDS), "libsemigroups": (alone, ROUNDS)})
    del quiet
    s = semigroup.TransformationSemigroup(generators)
    _ = s.size
    tables = {}
    for name, make in (
        ("images of all elements", lambda: s.images),
        ("both Cayley graphs", lambda: (s.right_cayley_graph, s.left_cayley_graph)),
        ("Green's classes", lambda: s.greens().counts()),
        ("egg-boxes", lambda: s.greens().egg_boxes),
    ):
        tables[name] = seconds(make)
    assert s.greens().counts()["D"] == 7 and len(s.idempotents()) == 6322
    return {"elements": 7**7, "ms": times, "ratio": times["ours"] / times["libsemigroups"], "tables_seconds": tables}


def orbits() -> list[dict[str, Any]]:
    """Times breadth-first search on 12 million states: ours, scipy's breadth_first_order, and a copy of the maps."""
    rows, columns = 3000, 4000
    states = rows * columns
    row, column = np.divmod(np.arange(states), columns)
    maps = {
        "torus, two generators": [((row + 1) % rows) * columns + column, row * columns + (column + 1) % columns],
        "evidence and length": [
            np.minimum(row + 1, rows - 1) * columns + np.minimum(column + 1, columns - 1),
            row * columns + np.minimum(column + 1, columns - 1),
        ],
        "two random maps": list(np.random.default_rng(0).integers(states, size=(2, states))),
    }
    measured = []
    for name, images in maps.items():
        table = np.stack(images).astype(np.int32)
        graph = csr_array(
            (np.ones(2 * states, dtype=np.int8), table.T.ravel(), np.arange(0, 2 * states + 1, 2, dtype=np.int32)),
            shape=(states, states),
        )
        seen = np.zeros(states, dtype=bool)
        seen[breadth_first_order(graph, 0, return_predecessors=False)] = True
        assert np.array_equal(semigroup.reachable(table, 0), seen)
        target = np.empty_like(table)
        times = medians(
            {
                "ours": (lambda t=table: semigroup.distances(t, 0), ROUNDS),
                "scipy": (lambda g=graph: breadth_first_order(g, 0, return_predecessors=False), 3),
                "copy": (lambda t=table, o=target: np.copyto(o, t), ROUNDS),
            }
        )
        reached = int(seen.sum())
        shape_ms = medians({"shapes": (lambda t=table: semigroup.orbit_shapes(t[0]), 3)})["shapes"]
        measured.append(
            {
                "states": name,
                "reached": reached,
                "ms": times,
                "million_states_a_second": reached / times["ours"] / 1e3,
                "orbit_shapes_million_a_second": states / shape_ms / 1e3,
            }
        )
    return measured


def extraction() -> list[dict[str, Any]]:
    """Times whole extractions, nulls and the untrained model included."""
    measured = []
    for name in ("mod3-mini", "flip-flop-mini", "parity-mini"):
        model = scalpel.CircuitGPT.from_pretrained(name)
        card = model.card["machine"]
        begun = time.perf_counter()
        extracted = semigroup.extract(model, card["letters"], card["outputs"])
        assert extracted.verdict == "finite", extracted.reasons
        measured.append(
            {
                "model": name,
                "seconds": time.perf_counter() - begun,
                "size": extracted.semigroup().size,
                "words_asked": extracted.asked,
                "conflict_at_most": None if extracted.conflict is None else extracted.conflict.worst,
            }
        )
    return measured


def effects() -> list[dict[str, Any]]:
    """Times the effects of all 3,712 nodes of bracket-mini: ours, and one pass for each node with model.ablate."""
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    measured = []
    for prompts in (64, 256):
        task = circuits.bracket_counting(model, prompts, 3)
        parts = [task.part(slice(i, i + 64)) for i in range(0, prompts, 64)]
        rng = np.random.default_rng(0)
        ours = circuits.ablation_effects(model, task)
        nodes = [f"{hook}:{c}" for hook, values in ours.hooks.items() for c in range(len(values))]
        drawn = [nodes[i] for i in rng.permutation(len(nodes))[:48]]
        times, errors = [], []
        for _ in range(3):
            whole = seconds(lambda t=task: circuits.ablation_effects(model, t))
            begun = time.perf_counter()
            answers = {node: one_pass(model, node, parts) for node in drawn}
            each = (time.perf_counter() - begun) / len(drawn)
            times.append((whole, each))
            for node, logits in answers.items():
                hook, _, channel = node.rpartition(":")
                errors.append(float(np.abs(ours.hooks[hook][int(channel)] - logits).max()))
        assert max(errors) < 1e-4, max(errors)
        ratios = [each * len(nodes) / whole for whole, each in times]
        measured.append(
            {
                "prompts": prompts,
                "nodes": len(nodes),
                "seconds": statistics.median(whole for whole, _ in times),
                "one_pass_seconds": statistics.median(each for _, each in times),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "largest_difference_of_a_logit": max(errors),
            }
        )
    return measured


@torch.no_grad()
def one_pass(model: scalpel.CircuitGPT, node: str, parts: list[circuits.Task]) -> np.ndarray:
    """The logits of the answers with one node ablated, from a forward pass."""
    parts_logits = []
    with model.ablate([node]):
        for part in parts:
            logits = model(part.ids)
            parts_logits.append(logits[torch.arange(len(part)), part.asked][:, list(part.answers)])
    return torch.cat(parts_logits).numpy()


def pruning() -> dict[str, Any]:
    """Times pruning from ten seeds, with their controls, and what the best circuit closes over."""
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    pruned = circuits.prune(model)
    return {
        "seconds": pruned.seconds,
        "seeds": len(pruned.circuits),
        "nodes": [len(circuit.nodes) for circuit in pruned.circuits],
        "of": pruned.total,
        "reached": sum(circuit.reached for circuit in pruned.circuits),
    }


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def markdown(report: dict[str, Any]) -> str:
    s, p = report["semigroups"], report.get("pruning")
    lines = [
        "# Semigroups, orbits, extraction, circuits",
        "",
        "Made by `python benches/bench_algebra.py`. Every answer was checked before anything was timed.",
        where_measured(report["environment"], report["commit"]),
        "",
        "## A semigroup of 823,543 elements (T_7)",
        "",
        f"Enumerating it takes {s['ms']['ours']:.0f} ms, and {s['ms']['libsemigroups']:.0f} ms by libsemigroups alone: "
        f"**{s['ratio']:.2f}×**. What follows takes, in seconds: "
        + ", ".join(f"{name} {value:.1f}" for name, value in s["tables_seconds"].items())
        + ".",
        "",
        "## Orbits on 12 million states",
        "",
        "| maps | reached | ours, ms | scipy, ms | copying the maps, ms | ours, million states a second | "
        "index and period of every state, million a second |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {o['states']} | {o['reached']:,} | {o['ms']['ours']:.0f} | {o['ms']['scipy']:.0f} | "
        f"{o['ms']['copy']:.0f} | {o['million_states_a_second']:.1f} | {o['orbit_shapes_million_a_second']:.1f} |"
        for o in report["orbits"]
    ]
    lines += [
        "",
        "Threads share the search for reachable states where the frontier is wide. Index and period of a single map "
        "are found in one walk on one thread, and each step of a random map waits for memory.",
        "",
        "## Extraction, nulls included",
        "",
        "| model | seconds | elements | words asked | highest bound on conflict in any cell |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {e['model']} | {e['seconds']:.1f} | {e['size']} | {e['words_asked']:,} | {e['conflict_at_most']:.1%} |"
        for e in report["extraction"]
    ]
    lines += [
        "",
        "## Ablation effects of every node of bracket-mini",
        "",
        "The peer runs one pass for each node with `model.ablate`, in batches of 64 prompts. 48 nodes are timed, and "
        "their mean is multiplied by the number of nodes.",
        "",
        "| prompts | nodes | ours, s | one pass, ms | ratio | ratios of three runs | largest difference of a logit |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e['prompts']} | {e['nodes']:,} | {e['seconds']:.1f} | {1e3 * e['one_pass_seconds']:.0f} | "
        f"**{e['ratio']:.1f}×** | {', '.join(f'{r:.1f}' for r in e['ratios'])} | "
        f"{e['largest_difference_of_a_logit']:.1e} |"
        for e in report["effects"]
    ]
    if p is not None:
        lines += [
            "",
            "## Pruning bracket-mini for bracket counting",
            "",
            f"{p['seeds']} seeds with their controls take {p['seconds']:.0f} s. {p['reached']} reach 0.15 nats, with "
            f"{min(p['nodes'])} to {max(p['nodes'])} of {p['of']:,} nodes.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-pruning", action="store_true")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    report = {
        "commit": commit(),
        "environment": bench.environment(),
        "semigroups": semigroups(),
        "orbits": orbits(),
        "extraction": extraction(),
        "effects": effects(),
    }
    if not arguments.without_pruning:
        report["pruning"] = pruning()
    (arguments.out / "algebra.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "algebra.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
