"""Untrained models of the same shape and density as a trained one, to compare it with."""

from .circuitgpt.model import CircuitGPT
from .sparsity import prune_

__all__ = ["untrained"]


def untrained(model: CircuitGPT) -> CircuitGPT:
    """Make an untrained model of the same configuration, with as many non-zeros in each matrix.

    Its weights are drawn from the seed in the model's card, or from seed 0 if the card has none.
    """
    twin = CircuitGPT(model.config, seed=int(model.card.get("recipe", {}).get("seed", 0)))
    twin.tokenizer = model.tokenizer
    trained = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.dim() == 2:
            nonzero = int(trained[name].count_nonzero())
            prune_(parameter, nonzero / max(1, parameter.numel()), 0)
    return twin.eval()
