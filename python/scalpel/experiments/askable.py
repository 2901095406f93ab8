"""What every experiment needs of a model before it asks anything."""

from typing import Any

import torch

from ..models.circuitgpt.model import CircuitGPT
from ..tasks.refused import Refused

__all__ = ["check_askable"]

_TOKENS = 16  # of the text that the model is tried on


@torch.no_grad()
def check_askable(model: Any) -> None:
    """TypeError or ValueError for what is no CircuitGPT on the CPU; Refused for one that has nothing to say.

    That is one without a layer, one whose tokenizer knows more tokens than it does, and one whose logits aren't finite.
    """
    if not isinstance(model, CircuitGPT):
        raise TypeError(f"model is {type(model).__name__}; experiments take a CircuitGPT, or what it is loaded from")
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}; experiments take models on the CPU: model.cpu()")
    config = model.config
    if config.n_layer == 0:
        raise Refused("the model has no layer: there is nothing in it to ask about")
    if model.tokenizer is not None and model.tokenizer.vocab_size > config.vocab_size:
        raise Refused(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens and the model knows {config.vocab_size}: give it "
            "the tokenizer that it was trained with"
        )
    logits = model(torch.arange(min(_TOKENS, config.block_size, config.vocab_size), device="cpu")[None])
    if not bool(logits.isfinite().all()):
        raise Refused("the model's logits aren't finite; its weights hold NaN or infinities, or too large numbers")
