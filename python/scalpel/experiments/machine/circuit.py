"""Do a few nodes suffice to count brackets, and are they more than an artefact of the search?

``scalpel prune`` searches for circuits and, with ``--keep``, leaves them in the model's folder. The smallest one is
judged here.

Predicted: the circuit alone keeps the task's loss at the target; the model without the circuit does not, and neither
do random circuits of the same size.
Measured: the loss of the circuit alone and of the model without it, under mean and zero ablation, on prompts that
neither the search nor the choice among circuits has seen.
Null: random circuits with as many nodes at each hook; and the same search for nonsense labels.
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
NEEDED = 0.5  # nats; it lies between a loss that does the task and ln 2, the loss of a coin
RULE = (
    "Reproduced iff four things hold on new prompts. The circuit alone does the task: its refitted loss is at most the "
    "target, or the target lies in its 95 % interval. Without the circuit the task is lost: the loss is above "
    f"{NEEDED} nats. No random circuit with as many nodes at each hook does the task: all losses are above {NEEDED} "
    "nats. As many nodes, found by the same search for nonsense labels that depend on the prompt's beginning, don't "
    f"give those labels: the median loss is above {NEEDED} nats; otherwise masks alone would make such circuits. Not "
    "testable if no circuit has been searched for in this model, or if no search reached the target."
)
FILE = "pruning.json"


def run(
    model: CircuitGPT, *, prompts: int = 256, draws: int = 20, nulls: tuple[str, ...] = NULLS, seed: int = 0
) -> Result:
    """Judge the circuit stored with a model on new prompts, beside random circuits of its size.

    Args:
        model: A CircuitGPT; its folder holds the search that ``scalpel prune --keep`` left there.
        prompts: New prompts, 8 or more.
        draws: Random circuits.
        nulls: Which nulls are shown: "rotated" for the random circuits, "shuffled" for the search on nonsense labels.
            The verdict is computed from both in any case. An untrained model can't do the task, so it has no circuit.
        seed: Seed of the prompts, of the random circuits and of the resampling.

    Returns:
        A Result; "not testable here" if no search is stored for these weights or none reached the target.

    Raises:
        Refused: The stored file holds no search, or the model's tokenizer splits an answer.
        ValueError: An option is out of range, or a null is unknown.
    """
    nulls = check_nulls(nulls)
    at_least(8, prompts=prompts)
    at_least(1, draws=draws)
    return examine(model, stored(model), prompts=prompts, draws=draws, nulls=nulls, seed=seed)


def stored(model: CircuitGPT) -> Pruning | None:
    """The search stored in the model's folder, if it was made with exactly these weights; None otherwise."""
    path = None if model.folder is None else model.folder / FILE
    if path is None or not path.is_file():
        return None
    pruning = read_pruning(path)
    return pruning if pruning.fingerprint == identity(model) else None


def read_pruning(path: Path) -> Pruning:
    """Read a search that ``scalpel prune`` wrote. Raises Refused if the file holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        circuits = tuple(SeedCircuit.from_dict(circuit) for circuit in data["circuits"])
        best = None if data["best"] is None else SeedCircuit.from_dict(data["best"])
        graph = data["graph"] and CircuitGraph(
            tuple(data["graph"]["nodes"]),
            tuple((edge["src"], edge["dst"], edge["kind"], edge["weight"]) for edge in data["graph"]["edges"]),
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
        raise Refused(f"{path} holds no search for circuits ({error!r}); make it anew with scalpel prune") from error
    return Pruning(circuits=circuits, best=best, graph=graph, notes=notes, **plain_fields)


def examine(
    model: CircuitGPT,
    pruning: Pruning | None,
    *,
    prompts: int = 256,
    draws: int = 20,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """Judge a search on new prompts, with the arguments of :func:`run`.

    Without a search, the verdict is "not testable here" and the summary says what to do.
    """
    provenance = model_provenance(model, prompts=prompts, draws=draws, seed=seed)
    protocol = Protocol("circuit", QUESTION, SEED_FIGURE, provenance)
    if pruning is None or pruning.best is None:
        return _not_testable(protocol, pruning)
    best = pruning.best
    protocol.predict(
        {
            "summary": f"{len(best.nodes)} of {pruning.total} nodes keep the loss at {pruning.target} nats; random "
            "circuits of the same size don't, nor does the model without these nodes",
            "nodes": list(best.nodes),
            "target": pruning.target,
            "found_with": pruning.options,
            "rule": RULE,
        }
    )
    protocol.measuring()
    make, before = task_named(pruning.task), pruning.options
    earlier = [make(model, before["prompts"], 2 * before["seed"] + i) for i in range(2)]
    task = make(model, prompts, 2 * (1000 + seed) + 1).unseen(*earlier)
    accuracy = check_able(model, task)
    with torch.no_grad():
        whole = refit(answer_logits(model, task), task.labels).loss
    kinds = ("mean", "zero") if "hook_means" in model.card else ("zero",)
    reference = None if "hook_means" in model.card else (task.ids, task.mask)
    kinds = kinds if pruning.ablation in kinds else (*kinds, pruning.ablation)
    stand_ins = {
        kind: substitute(model, kind, reference if kind == "mean" else (task.ids, task.mask), node_hooks(model))
        for kind in kinds
    }
    stand_in = stand_ins[pruning.ablation]
    kept = {kind: measure(model, best.nodes, value, task) for kind, value in stand_ins.items()}
    removed = {kind: measure(model, best.nodes, value, task, removed=True) for kind, value in stand_ins.items()}
    rng = np.random.default_rng([seed, 5])
    random = [measure(model, random_nodes_like(model, best.nodes, rng), stand_in, task) for _ in range(draws)]
    interval = _interval(model, best.nodes, stand_in, task, rng)
    nonsense = [circuit.nonsense.loss for circuit in pruning.circuits]
    own = kept[pruning.ablation]
    verdict = _verdict(pruning, own, interval, removed[pruning.ablation], random, nonsense)
    return protocol.conclude(
        measured={
            "summary": f"{len(best.nodes)} nodes, {best.edges} edges: loss {own.loss:.3f} nats, accuracy "
            f"{own.accuracy:.1%} (whole model {accuracy:.1%}); without them {removed[pruning.ablation].loss:.3f} nats"
            + _closing(pruning.closure),
            "whole_model_loss": whole,
            "kept": {kind: vars(losses) for kind, losses in kept.items()},
            "removed": {kind: vars(losses) for kind, losses in removed.items()},
            "seeds": [_row(circuit, pruning.ablation) for circuit in pruning.circuits],
            "nodes_that_seeds_share": {"mean_jaccard": pruning.overlap(), "of_all_seeds": _of_all(pruning)},
            "closes_over": pruning.closure or "not measured",
            **({"notes": list(pruning.notes)} if pruning.notes else {}),
        },
        interval={
            "summary": f"loss 95 % [{interval[0]:.3f}, {interval[1]:.3f}], bootstrap by pair of prompts",
            "loss": interval,
        },
        null=_null(nulls, [circuit.loss for circuit in random], nonsense),
        verdict=verdict,
        figures=_figures(model, pruning, whole, kept, removed, random),
    )


def _null(nulls: tuple[str, ...], random: list[float], nonsense: list[float]) -> dict[str, Any]:
    null: dict[str, Any] = {}
    words = []
    if "rotated" in nulls:
        words.append(f"{len(random)} random circuits of its size: {min(random):.3f} nats or more")
        null["random_losses"] = random
    if "shuffled" in nulls:
        words.append(f"search on nonsense labels: median {np.median(nonsense):.3f} nats")
        null["nonsense_losses"] = nonsense
    return {"summary": "; ".join([*words, f"a coin: {np.log(2):.3f}"]), **null}


def _not_testable(protocol: Protocol, pruning: Pruning | None) -> Result:
    reason = "no circuit has been searched for in this model" if pruning is None else "no search reached the target"
    protocol.predict({"summary": "nothing: " + reason, "rule": RULE})
    protocol.measuring()
    return protocol.conclude(
        measured={
            "summary": f"{reason}; `scalpel prune MODEL --keep` searches, which takes a few minutes for a small model"
        },
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
    pruning: Pruning,
    own: Measured,
    interval: list[float],
    removed: Measured,
    random: list[Measured],
    nonsense: list[float],
) -> Verdict:
    """The verdict that RULE gives."""
    suffices = own.loss <= pruning.target or interval[0] <= pruning.target
    needed = removed.loss > NEEDED
    controls = min(circuit.loss for circuit in random) > NEEDED and float(np.median(nonsense)) > NEEDED
    return "reproduced" if suffices and needed and controls else "not reproduced"


def _row(circuit: SeedCircuit, ablation: str) -> dict[str, Any]:
    return {
        "seed": circuit.seed,
        "nodes": len(circuit.nodes),
        "edges": circuit.edges,
        "reached": circuit.reached,
        "loss_where_found": circuit.loss,
        **{f"loss_{kind}": alone.loss for kind, alone in circuit.kept.items()},
        "loss_without": circuit.removed[ablation].loss,
        "loss_random_nodes": circuit.random.loss,
        "loss_nonsense_labels": circuit.nonsense.loss,
    }


def _closing(closure: dict[str, Any]) -> str:
    """The tokens over which the circuit closes, as part of a sentence; empty if that wasn't measured."""
    if not closure:
        return ""
    letters = ", ".join(closure["letters"]) or "no letter"
    sizes = "" if closure["whole_size"] is None else f" ({closure['size']} of {closure['whole_size']} elements)"
    known, chance = closure["states_kept"], closure["states_kept_by_nothing"]
    return (
        f"; it keeps the action of {letters}{sizes} and knows the state after {known:.0%} of the "
        f"prefixes; no node at all knows it after {chance:.0%}"
    )


def _of_all(pruning: Pruning) -> list[str]:
    """The nodes that every search that reached the target has kept."""
    reached = sum(circuit.reached for circuit in pruning.circuits)
    return [node for node, count in pruning.shared() if count == reached]


def _figures(
    model: CircuitGPT,
    pruning: Pruning,
    whole: float,
    kept: dict[str, Measured],
    removed: dict[str, Measured],
    random: list[Measured],
) -> dict[str, Any]:
    assert pruning.best is not None
    graph = pruning.graph or circuit_graph(model, pruning.best.nodes)
    reached = max(1, sum(circuit.reached for circuit in pruning.circuits))
    shares = {node: count / reached for node, count in pruning.shared()}
    hooks = list(dict.fromkeys(node.rpartition(":")[0] for node in graph.nodes))
    losses = [circuit.loss for circuit in random]
    nonsense = [circuit.nonsense.loss for circuit in pruning.circuits]
    rows: list[tuple[str, float, float, float]] = [
        ("whole model", whole, whole, whole),
        *((f"circuit alone, {kind}", alone.loss, alone.loss, alone.loss) for kind, alone in kept.items()),
        *((f"without the circuit, {kind}", rest.loss, rest.loss, rest.loss) for kind, rest in removed.items()),
        ("random nodes alone", float(np.mean(losses)), min(losses), max(losses)),
        ("search on nonsense labels", float(np.median(nonsense)), min(nonsense), max(nonsense)),
    ]
    labels, values, low, high = (list(column) for column in zip(*rows, strict=True))
    return {
        "circuit": {
            "kind": "layered",
            "title": f"The circuit of {len(graph.nodes)} nodes that the best seed found",
            "summary": "Columns stand in the order of the forward pass, with the number of kept nodes. A larger dot "
            "was kept by more seeds. Everything that pruning found is shown.",
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
            "summary": "Lines across the last two bars run from the least to the most of the draws, or of the seeds. "
            "The losses on nonsense labels are those that the search measured.",
            "ylabel": "nats",
            "labels": labels,
            "values": values,
            "low": low,
            "high": high,
            "reference": [{"y": pruning.target, "label": "target"}, {"y": float(np.log(2)), "label": "a coin"}],
        },
    }
