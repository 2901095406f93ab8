"""A circuit as a graph: the nodes that are kept, and what connects them in the model.

Edges of kind "weight" are non-zero weights between kept nodes, and the circuit's size is their number. A channel of
``attn.y`` carries what its ``attn.v`` channel contributed, so the output matrix is drawn from ``attn.v``. Edges of the
other kinds have no weight: "residual", a channel that a block's output writes and a later block reads at the same
number; "score", a q and a k channel that are multiplied; "mix", from a head's q channels to its v channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hooks.adapters import check_unadapted
from ..hooks.standing import stood_for
from ..models.circuitgpt.model import CircuitGPT

__all__ = ["CircuitGraph", "circuit_graph"]


@dataclass(frozen=True)
class CircuitGraph:
    """The nodes of a circuit and the edges between them.

    Attributes:
        nodes: The names of the nodes, in the order of the forward pass.
        edges: The edges as (source, target, kind, weight or None).

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> graph = scalpel.circuits.circuit_graph(model, ["0.attn.v:5"])
        >>> graph.weights, graph.to_dict()
        (0, {'nodes': ['0.attn.v:5'], 'edges': []})
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str, str, float | None], ...]

    @property
    def weights(self) -> int:
        """The number of edges that are weights, which is the size of the circuit."""
        return sum(kind == "weight" for _, _, kind, _ in self.edges)

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as plain data.

        Returns:
            The nodes, and the edges as dicts with src, dst, kind and weight.
        """
        keys = ("src", "dst", "kind", "weight")
        return {"nodes": list(self.nodes), "edges": [dict(zip(keys, edge, strict=True)) for edge in self.edges]}


def circuit_graph(model: CircuitGPT, nodes: Iterable[str]) -> CircuitGraph:
    """Find what connects some nodes of a model.

    Args:
        model: The model.
        nodes: The names of the nodes, such as ``1.attn.q:5``.

    Returns:
        The graph.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> scalpel.circuits.circuit_graph(model, ["1.attn.v:5", "1.attn.q:3"]).nodes
        ('1.attn.q:3', '1.attn.v:5')
    """
    model = stood_for(model)
    check_unadapted(model, "the edges of a circuit are its weights")
    order = {name: i for i, name in enumerate(model.hook_names)}
    kept = sorted(set(nodes), key=lambda node: (order[_hook(node)], _channel(node)))
    edges = [*_weights(model, set(kept)), *_residual(kept, order), *_attention(model, kept)]
    return CircuitGraph(tuple(kept), tuple(edges))


def _weights(model: CircuitGPT, kept: set[str]) -> list[tuple[str, str, str, float | None]]:
    table = model.edges()
    names = np.array([name.replace(".attn.y:", ".attn.v:") for name in table.nodes], dtype=object)
    inside = np.array([name in kept for name in names])
    both = np.flatnonzero(inside[table.src_code] & inside[table.dst_code])
    return [
        (str(names[table.src_code[i]]), str(names[table.dst_code[i]]), "weight", float(table.weight[i])) for i in both
    ]


def _residual(kept: list[str], order: dict[str, int]) -> list[tuple[str, str, str, float | None]]:
    """Connect each write into the residual to all later reads of the same channel."""
    edges: list[tuple[str, str, str, float | None]] = []
    writes = [node for node in kept if _hook(node).endswith("resid_delta")]
    reads = [node for node in kept if _hook(node).endswith("act_in")]
    for write in writes:
        edges += [
            (write, read, "residual", None)
            for read in reads
            if _channel(read) == _channel(write) and order[_hook(read)] > order[_hook(write)]
        ]
    return edges


def _attention(model: CircuitGPT, kept: list[str]) -> list[tuple[str, str, str, float | None]]:
    width = model.config.d_attn // model.config.n_head
    edges: list[tuple[str, str, str, float | None]] = []
    by_hook: dict[str, list[str]] = {}
    for node in kept:
        by_hook.setdefault(_hook(node), []).append(node)
    for layer in range(model.config.n_layer):
        q, k, v = (by_hook.get(f"{layer}.attn.{part}", []) for part in "qkv")
        multiplied = {_channel(node) for node in q} & {_channel(node) for node in k}
        edges += [(a, b, "score", None) for a in k for b in q if _channel(a) == _channel(b)]
        for query in q:
            if _channel(query) in multiplied:
                heads = [node for node in v if _channel(node) // width == _channel(query) // width]
                edges += [(query, node, "mix", None) for node in heads]
    return edges


def _hook(node: str) -> str:
    return node.rpartition(":")[0]


def _channel(node: str) -> int:
    return int(node.rpartition(":")[2])
