"""Which transformers models are dense decoders that the Jacobian engine knows, and what their hooks are called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import gpt2, gpt_neox, llama
from .decoder import Decoder, DecoderConfig, Family

FAMILIES: tuple[Any, ...] = (gpt2, gpt_neox, llama)

_IN_ATTENTION = ("attn.act_in", "attn.k", "attn.q", "attn.v", "attn.y", "attn.resid_delta")
_IN_LAYER = ("resid_in", *_IN_ATTENTION, "resid_mid", "mlp.act_in", "mlp.post_act", "mlp.resid_delta")

# TransformerLens's names of the same values. Its q, k, v and z have an axis for the heads; ours are flat.
_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_in",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "after",
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.y",
    "hook_attn_out": "attn.resid_delta",
    "mlp.hook_post": "mlp.post_act",
    "hook_mlp_out": "mlp.resid_delta",
}


class ModuleWeights:
    """A module's own parameters by name."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False))

    def __call__(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self(name)[index]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def family_of(architecture: str) -> Family | None:
    """By the name of the model's class."""
    return next((family for family in FAMILIES if architecture in family.ARCHITECTURES), None)


def supported() -> list[str]:
    """The model classes that have a family."""
    return [name for family in FAMILIES for name in family.ARCHITECTURES]


def decoder_of(model: nn.Module) -> Decoder | None:
    """``model`` as a decoder on the CPU; None where a rule could differ from what the model computes.

    That is another class, a config that no family reads, modules that aren't transformers' own (adapters,
    quantised ones), hooks on any of them, or a dtype other than float64, float32 and bfloat16.
    """
    family = family_of(type(model).__name__)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        return None
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16}:
        return None
    if any(parameter.device.type != "cpu" for parameter in model.parameters()) or not _plain(model):
        return None
    config = family.read(model.config)
    return None if config is None else Decoder(family, config, ModuleWeights(model))


def _plain(model: nn.Module) -> bool:
    home = type(model).__module__
    for module in model.modules():
        kind = type(module)
        own = kind.__module__ in (home, "transformers.activations", "transformers.pytorch_utils")
        if not own and not kind.__module__.startswith("torch.nn.modules."):
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    return True


# ---- names -------------------------------------------------------------------------------------


def hooks_of(config: DecoderConfig) -> list[str]:
    """Our hooks in the order of the forward pass, ``final_resid`` last."""
    names = [name for name in _IN_LAYER if not (config.parallel and name == "resid_mid")]
    return [f"{i}.{name}" for i in range(config.layers) for name in names] + ["final_resid"]


def _aliases(paths_of: dict[str, str], hooks: list[str], as_source: bool) -> Iterator[tuple[str, str]]:
    """(another name, our hook)."""
    ours, layers = set(hooks), 1 + int(hooks[-2].partition(".")[0]) if len(hooks) > 1 else 0
    for i in range(layers):
        following = f"{i + 1}.resid_in" if i + 1 < layers else "final_resid"
        named = [(f"blocks.{i}.{name}", hook) for name, hook in _TRANSFORMER_LENS.items()]
        paths = ((hook, path) for hook, path in paths_of.items() if hook != "final_resid")
        # The input of the second norm has resid_mid's value, but a change there leaves the residual stream as it is.
        named += [(path.format(i=i), hook) for hook, path in paths if not (as_source and hook == "resid_mid")]
        for name, hook in named:
            whole = following if hook == "after" else f"{i}.{hook}"
            if whole in ours:
                yield name, whole
    yield paths_of["final_resid"], "final_resid"


def hook_named(name: str, paths: dict[str, str], hooks: list[str], as_source: bool) -> str | None:
    """The hook that ``name`` is: our own name, TransformerLens's or a module path; None where it is none.

    ``paths``: hook → module path, as a family lists them; ``hooks``: ours, in order, ``final_resid`` last.
    """
    return name if name in hooks else dict(_aliases(paths, hooks, as_source)).get(name)


def our_hook(name: str, family: Family, config: DecoderConfig, as_source: bool = False) -> str | None:
    """:func:`hook_named` of a decoder."""
    return hook_named(name, family.PATHS, hooks_of(config), as_source)


def module_path(name: str, family: Family, config: DecoderConfig, as_source: bool = False) -> str:
    """The module path of a hook by any name; ``name`` itself where it has none."""
    hook = our_hook(name, family, config, as_source)
    if hook is None or (as_source and hook.endswith(".resid_mid")):
        return name
    layer = re.fullmatch(r"(\d+)\.(.*)", hook)
    path = family.PATHS.get(layer[2] if layer else hook)
    return name if path is None else path.format(i=layer[1] if layer else "")
