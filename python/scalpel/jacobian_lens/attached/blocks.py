"""Where the layers of a model are, and the modules that make logits of what the last one leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.decoders.families import decoder_inside
from ..sweeps.hooks import blocks_in

__all__ = ["Blocks", "blocks_of"]

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


@dataclass(frozen=True)
class Blocks:
    """The layers of a model that is no CircuitGPT.

    Attributes:
        paths: The module path of each layer, whose output is the residual stream after it.
        around: The module path of the module that runs them; empty where it is the model itself.
        norm: The module path of the last norm; None where it isn't known.
        model: The model with the config that says how logits are capped or scaled.
        head: The output matrix; None where the model has none.
    """

    paths: tuple[str, ...]
    around: str
    norm: str | None
    model: Any
    head: Any


def blocks_of(model: nn.Module) -> Blocks | None:
    """Find the layers of a model that :func:`scalpel.hooks.standing.as_analysed` gave; None where they are not known.

    A model of a family that has rules is known by its family. In others the layers are the blocks that
    :func:`scalpel.jacobian_lens.sweeps.hooks.blocks_in` finds, and in another language model of transformers the last
    norm is the one beside them.

    Raises:
        ValueError: The model puts virtual tokens before each text.
    """
    found = decoder_inside(model)
    if found is not None:
        if found.refusal is not None:
            raise ValueError(found.refusal)
        paths, layers = found.paths, int(found.module.config.num_hidden_layers)
        norm = paths["final_resid"].removesuffix(":in")
        head = None if found.headless else found.module.get_output_embeddings()
        blocks = tuple(paths["after"].format(i=i) for i in range(layers))
        return Blocks(blocks, norm.rpartition(".")[0], norm, found.module, head)
    try:
        listed = blocks_in(model)
    except ValueError:
        return None
    around = listed[0].rpartition(".")[0].rpartition(".")[0]
    children = dict(model.get_submodule(around).named_children())
    norms = [name for name in _NORMS if name in children]
    before = f"{around}." if around else ""
    ours = type(model).__module__.startswith("transformers.models.") and len(norms) == 1
    head = getattr(model, "get_output_embeddings", lambda: None)() if ours else None
    return Blocks(tuple(listed), around, before + norms[0] if ours else None, model, head)
