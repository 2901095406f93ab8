"""What pruning gives: a circuit a seed, with the controls that tell a circuit from an artefact."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .._json import plain
from .graph import CircuitGraph

__all__ = ["Measured", "Pruning", "SeedCircuit"]


@dataclass(frozen=True)
class Measured:
    """Refitted loss in nats and accuracy on prompts that no mask was learned on."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class SeedCircuit:
    """One seed's circuit.

    ``nodes``: names, those that the task needs most first; ``loss``: on the prompts that it was found on; ``reached``:
    whether that is at most the target. ``kept``: only the circuit left, and ``removed``: only the circuit deleted, by
    kind of ablation. ``random``: as many nodes at each hook drawn at random, kept. ``nonsense``: what the same search
    reaches with as many nodes when the labels go by the prompt's beginning and not by the task.
    """

    seed: int
    nodes: tuple[str, ...]
    edges: int
    loss: float
    reached: bool
    kept: dict[str, Measured]
    removed: dict[str, Measured]
    random: Measured
    random_removed: Measured
    nonsense: Measured
    seconds: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SeedCircuit":
        """The inverse of ``dataclasses.asdict``."""
        given = dict(data) | {"nodes": tuple(data["nodes"])}
        for name in ("kept", "removed"):
            given[name] = {kind: Measured(**one) for kind, one in data[name].items()}
        for name in ("random", "random_removed", "nonsense"):
            given[name] = Measured(**data[name])
        return cls(**given)


@dataclass(frozen=True)
class Pruning:
    """All seeds' circuits, and the smallest that reaches the target as ``best`` with its ``graph``.

    ``model_loss``, ``accuracy``: of the whole model on the held-out prompts. ``total``: nodes of the whole model.
    ``notes``: what a reader should know.
    """

    model: str
    fingerprint: str
    task: str
    ablation: str
    target: float
    accuracy: float
    model_loss: float
    total: int
    circuits: tuple[SeedCircuit, ...]
    best: SeedCircuit | None
    graph: CircuitGraph | None
    closure: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def shared(self) -> list[tuple[str, int]]:
        """Nodes of the seeds that reach the target, with the number of seeds that keep them, most first."""
        counts = Counter(node for circuit in self.circuits if circuit.reached for node in circuit.nodes)
        return counts.most_common()

    def overlap(self) -> float:
        """Mean Jaccard similarity of two seeds' circuits; NaN with fewer than two that reach the target."""
        sets = [set(circuit.nodes) for circuit in self.circuits if circuit.reached]
        pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
        return float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with what follows from it: ``shared``, ``overlap``."""
        data: dict[str, Any] = plain(asdict(self))
        data["graph"] = None if self.graph is None else self.graph.to_dict()
        data["shared"] = [list(pair) for pair in self.shared()]
        data["overlap"] = plain(self.overlap())
        return data

    def to_json(self, indent: int | None = None) -> str:
        """The pruning as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)
