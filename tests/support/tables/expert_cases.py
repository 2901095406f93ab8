"""Tiny mixtures of experts of transformers, whose experts go through grouped products by default."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from decoder_cases import VOCAB

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def _kind(name: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**(_SIZES | changes))
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": _kind("Mixtral", num_local_experts=4),
    "qwen2_moe": _kind(
        "Qwen2Moe",
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": _kind("Qwen3Moe", num_experts=5, moe_intermediate_size=12, norm_topk_prob=True),
    "olmoe": _kind("Olmoe", num_experts=4),
    "gpt_oss, with biases": _kind("GptOss", num_local_experts=4, layer_types=["full_attention", "sliding_attention"]),
}


def experts_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Make a model with weights large enough that its router chooses, and with the default of its experts."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scaled = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.2 * noise
        parameter.copy_(scaled)
    assert model.config._experts_implementation == "grouped_mm"
    return model


def one_by_one(model: Any) -> Any:
    """Return a copy in float64 whose experts transformers computes in a loop of its own, without grouped products."""
    other = copy.deepcopy(model).double()
    other.set_experts_implementation("eager")
    return other
