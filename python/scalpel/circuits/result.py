"""The result of pruning: a circuit for each seed, with the controls that distinguish a circuit from an artefact."""

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
    """Loss and accuracy on prompts that no mask was learned on.

    Attributes:
        loss: The loss in nats, with scale and shifts refitted.
        accuracy: The accuracy.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class SeedCircuit:
    """The circuit that one seed's search found.

    Attributes:
        seed: The number of the seed.
        nodes: The names of the nodes, those that the task needs most first.
        edges: The number of non-zero weights between the nodes.
        loss: The loss on the prompts that the circuit was found on.
        reached: Whether this loss is at most the target.
        kept: What the model does with only the circuit left, by kind of ablation.
        removed: What the model does with only the circuit deleted, by kind of ablation.
        random: What it does with as many random nodes at each hook left.
        random_removed: What it does with as many random nodes at each hook deleted.
        nonsense: What the same search reaches with as many nodes if the labels depend on the prompt's beginning instead
            of the task.
        seconds: The time taken.
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
        """Build a circuit from what ``dataclasses.asdict`` made of one.

        Args:
            data: The dict.

        Returns:
            The circuit.

        Example:
            >>> from dataclasses import asdict
            >>> from scalpel.circuits import Measured, SeedCircuit
            >>> control = Measured(loss=0.7, accuracy=0.5)
            >>> circuit = SeedCircuit(0, ("0.attn.v:1",), 1, 0.1, True, {}, {}, control, control, control, 1.0)
            >>> SeedCircuit.from_dict(asdict(circuit)) == circuit
            True
        """
        fields = dict(data) | {"nodes": tuple(data["nodes"])}
        for name in ("kept", "removed"):
            fields[name] = {kind: Measured(**numbers) for kind, numbers in data[name].items()}
        for name in ("random", "random_removed", "nonsense"):
            fields[name] = Measured(**data[name])
        return cls(**fields)


@dataclass(frozen=True)
class Pruning:
    """The circuits of all seeds, and the smallest one that reaches the target.

    Attributes:
        model: The name of the model.
        fingerprint: A digest that identifies the model.
        task: The name of the task.
        ablation: What replaced deleted nodes during the search.
        target: The target, a loss in nats.
        accuracy: The accuracy of the whole model on held-out prompts.
        model_loss: The loss of the whole model on held-out prompts.
        total: The number of nodes of the whole model.
        circuits: The circuit of each seed.
        best: The smallest circuit that reaches the target, or None.
        graph: The graph of the best circuit, or None.
        closure: What the best circuit closes over; see :mod:`.closure`.
        options: The options of the search.
        notes: What a reader should know.
        seconds: The time taken.

    Example:
        >>> from scalpel.circuits import Measured, Pruning, SeedCircuit
        >>> control = Measured(loss=0.7, accuracy=0.5)
        >>> large = SeedCircuit(0, ("0.attn.v:1", "0.attn.v:2"), 2, 0.1, True, {}, {}, control, control, control, 1.0)
        >>> small = SeedCircuit(1, ("0.attn.v:1",), 1, 0.1, True, {}, {}, control, control, control, 1.0)
        >>> pruning = Pruning("mine", "", "echo", "mean", 0.15, 1.0, 0.05, 64, (large, small), small, None)
        >>> pruning.shared()
        [('0.attn.v:1', 2), ('0.attn.v:2', 1)]
        >>> pruning.overlap(), pruning.to_dict()["overlap"]
        (0.5, 0.5)
        >>> pruning.to_json()[:16]
        '{"model": "mine"'
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
        """Count in how many of the circuits that reach the target each node occurs.

        Returns:
            The nodes with their counts, the most frequent first.
        """
        counts = Counter(node for circuit in self.circuits if circuit.reached for node in circuit.nodes)
        return counts.most_common()

    def overlap(self) -> float:
        """Compute the mean Jaccard similarity of pairs of circuits that reach the target.

        Returns:
            The similarity, NaN if fewer than two circuits reach the target.
        """
        sets = [set(circuit.nodes) for circuit in self.circuits if circuit.reached]
        pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
        return float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, including ``shared`` and ``overlap``.

        Returns:
            A dict of what JSON can hold.
        """
        data: dict[str, Any] = plain(asdict(self))
        data["graph"] = None if self.graph is None else self.graph.to_dict()
        data["shared"] = [list(pair) for pair in self.shared()]
        data["overlap"] = plain(self.overlap())
        return data

    def to_json(self, indent: int | None = None) -> str:
        """Return the pruning as JSON.

        Args:
            indent: The indentation; None puts everything on one line.

        Returns:
            The text.
        """
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)
