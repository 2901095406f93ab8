"""The null of a trained model: the same shape and density, and nothing learned."""

from .circuitgpt.model import CircuitGPT
from .sparsity import prune_

__all__ = ["untrained"]


def untrained(model: CircuitGPT) -> CircuitGPT:
    """A fresh model of the same configuration, from the card's seed, each matrix pruned to the same non-zeros."""
    other = CircuitGPT(model.config, seed=int(model.card.get("recipe", {}).get("seed", 0)))
    other.tokenizer = model.tokenizer
    trained = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.dim() == 2:
            nonzero = int(trained[name].count_nonzero())
            prune_(parameter, nonzero / max(1, parameter.numel()), 0)
    return other.eval()
