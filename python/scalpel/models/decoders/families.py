"""Which of transformers' models the Jacobian engine has rules for, and the names of their hooks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.adapters import inside_wrappers, resting_layers
from ...hooks.modules import plain_name, user_hooks
from ...hooks.names import hook_names
from . import gpt2, gpt_neox, llama
from .decoder import Decoder, DecoderConfig, Family, check_head, check_layer
from .inside import DecoderInside

# Activations that work on each entry alone and have no parameters.
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")

FAMILIES: tuple[Any, ...] = (gpt2, gpt_neox, llama)


class ModuleWeights:
    """A module's own parameters, by the names that the class with an output matrix gives them.

    Compiled layers have the names from before compilation, and layers whose adapters rest those from before PEFT.
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self._prefix = prefix
        self._resting = [plain_name(name) for name in resting_layers(model)]
        named = ((self.name(name), tensor) for name, tensor in model.named_parameters(remove_duplicate=False))
        self._tensors = {name: tensor for name, tensor in named if name is not None}
        self._read: set[int] = set()

    def name(self, name: str) -> str | None:
        """Return the name of a tensor from its name in the module; None for a part of an adapter that rests."""
        name = plain_name(name)
        for layer in self._resting:
            if name.startswith(f"{layer}."):
                below = name.removeprefix(f"{layer}.")
                if not below.startswith("base_layer."):
                    return None
                name = f"{layer}.{below.removeprefix('base_layer.')}"
        return self._prefix + name

    def __call__(self, name: str) -> Tensor:
        self._read.add(id(self._tensors[name]))
        return self._tensors[name].detach()

    def unread(self) -> list[str]:
        """List the parameters that have not been read under any of their names."""
        return [name for name, tensor in self._tensors.items() if id(tensor) not in self._read]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self(name)[index]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def family_of(architecture: str) -> Family | None:
    """Return the family of the model class of this name, or None."""
    return next((family for family in FAMILIES if architecture in family.ARCHITECTURES), None)


def supported() -> list[str]:
    """List the names of the model classes that belong to a family."""
    return [name for family in FAMILIES for name in family.ARCHITECTURES]


def decoder_of(model: nn.Module) -> Decoder | None:
    """Return the model as a decoder, or None if a rule could differ from what the model computes."""
    decoder = decoder_or_reason(model)
    return decoder if isinstance(decoder, Decoder) else None


def decoder_or_reason(model: nn.Module) -> Decoder | str:
    """Return the model as a decoder, or a message that says what about it the rules don't cover.

    Only its class, config and weights are looked at: the forward passes are compared elsewhere.
    """
    found = decoder_inside(model)
    if found is None:
        return f"{type(model).__name__} is none of {', '.join(supported())}, and holds none"
    if found.refusal is not None:
        return found.refusal
    family = found.family
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or not {device.type for device in devices} <= {"cpu", "cuda"}:
        return f"the weights are on {', '.join(sorted(map(str, devices)))}; allowed: all on the CPU, or all on one GPU"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16}:
        return "the weights are not all float64, all float32 or all bfloat16"
    hooked = user_hooks(model)
    if hooked:
        return f"there is a hook on {hooked[0][0]}"
    config = config_of(family, found.module.config, found.architecture)
    if isinstance(config, str):
        return config
    weights = ModuleWeights(found.module, f"{family.PREFIX}." if found.headless else "")
    buffers = found.module.named_buffers()
    inverse = next((buffer for name, buffer in buffers if name.endswith("rotary_emb.inv_freq")), None)
    if config.rotary is not None and inverse is not None:
        config = replace(config, rotary=replace(config.rotary, inverse=inverse.detach().float()))
    try:
        for i in range(config.layers):
            check_layer(config, family.layer(weights, i), i)
        check_head(config, *family.final(weights))
        no_ids = torch.zeros(1, 0, dtype=torch.int64, device=next(iter(devices)))
        family.embed(weights, no_ids, no_ids)
    except (KeyError, ValueError) as error:
        return f"its weights are not those that its config describes: {error}"
    # A tensor that no rule reads may be an adapter's that is still zero: comparing forward passes would not show it.
    named = {name: weights.name(name) for name in found.module.state_dict()}
    others = [name for name, ours in named.items() if ours is not None and ours not in weights]
    own = {id(parameter) for parameter in found.module.parameters()}
    around = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
    if unread := [*weights.unread(), *(name for name in others if not passed_over(name, family)), *around]:
        return f"it computes with {unread[0]!r}, which no rule reads"
    return Decoder(family, config, weights, found.headless)


def passed_over(key: str, family: Family | None = None) -> bool:
    """Tell whether a file may hold this tensor although the class has no place for it.

    Args:
        key: The tensor's name.
        family: The family whose file says so, or None if any family's will do.
    """
    families = FAMILIES if family is None else (family,)
    return any(re.fullmatch(pattern, key) for member in families for pattern in member.PASSED_OVER)


def config_of(family: Family, config: Any, architecture: str) -> DecoderConfig | str:
    """Return what the rules need to know, or a message that says what in the config they don't cover."""
    if not getattr(config, "is_causal", True):
        return "the config says is_causal=False, and the rules are those of causal attention"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa", "flash_attention_2", "flex_attention"):
        return (
            f"its attention implementation is {attention!r}, which may not compute the softmax attention of the rules"
        )
    shape = family.read(config, architecture)
    if shape is None:
        return "the config asks for a kind of positions or attention that has no rules"
    if shape.activation not in ACTIVATIONS:
        return f"its activation {shape.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return shape


def marks_of(model: nn.Module) -> tuple[Any, ...]:
    """Collect what a forward pass depends on besides weights and inputs, so that a later change can be noticed.

    That is each module with its numbers and switches, and the config.
    """
    plain = (bool, int, float, str, type(None))
    modules = tuple(
        (
            name,
            id(module),
            type(module),
            tuple((k, v) for k, v in list(vars(module).items()) if isinstance(v, plain) and k != "training"),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    )
    found = decoder_inside(model)
    config: Any = model.config if found is None else found.module.config
    return modules, repr(config.to_dict()), str(getattr(config, "_attn_implementation", None))


# ---- hooks -------------------------------------------------------------------------------------


def decoder_inside(model: nn.Module) -> DecoderInside | None:
    """Find the decoder of a family that a model is, or that it holds inside wrappers; None if there is none.

    Other modules that hold a decoder may do anything with it, and have module paths alone.
    """
    module, path, added = inside_wrappers(model)
    name, refusal = type(module).__name__, None
    if not type(module).__module__.startswith("transformers.models."):
        return None
    if added is not None:
        refusal = (
            f"the model puts {added} before each text, so its values are not those of the text's tokens alone: give "
            "module paths of the model, whose positions may count virtual tokens too, or switch them off with "
            "model.disable_adapter()"
        )
    for family in FAMILIES:
        if name in (*family.ARCHITECTURES, *family.HEADLESS):
            headless = name in family.HEADLESS
            return DecoderInside(family, family.HEADLESS.get(name, name), module, path, headless, refusal)
    return None


def hooks_of(config: DecoderConfig) -> list[str]:
    """List a decoder's hooks in the order of the forward pass, ``"final_resid"`` last."""
    return hook_names(config.layers, config.parallel)


def hooks_of_model(model: nn.Module) -> list[str]:
    """List the hooks of the decoder that a model is or holds, even if the rules don't cover it; empty if none."""
    found = decoder_inside(model)
    return [] if found is None or found.refusal is not None else found.hooks
