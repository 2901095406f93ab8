"""Cut the shipped model open: ``python examples/cut_open.py [SEEDS]``.

Which nodes matter for closing a list, which of them suffice, and what they close over. With one seed about half a
minute; ``scalpel prune bracket-mini`` does ten, judges them, and writes a report.
"""

import sys

import scalpel
from scalpel import circuits


def main(seeds: int = 1, prompts: int = 128) -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    task = circuits.bracket_counting(model, prompts, seed=0)

    # Every node ablated on its own: what each is worth.
    effects = circuits.ablation_effects(model, task)
    for node, rise, error in effects.largest(5):
        print(f"{node:>20}: the loss rises by {rise:+.3f} ± {error:.3f} nats without it")

    # All but a few deleted at once: what suffices. Means are over the task's own prompts here, to be quick.
    found = circuits.prune(model, seeds=seeds, prompts=prompts, reference=(task.ids, task.mask))
    for circuit in found.circuits:
        print(
            f"seed {circuit.seed}: {len(circuit.nodes)} nodes, {circuit.edges} edges; loss alone "
            f"{circuit.kept['mean'].loss:.3f}, without them {circuit.removed['mean'].loss:.3f}, as many random ones "
            f"{circuit.random.loss:.3f}, on nonsense labels {circuit.nonsense.loss:.3f} nats"
        )
    if found.graph is not None:
        heaviest = sorted((e for e in found.graph.edges if e[3] is not None), key=lambda e: -abs(e[3] or 0))
        for src, dst, _, weight in heaviest[:5]:
            print(f"{src} → {dst}: {weight:+.2f}")
        print("letters whose action the circuit keeps:", found.closure["letters"] or "none")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
