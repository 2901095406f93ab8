"""What a model is wrapped in, and what PEFT puts in place of its layers, told by the names of PEFT's classes.

PEFT itself is never imported: a model that has adapters has imported it.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn

from .modules import wrapped_at

__all__ = ["Wrapped", "adapters_mark", "check_unadapted", "inside_wrappers", "resting_layers", "without_cache"]


class Wrapped(NamedTuple):
    """The module inside a model's wrappers; the model itself where it has none.

    Attributes:
        module: The module.
        path: Its module path in the model, without the steps of ``torch.compile``.
        added: What a wrapper puts before each text, or None.
    """

    module: Any
    path: str
    added: str | None


def inside_wrappers(model: nn.Module) -> Wrapped:
    """Find the module inside the wrappers of ``torch.compile``, of data parallelism and of PEFT.

    Each runs what it wraps once in a forward pass, so that the hooks inside mean the same with the wrapper.
    """
    inner: Any = model
    steps: list[str] = []
    added = None
    while (step := wrapped_at(inner) or _adapted_at(inner)) is not None and inner._modules.get(step) is not None:
        added = added or _virtual_tokens(inner)
        steps += [] if step == "_orig_mod" else [step]
        inner = inner._modules[step]
    return Wrapped(inner, ".".join(steps), added)


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the keywords that keep a language model from making a cache of keys, which would outlive a pass.

    They are empty for a model that takes none, as far as it or the model inside its wrappers says.
    """
    models = (model, inside_wrappers(model).module)
    takes = any("use_cache" in inspect.signature(each.forward).parameters for each in models)
    return {"use_cache": False} if takes else {}


def _adapted_at(model: Any) -> str | None:
    """Return the name under which a model of PEFT holds the model that it adapts; None for any other module."""
    kinds = _kinds(model)
    if kinds & {"PeftModel", "PeftMixedModel"}:
        return "base_model"
    return "model" if "BaseTuner" in kinds else None


def _virtual_tokens(model: Any) -> str | None:
    """Say how many tokens of its own a model of PEFT puts before a text, as prompt and prefix tuning do.

    Returns None where there are none, or where they are switched off.
    """
    configs = getattr(model, "peft_config", None)
    if "PeftModel" not in _kinds(model) or not isinstance(configs, dict) or getattr(model, "_adapters_disabled", False):
        return None
    config: Any = configs.get(model.active_adapter)
    if not getattr(config, "is_prompt_learning", False):
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    return f"{config.num_virtual_tokens} virtual tokens ({kind})"


def resting_layers(model: nn.Module) -> list[str]:
    """List the names of the layers that compute with the weights below their ``base_layer`` alone.

    Their adapters are merged into these weights, or are switched off.
    """
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if "BaseTunerLayer" in _kinds(module)
        and "base_layer" in module._modules
        and bool(module.merged) != bool(module.disable_adapters)
    ]


def check_unadapted(model: nn.Module, consequence: str, kind: type[ValueError] = ValueError) -> None:
    """Raise ``kind`` where a layer computes with an adapter beside its own weight, so that the weight says too little.

    ``consequence`` ends the sentence that begins with what was found.
    """
    for name, module in model.named_modules():
        if "base_layer" in module._modules:
            raise kind(
                f"the module {name!r} is an adapter around the model's own layer, and {consequence}: merge the adapter "
                "first, with PEFT's merge_and_unload"
            )


def adapters_mark(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return which adapters each layer of PEFT computes with, so that a later switch can be noticed."""
    names = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return [
        tuple(_copied(getattr(module, name, None)) for name in names)
        for module in model.modules()
        if _kinds(module) & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}
    ]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: entry for key, entry in value.items() if isinstance(entry, (int, float))}
    return list(value) if isinstance(value, (list, tuple)) else value


def _kinds(module: Any) -> set[str]:
    """The names of the classes of PEFT that a module is an instance of."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "peft"}
