"""Which transformers models are dense decoders that the Jacobian engine knows, and what their hooks are called."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.modules import plain_name, user_hooks
from ...hooks.names import hook_names
from . import gpt2, gpt_neox, llama
from .decoder import Decoder, DecoderConfig, Family, check_head, check_layer

# Elementwise and without parameters of their own.
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")

FAMILIES: tuple[Any, ...] = (gpt2, gpt_neox, llama)


class ModuleWeights:
    """A module's own parameters by name; those of compiled layers by the names that they had before."""

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self._tensors = {plain_name(name): tensor for name, tensor in named}
        self._read: set[int] = set()

    def __call__(self, name: str) -> Tensor:
        self._read.add(id(self._tensors[name]))
        return self._tensors[name].detach()

    def unread(self) -> list[str]:
        """The parameters that nobody has asked for, under this name or another of theirs."""
        return [name for name, tensor in self._tensors.items() if id(tensor) not in self._read]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self(name)[index]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def family_of(architecture: str) -> Family | None:
    """By the name of the model's class."""
    return next((family for family in FAMILIES if architecture in family.ARCHITECTURES), None)


def family_of_model(model: nn.Module) -> Family | None:
    """The same, of transformers' own classes."""
    return family_of(type(model).__name__) if type(model).__module__.startswith("transformers.models.") else None


def supported() -> list[str]:
    """The model classes that have a family."""
    return [name for family in FAMILIES for name in family.ARCHITECTURES]


def decoder_of(model: nn.Module) -> Decoder | None:
    """``model`` as a decoder; None where a rule could differ from what the model computes."""
    found = decoder_or_reason(model)
    return found if isinstance(found, Decoder) else None


def decoder_or_reason(model: nn.Module) -> Decoder | str:
    """``model`` as a decoder, or what it is that the rules don't cover. Its forward pass is not compared here."""
    family = family_of_model(model)
    if family is None:
        return f"{type(model).__name__} is none of {', '.join(supported())}"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or not {device.type for device in devices} <= {"cpu", "cuda"}:
        return f"the weights are on {', '.join(sorted(map(str, devices)))}: allowed are the CPU, or one GPU"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16}:
        return "the weights are not all float64, all float32 or all bfloat16"
    hooked = user_hooks(model)
    if hooked:
        return f"there is a hook on {hooked[0][0]}"
    config = config_of(family, model.config, type(model).__name__)
    if isinstance(config, str):
        return config
    weights = ModuleWeights(model)
    rotary = next((each for name, each in model.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    if config.rotary is not None and rotary is not None:
        config = replace(config, rotary=replace(config.rotary, inverse=rotary.detach().float()))
    try:
        for i in range(config.layers):
            check_layer(config, family.layer(weights, i), i)
        check_head(config, *family.final(weights))
        nothing = torch.zeros(1, 0, dtype=torch.int64, device=next(iter(devices)))
        family.embed(weights, nothing, nothing)
    except (KeyError, ValueError) as error:
        return f"its weights are not those of its config: {error}"
    # An adapter, say, whose part begins at zero: it changes nothing yet, and may tomorrow.
    buffers = [name for name in model.state_dict() if name not in weights and not _passed_over(name, family)]
    if unread := [*weights.unread(), *(name for name in map(plain_name, buffers) if name not in weights)]:
        return f"it computes with {unread[0]!r}, which no rule reads"
    return Decoder(family, config, weights)


def _passed_over(name: str, family: Family) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.PASSED_OVER)


def config_of(family: Family, config: Any, architecture: str) -> DecoderConfig | str:
    """What the rules need to know, or what the config asks for that they don't cover."""
    if not getattr(config, "is_causal", True):
        return "the config says is_causal=False, and the rules are those of causal attention"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa", "flash_attention_2", "flex_attention"):
        return f"its attention is {attention!r}, and the rules are those of softmax attention"
    shape = family.read(config, architecture)
    if shape is None:
        return "the config asks for positions or an attention that have no rules"
    if shape.activation not in ACTIVATIONS:
        return f"its activation {shape.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return shape


def marks_of(model: nn.Module) -> tuple[Any, ...]:
    """What a forward pass depends on besides weights and inputs: modules, their numbers and switches, the config."""
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
    config: Any = model.config
    return modules, repr(config.to_dict()), str(getattr(config, "_attn_implementation", None))


# ---- hooks -------------------------------------------------------------------------------------


def hooks_of(config: DecoderConfig) -> list[str]:
    """List a decoder's hooks in the order of the forward pass, ``"final_resid"`` last."""
    return hook_names(config.layers, config.parallel)


def hooks_of_model(model: nn.Module) -> list[str]:
    """List the same hooks from transformers' config, whether or not there are rules; empty for another model."""
    if family_of_model(model) is None:
        return []
    config: Any = model.config
    return hook_names(config.num_hidden_layers, getattr(config, "use_parallel_residual", False))
