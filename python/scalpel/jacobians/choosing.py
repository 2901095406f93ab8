"""Which forward pass a model gets: that of a CircuitGPT, of a decoder with rules, or of any module."""

from typing import Any

import torch
from torch import nn

from ..hooks.standing import as_analysed, as_named
from ..models.circuitgpt.model import CircuitGPT
from .module_pass import ModulePass
from .passes import CircuitPass, Pass
from .precision import no_autocast
from .rows.decoder_pass import DecoderPass, decoder_pass, module_paths

__all__ = ["pass_between"]


def pass_between(
    model: nn.Module, input_ids: Any, beside: dict[str, Any], source: str, target: str, precision: str | None = None
) -> Pass:
    """Make a pass from ``source`` to ``target``, of the kind that has rules for the model where there is one.

    ``beside``: attention_mask and position_ids, None where they are not given.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a CircuitGPT or another torch.nn.Module")
    source, target = as_named(model, source), as_named(model, target)
    model = as_analysed(model)
    needs = f"precision={precision!r} needs the rules of a transformers model, and "
    if isinstance(model, CircuitGPT):
        if precision is not None:
            raise ValueError(f"{needs}a CircuitGPT has none of that precision")
        return CircuitPass(model, input_ids, beside["attention_mask"], beside["position_ids"], source, target)
    with torch.no_grad(), no_autocast():
        decoder = decoder_pass(model, input_ids, beside, source, target, precision)
    if isinstance(decoder, DecoderPass):
        return decoder
    if precision is not None:
        raise ValueError(f"{needs}{decoder}")
    keywords = {name: value for name, value in beside.items() if value is not None}
    return ModulePass(model, input_ids, keywords, *module_paths(model, source, target, decoder))
