"""Cut the shipped model open: ``python examples/cut_open.py [SEEDS]``.

It prints which nodes matter for closing a list, which of them suffice, and what they close over. One seed takes about
half a minute. ``scalpel prune bracket-mini`` runs ten seeds, judges them, and writes a report.
"""

import sys

import scalpel
from scalpel import circuits


def main(seeds: int = 1, prompts: int = 128) -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    task = circuits.bracket_counting(model, prompts, seed=0)

    # Ablate every node on its own: how much does each matter?
    effects = circuits.ablation_effects(model, task)
    for node, rise, error in effects.largest(5):
        print(f"{node:>20}: the loss rises by {rise:+.3f} ± {error:.3f} nats without it")

    # Delete all but a few nodes at once: which suffice? To be quick, means are over the task's own prompts here.
    pruning = circuits.prune(model, seeds=seeds, prompts=prompts, reference=(task.ids, task.mask))
    for circuit in pruning.circuits:
        print(
            f"seed {circuit.seed}: {len(circuit.nodes)} nodes, {circuit.edges} edges; loss alone "
            f"{circuit.kept['mean'].loss:.3f}, without them {circuit.removed['mean'].loss:.3f}, as many random ones "
            f"{circuit.random.loss:.3f}, on nonsense labels {circuit.nonsense.loss:.3f} nats"
        )
    if pruning.graph is not None:
        edges = [edge for edge in pruning.graph.edges if edge[3] is not None]
        heaviest = sorted(edges, key=lambda edge: -abs(edge[3] or 0))
        for src, dst, _, weight in heaviest[:5]:
            print(f"{src} → {dst}: {weight:+.2f}")
        print("letters whose action the circuit keeps:", pruning.closure["letters"] or "none")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
