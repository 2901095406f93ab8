"""What every experiment requires of a model."""

from typing import Any

import torch

from ..models.circuitgpt.model import CircuitGPT
from ..tasks.refused import Refused

__all__ = ["check_askable"]

_TOKENS = 16  # length of the text on which the model is tried


@torch.no_grad()
def check_askable(model: Any) -> None:
    """Raise an error unless experiments can be run on a model.

    Raises:
        TypeError: It is not a CircuitGPT.
        ValueError: It is not on the CPU.
        Refused: It has no layer, its tokenizer has more tokens than the model, or its logits aren't finite.
    """
    if not isinstance(model, CircuitGPT):
        raise TypeError(
            f"model is {type(model).__name__}; experiments take a CircuitGPT, or a name or folder to load one from"
        )
    if model.device.type != "cpu":
        raise ValueError(f"the model is on {model.device}; experiments take models on the CPU: model.cpu()")
    config = model.config
    if config.n_layer == 0:
        raise Refused("the model has no layer, so there is nothing in it to examine")
    if model.tokenizer is not None and model.tokenizer.vocab_size > config.vocab_size:
        raise Refused(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens and the model knows {config.vocab_size}: give it "
            "the tokenizer that it was trained with"
        )
    logits = model(torch.arange(min(_TOKENS, config.block_size, config.vocab_size), device="cpu")[None])
    if not bool(logits.isfinite().all()):
        raise Refused("the model's logits aren't finite: its weights are NaN, infinite or too large")
