"""What a user's decoder may be wrapped in, each with the plain model that it computes the same as."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoder_cases import model_of

# In which modules of the plain models the values of layer 0 and 1 are, written out by hand; ":in" is a module's input.
PLACES: dict[str, dict[str, str]] = {
    "llama": {
        "0.resid_in": "model.layers.0:in",
        "1.attn.q": "model.layers.1.self_attn.q_proj",
        "1.attn.y": "model.layers.1.self_attn.o_proj:in",
        "1.mlp.post_act": "model.layers.1.mlp.down_proj:in",
        "1.mlp.resid_delta": "model.layers.1.mlp.down_proj",
        "1.resid_mid": "model.layers.1.post_attention_layernorm:in",
        "final_resid": "model.norm:in",
        "logits": "lm_head",
    },
    "gpt2": {
        "0.resid_in": "transformer.h.0:in",
        "1.attn.y": "transformer.h.1.attn.c_proj:in",
        "1.mlp.post_act": "transformer.h.1.mlp.c_proj:in",
        "1.mlp.resid_delta": "transformer.h.1.mlp.c_proj",
        "1.resid_mid": "transformer.h.1.ln_2:in",
        "final_resid": "transformer.ln_f:in",
        "logits": "lm_head",
    },
    "gpt_neox": {
        "0.resid_in": "gpt_neox.layers.0:in",
        "1.attn.y": "gpt_neox.layers.1.attention.dense:in",
        "1.mlp.post_act": "gpt_neox.layers.1.mlp.dense_4h_to_h:in",
        "1.mlp.resid_delta": "gpt_neox.layers.1.mlp.dense_4h_to_h",
        "final_resid": "gpt_neox.final_layer_norm:in",
        "logits": "lm_head",
    },
}
for _other in ("mistral", "qwen2", "qwen3"):
    PLACES[_other] = PLACES["llama"]

TRANSFORMER_LENS = {
    "0.resid_in": "blocks.0.hook_resid_pre",
    "1.attn.q": "blocks.1.attn.hook_q",
    "1.attn.y": "blocks.1.attn.hook_z",
    "1.mlp.post_act": "blocks.1.mlp.hook_post",
    "1.mlp.resid_delta": "blocks.1.hook_mlp_out",
    "1.resid_mid": "blocks.1.hook_resid_mid",
    "final_resid": "blocks.2.hook_resid_post",
    "logits": "logits",
}

_ADAPTED = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}

Made = tuple[Any, Any]  # the wrapped model, and a plain one that computes the same


def headless(model: Any) -> Any:
    return model.get_submodule(type(model).base_model_prefix)


def _unchanged(wrap: Callable[[Any], Any]) -> Callable[[str], Made]:
    def make(name: str) -> Made:
        model = model_of(name)
        return wrap(copy.deepcopy(model)), model

    return make


def _lora(
    change: Callable[[Any], Any] = lambda model: model, of: Callable[[Any], Any] = lambda model: model, **options: Any
) -> Callable[[str], Made]:
    def make(name: str) -> Made:
        import peft

        torch.manual_seed(0)
        kinds = {"target_modules": _ADAPTED[name], "init_lora_weights": False, "r": 2} | options
        adapted = peft.get_peft_model(model_of(name), peft.LoraConfig(**kinds)).double().eval()
        with torch.no_grad():  # what is trained beside the adapters is no longer what it was
            for path, parameter in adapted.named_parameters():
                if "modules_to_save.default" in path:
                    parameter.mul_(1.5)
        plain = copy.deepcopy(adapted).merge_and_unload()
        return change(_around(adapted, of)), plain

    return make


def _around(adapted: Any, of: Callable[[Any], Any]) -> Any:
    """Exchange the adapted model by a part of it, or something around it, inside PEFT's wrapper."""
    adapted.base_model.model = of(adapted.base_model.model)
    return adapted


def _switched_off(name: str) -> Made:
    adapted, _ = _lora()(name)
    adapted.base_model.disable_adapter_layers()
    return adapted, model_of(name)


def _merged(adapted: Any) -> Any:
    adapted.merge_adapter()
    return adapted


def _scaled(name: str) -> Made:
    """Another kind of adapter, which multiplies activations."""
    import peft

    mlp = {"llama": "down_proj", "gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}[name]
    config = peft.IA3Config(target_modules=[mlp], feedforward_modules=[mlp], init_ia3_weights=False)
    adapted = peft.get_peft_model(model_of(name), config).double().eval()
    return adapted, copy.deepcopy(adapted).merge_and_unload()


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def _compiled_layer(model: Any) -> Any:
    layers = headless(model)
    layers = layers.h if hasattr(layers, "h") else layers.layers
    layers[1] = _compiled(layers[1])
    return model


def _compiled_part(model: Any) -> Any:
    setattr(model, type(model).base_model_prefix, _compiled(headless(model)))
    return model


def _prepared(model: Any) -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True).prepare(model)


def _dispatched(model: Any) -> Any:
    import accelerate

    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


WRAPPERS: dict[str, Callable[[str], Made]] = {
    "compiled": _unchanged(_compiled),
    "one layer compiled": _unchanged(_compiled_layer),
    "all but the head compiled": _unchanged(_compiled_part),
    "headless": _unchanged(headless),
    "headless and compiled": _unchanged(lambda model: _compiled(headless(model))),
    "DataParallel": _unchanged(nn.DataParallel),
    "DistributedDataParallel": _unchanged(lambda model: nn.parallel.DistributedDataParallel(model.requires_grad_())),
    "DistributedDataParallel of a compiled headless model": _unchanged(
        lambda model: nn.parallel.DistributedDataParallel(_compiled(headless(model).requires_grad_()))
    ),
    "accelerate, prepared": _unchanged(_prepared),
    "accelerate, dispatched": _unchanged(_dispatched),
    "LoRA": _lora(),
    "LoRA, merged": _lora(_merged),
    "LoRA, switched off": _switched_off,
    "LoRA, its tuner alone": _lora(lambda model: model.base_model),
    "LoRA, compiled": _lora(_compiled),
    "LoRA of a compiled model": _lora(of=_compiled),
    "LoRA of a headless model": _lora(of=headless),
    "LoRA, dispatched": _lora(_dispatched),
    "LoRA, in DataParallel": _lora(nn.DataParallel),
    "IA3": _scaled,
}
BY_RULES = {  # those whose decoder has its own weights and modules, so that the rules hold
    "compiled",
    "one layer compiled",
    "all but the head compiled",
    "headless",
    "headless and compiled",
    "DataParallel",
    "DistributedDataParallel",
    "DistributedDataParallel of a compiled headless model",
    "accelerate, prepared",
    "LoRA, merged",
    "LoRA, switched off",
}


def with_saved_norm() -> Made:
    """LoRA beside a norm that is trained as a whole, and that PEFT wraps."""
    return _lora(modules_to_save=["norm"])("llama")


def mapped(model: Any, ids: Tensor, source: str, target: str) -> Callable[[Tensor], Tensor]:
    """The value at one place of a plain model as a function of what is added at another, by forward hooks alone."""

    def value_of(delta: Tensor) -> Tensor:
        held: list[Tensor] = []
        handles = [
            _registered(model, source, lambda value: value + delta),
            _registered(model, target, lambda value: held.append(value)),
        ]
        try:
            with sdpa_kernel(SDPBackend.MATH):
                model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return held[0]

    return value_of


def values_at(model: Any, ids: Tensor, place: str) -> Tensor:
    """The value at a place, by a forward hook."""
    held: list[Tensor] = []
    handle = _registered(model, place, lambda value: held.append(value))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return held[0]


def _registered(model: Any, place: str, act: Callable[[Tensor], Any]) -> Any:
    module = model.get_submodule(place.removesuffix(":in"))
    if not place.endswith(":in"):
        return module.register_forward_hook(lambda _, given, output: act(output))

    def before(_: nn.Module, given: tuple[Any, ...]) -> Any:
        changed = act(given[0])
        return None if changed is None else (changed, *given[1:])

    return module.register_forward_pre_hook(before)
