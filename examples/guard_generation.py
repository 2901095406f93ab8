"""Guard a generation: ``python examples/guard_generation.py``.

In a long list, the shipped model forgets that two brackets are open. A law predicts the length from which it does; the
guard says how far away that is, and stops the generation there. ``model.generate`` of a transformers model takes the
same guard as ``logits_processor=[guard]``.
"""

import numpy as np
import torch

import scalpel
from scalpel.experiments.brackets.critical import ask_long_lists, critical
from scalpel.guard import HoleReached
from scalpel.semigroup import ThresholdCounter

CLOSERS = ("]\n", "]]\n", "]]]\n")


def main(prompts: int = 32) -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    start = model.tokenizer.token_to_id("<s>")

    # The law says that two "[" in n tokens are enough while 2/n > θ. θ comes from the measured critical length.
    measured = critical(ask_long_lists(model, 2, prompts=prompts, length=448, seed=0), np.random.default_rng(0))
    print(f"two brackets are enough up to {measured.text()} tokens")
    guard = scalpel.HoleGuard(model, ThresholdCounter(2 / measured.value), on_failure="stop")

    for elements in (4, 36, 60):
        prompt = "x = [[" + ", ".join(str(i % 10) for i in range(elements))
        print(f"{elements} elements, {guard.distance(prompt)}")
        ids = torch.tensor([[start, *model.tokenizer.encode(prompt)]])
        alone = model.generate(ids, 60, stop=CLOSERS)[0, ids.shape[1] :]
        print(f"   alone:   …{model.tokenizer.decode(alone)!r}")
        try:
            guarded = model.generate(ids, 60, stop=CLOSERS, processors=[guard])[0, ids.shape[1] :]
            print(f"   guarded: …{model.tokenizer.decode(guarded)!r}")
        except HoleReached as reached:
            print(f"   guarded: stopped, {reached}")


if __name__ == "__main__":
    main()
