"""Do a few nodes suffice for the task, and are they more than an artefact of the search?

``scalpel prune`` finds circuits and leaves them in the model's folder (with ``--keep``); here the smallest is judged on
prompts that neither its masks nor its choice have seen, beside circuits of as many random nodes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...circuits.ablations import Substitute, node_hooks, substitute
from ...circuits.fit import refit
from ...circuits.graph import CircuitGraph, circuit_graph
from ...circuits.measure import measure, only, random_nodes_like
from ...circuits.result import Measured, Pruning, SeedCircuit
from ...circuits.task import Task, answer_logits, check_able, task_named
from ...models.circuitgpt.model import CircuitGPT
from ...models.fingerprint import identity
from ...tasks.refused import Refused
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import bootstrap, rows_by_unit

QUESTION = "Do a few nodes suffice to count brackets, and are they more than an artefact?"
SEED_FIGURE = "circuits are subsemigroups; no figure is given"
NEEDED = 0.5  # nats: between a loss that does the task and ln 2, that of a coin
RULE = (
    "Reproduced iff on new prompts the circuit alone does the task (its refitted loss is at most the target, or the "
    f"target lies in its 95 % interval), without it the task is lost (loss above {NEEDED} nats), none of the random "
    f"circuits of as many nodes at each hook does the task (all above {NEEDED} nats), and as many nodes found by the "
    f"same search for labels that go by the prompt's beginning don't say those (median above {NEEDED} nats), which "
    "would show that masks alone make such circuits. Not testable where no circuit has been "
    "searched for in this model, or where none reached the target."
)
FILE = "pruning.json"


def run(
    model: CircuitGPT, *, prompts: int = 256, draws: int = 20, nulls: tuple[str, ...] = NULLS, seed: int = 0
) -> Result:
    """Judge the stored circuit of ``model`` on ``prompts`` new prompts, beside ``draws`` random ones of its size.

    ``nulls`` that are shown: "rotated", random circuits of its size; "shuffled", the search on nonsense labels. The
    verdict needs both and is computed from both. An untrained model has no circuit: it can't do the task.
    """
    nulls = check_nulls(nulls)
    at_least(8, prompts=prompts)
    at_least(1, draws=draws)
    return examine(model, stored(model), prompts=prompts, draws=draws, nulls=nulls, seed=seed)


def stored(model: CircuitGPT) -> Pruning | None:
    """The search that lies in the model's folder, if it was made on these very weights."""
    path = None if model.folder is None else model.folder / FILE
    if path is None or not path.is_file():
        return None
    found = read_pruning(path)
    return found if found.fingerprint == identity(model) else None


def read_pruning(path: Path) -> Pruning:
    """A search as ``scalpel prune`` writes it. Refused where the file is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        circuits = tuple(SeedCircuit.from_dict(one) for one in data["circuits"])
        best = None if data["best"] is None else SeedCircuit.from_dict(data["best"])
        graph = data["graph"] and CircuitGraph(
            tuple(data["graph"]["nodes"]),
            tuple((e["src"], e["dst"], e["kind"], e["weight"]) for e in data["graph"]["edges"]),
        )
        notes = tuple(data["notes"])
        plain_fields = {
            name: data[name]
            for name in (
                *("model", "fingerprint", "task", "ablation", "target", "accuracy", "model_loss", "total"),
                *("closure", "options", "seconds"),
            )
        }
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Refused(f"{path} is no search of circuits ({error!r}); make it anew with scalpel prune") from error
    return Pruning(circuits=circuits, best=best, graph=graph, notes=notes, **plain_fields)


def examine(
    model: CircuitGPT,
    found: Pruning | None,
    *,
    prompts: int = 256,
    draws: int = 20,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """The result of a search on new prompts; without one, "not testable here" with what to do."""
    provenance = model_provenance(model, prompts=prompts, draws=draws, seed=seed)
    protocol = Protocol("circuit", QUESTION, SEED_FIGURE, provenance)
    if found is None or found.best is None:
        return _not_testable(protocol, found)
    best = found.best
    protocol.predict(
        {
            "summary": f"{len(best.nodes)} of {found.total} nodes keep the loss at {found.target} nats; random ones of "
            "the same size don't, nor does the model without them",
            "nodes": list(best.nodes),
            "target": found.target,
            "found_with": found.options,
            "rule": RULE,
        }
    )
    protocol.measuring()
    make, before = task_named(found.task), found.options
    earlier = [make(model, before["prompts"], 2 * before["seed"] + i) for i in range(2)]
    task = make(model, prompts, 2 * (1000 + seed) + 1).unseen(*earlier)
    accuracy = check_able(model, task)
    with torch.no_grad():
        whole = refit(answer_logits(model, task), task.labels).loss
    kinds = ("mean", "zero") if "hook_means" in model.card else ("zero",)
    reference = None if "hook_means" in model.card else (task.ids, task.mask)
    kinds = kinds if found.ablation in kinds else (*kinds, found.ablation)
    stand_ins = {
        kind: substitute(model, kind, reference if kind == "mean" else (task.ids, task.mask), node_hooks(model))
        for kind in kinds
    }
    stand_in = stand_ins[found.ablation]
    kept = {kind: measure(model, best.nodes, one, task) for kind, one in stand_ins.items()}
    removed = {kind: measure(model, best.nodes, one, task, removed=True) for kind, one in stand_ins.items()}
    rng = np.random.default_rng([seed, 5])
    random = [measure(model, random_nodes_like(model, best.nodes, rng), stand_in, task) for _ in range(draws)]
    interval = _interval(model, best.nodes, stand_in, task, rng)
    nonsense = [circuit.nonsense.loss for circuit in found.circuits]
    own = kept[found.ablation]
    verdict = _verdict(found, own, interval, removed[found.ablation], random, nonsense)
    return protocol.conclude(
        measured={
            "summary": f"{len(best.nodes)} nodes, {best.edges} edges: loss {own.loss:.3f} nats, accuracy "
            f"{own.accuracy:.1%} (whole model {accuracy:.1%}); without them {removed[found.ablation].loss:.3f} nats"
            + _closing(found.closure),
            "whole_model_loss": whole,
            "kept": {kind: vars(one) for kind, one in kept.items()},
            "removed": {kind: vars(one) for kind, one in removed.items()},
            "seeds": [_row(circuit, found.ablation) for circuit in found.circuits],
            "nodes_that_seeds_share": {"mean_jaccard": found.overlap(), "of_all_seeds": _of_all(found)},
            "closes_over": found.closure or "not measured",
            **({"notes": list(found.notes)} if found.notes else {}),
        },
        interval={
            "summary": f"loss 95 % [{interval[0]:.3f}, {interval[1]:.3f}], bootstrap by pair of prompts",
            "loss": interval,
        },
        null=_null(nulls, [one.loss for one in random], nonsense),
        verdict=verdict,
        figures=_figures(model, found, whole, kept, removed, random),
    )


def _null(nulls: tuple[str, ...], random: list[float], nonsense: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    words = []
    if "rotated" in nulls:
        words.append(f"{len(random)} random circuits of its size: {min(random):.3f} nats and more")
        found["random_losses"] = random
    if "shuffled" in nulls:
        words.append(f"search on nonsense labels: median {np.median(nonsense):.3f} nats")
        found["nonsense_losses"] = nonsense
    return {"summary": "; ".join([*words, f"a coin: {np.log(2):.3f}"]), **found}


def _not_testable(protocol: Protocol, found: Pruning | None) -> Result:
    what = "no circuit has been searched for in this model" if found is None else "no seed reached the target"
    protocol.predict({"summary": "nothing: " + what, "rule": RULE})
    protocol.measuring()
    return protocol.conclude(
        measured={"summary": f"{what}; `scalpel prune MODEL --keep` searches, a few minutes for a small model"},
        interval={},
        null={},
        verdict="not testable here",
    )


@torch.no_grad()
def _interval(
    model: CircuitGPT, nodes: tuple[str, ...], stand_in: Substitute, task: Task, rng: np.random.Generator
) -> list[float]:
    """95 % bootstrap interval of the refitted loss, by group of prompts; the refit is part of what is drawn again."""
    with only(model, nodes, stand_in):
        logits = answer_logits(model, task)
    groups = rows_by_unit(task.groups.numpy())

    def refitted_loss(drawn: np.ndarray) -> float:
        rows = torch.from_numpy(np.concatenate([groups[i] for i in drawn]))
        return refit(logits[rows], task.labels[rows]).loss

    return list(bootstrap(refitted_loss, len(groups), rng, resamples=100))


def _verdict(
    found: Pruning,
    own: Measured,
    interval: list[float],
    removed: Measured,
    random: list[Measured],
    nonsense: list[float],
) -> Verdict:
    """The verdict by RULE."""
    suffices = own.loss <= found.target or interval[0] <= found.target
    needed = removed.loss > NEEDED
    controls = min(one.loss for one in random) > NEEDED and float(np.median(nonsense)) > NEEDED
    return "reproduced" if suffices and needed and controls else "not reproduced"


def _row(circuit: SeedCircuit, ablation: str) -> dict[str, Any]:
    return {
        "seed": circuit.seed,
        "nodes": len(circuit.nodes),
        "edges": circuit.edges,
        "reached": circuit.reached,
        "loss_where_found": circuit.loss,
        **{f"loss_{kind}": one.loss for kind, one in circuit.kept.items()},
        "loss_without": circuit.removed[ablation].loss,
        "loss_random_nodes": circuit.random.loss,
        "loss_nonsense_labels": circuit.nonsense.loss,
    }


def _closing(closure: dict[str, Any]) -> str:
    """What the circuit closes over, in words; nothing where that wasn't measured."""
    if not closure:
        return ""
    letters = ", ".join(closure["letters"]) or "no letter"
    sizes = "" if closure["whole_size"] is None else f" ({closure['size']} of {closure['whole_size']} elements)"
    known, chance = closure["states_kept"], closure["states_kept_by_nothing"]
    return f"; it keeps the action of {letters}{sizes} and knows {known:.0%} of the states, no node at all {chance:.0%}"


def _of_all(found: Pruning) -> list[str]:
    reached = sum(circuit.reached for circuit in found.circuits)
    return [node for node, count in found.shared() if count == reached]


def _figures(
    model: CircuitGPT,
    found: Pruning,
    whole: float,
    kept: dict[str, Measured],
    removed: dict[str, Measured],
    random: list[Measured],
) -> dict[str, Any]:
    assert found.best is not None
    graph = found.graph or circuit_graph(model, found.best.nodes)
    reached = max(1, sum(circuit.reached for circuit in found.circuits))
    shares = {node: count / reached for node, count in found.shared()}
    hooks = list(dict.fromkeys(node.rpartition(":")[0] for node in graph.nodes))
    losses = [one.loss for one in random]
    nonsense = [circuit.nonsense.loss for circuit in found.circuits]
    rows: list[tuple[str, float, float, float]] = [
        ("whole model", whole, whole, whole),
        *((f"circuit alone, {kind}", one.loss, one.loss, one.loss) for kind, one in kept.items()),
        *((f"without the circuit, {kind}", one.loss, one.loss, one.loss) for kind, one in removed.items()),
        ("random nodes alone", float(np.mean(losses)), min(losses), max(losses)),
        ("search on nonsense labels", float(np.median(nonsense)), min(nonsense), max(nonsense)),
    ]
    labels, values, low, high = (list(column) for column in zip(*rows, strict=True))
    return {
        "circuit": {
            "kind": "layered",
            "title": f"The circuit of {len(graph.nodes)} nodes that the best seed found",
            "summary": "Columns in the order of the forward pass, with the number of kept nodes; a larger dot is kept "
            "by more seeds. What pruning found, nothing left out.",
            "columns": [
                {"label": hook, "nodes": [node for node in graph.nodes if node.rpartition(":")[0] == hook]}
                for hook in hooks
            ],
            "edges": graph.to_dict()["edges"],
            "sizes": {node: shares.get(node, 0.0) for node in graph.nodes},
        },
        "losses": {
            "kind": "bars",
            "title": "Task loss on new prompts, scale and shifts refitted",
            "summary": "Lines across the last two bars: least and most of the draws, or of the seeds; nonsense labels "
            "as the search measured them.",
            "ylabel": "nats",
            "labels": labels,
            "values": values,
            "low": low,
            "high": high,
            "reference": [{"y": found.target, "label": "target"}, {"y": float(np.log(2)), "label": "a coin"}],
        },
    }
