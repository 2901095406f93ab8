"""Tiny transformers models of every family that has rules, with the configuration switches in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 19


def _llama_like(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        settings: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 12,
            "intermediate_size": 10,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        config = getattr(transformers, f"{name}Config")(**(settings | changes))
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _gpt2(**changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        settings: dict[str, Any] = {"n_layer": 3, "n_head": 3, "n_embd": 12, "vocab_size": VOCAB, "n_positions": 16}
        settings |= {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | changes)))

    return make


def _neox(**changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        settings: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**(settings | changes)))

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2(),
    "gpt2, scores by depth, relu": _gpt2(scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    "gpt2, unusual": _gpt2(
        scale_attn_weights=False,
        layer_norm_epsilon=0.1,
        n_inner=17,
        tie_word_embeddings=False,
        activation_function="gelu",
    ),
    "gpt_neox": _neox(layer_norm_eps=0.01),
    "gpt_neox, in series": _neox(use_parallel_residual=False, attention_bias=False),
    "llama": _llama_like("Llama", tie_word_embeddings=True),
    "llama, one head of k": _llama_like("Llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama, scaled rope": _llama_like(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "llama, yarn": _llama_like(
        "Llama",
        rms_norm_eps=0.1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "mistral": _llama_like("Mistral", sliding_window=3),
    "qwen2": _llama_like(
        "Qwen2",
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": _llama_like("Qwen3"),
}


def model_of(name: str, seed: int = 0) -> Any:
    """Convert the model to float64, with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:  # gains near 1 and biases near 0, all of them different
            parameter.add_(0.3 * noise)
    model.config._attn_implementation = "sdpa"
    return model


def ids_of(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def exact_norms() -> Iterator[None]:
    """Keep float64 inside this context, where transformers' RMSNorm would round every input to float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    kinds: list[Any] = [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm]
    before = [kind.forward for kind in kinds]

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for kind in kinds:
        kind.forward = forward
    try:
        yield
    finally:
        for kind, its in zip(kinds, before, strict=True):
            kind.forward = its
