"""Where the layers of a model are, and the modules that make logits of what the last one leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.decoders.families import decoder_inside

__all__ = ["Blocks", "blocks_of"]

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


@dataclass(frozen=True)
class Blocks:
    """The layers of a language model of transformers.

    Attributes:
        paths: The module path of each layer, whose output is the residual stream after it.
        around: The module path of the module that runs them; empty where it is the model itself.
        norm: The module path of the last norm.
        model: The language model, whose config says how logits are capped or scaled.
        head: The output matrix; None where the model has none.
    """

    paths: tuple[str, ...]
    around: str
    norm: str
    model: Any
    head: Any


def blocks_of(model: nn.Module) -> Blocks | None:
    """Find the layers of a model that :func:`scalpel.hooks.standing.as_analysed` gave; None where they are not known.

    A model of a family that has rules is known by its family. Of other language models of transformers it is enough
    that they have one list of as many layers as their config says, and one last norm beside it.

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
    if not type(model).__module__.startswith("transformers.models."):
        return None
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    places = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList) and len(child) == count]
        norms = [name for name in _NORMS if name in children]
        if len(lists) == len(norms) == 1:
            places.append((path, lists[0], norms[0]))
    if len(places) != 1 or not count:
        return None
    around, name, norm = places[0]
    before = f"{around}." if around else ""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return Blocks(tuple(f"{before}{name}.{i}" for i in range(count)), around, before + norm, model, head)
