"""Llama (Touvron et al. 2023) and the models of the same structure: Mistral, Qwen2, Qwen3.

They have RMSNorm, rotary positions, grouped-query attention and a gated MLP. Qwen2 adds biases to q, k and v; Qwen3
normalises each head of q and k; Mistral and some layers of Qwen models attend in a sliding window.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .decoder import DecoderConfig, DecoderLayer, Dense, NormWeight, Weights, dense_at, norm_at, rotary_of

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
HEADLESS = {
    "LlamaModel": "LlamaForCausalLM",
    "MistralModel": "MistralForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
    "Qwen3Model": "Qwen3ForCausalLM",
}
PATHS = {
    "resid_in": "model.layers.{i}:in",
    "attn.act_in": "model.layers.{i}.input_layernorm",
    "attn.k": "model.layers.{i}.self_attn.k_proj",
    "attn.q": "model.layers.{i}.self_attn.q_proj",
    "attn.v": "model.layers.{i}.self_attn.v_proj",
    "attn.y": "model.layers.{i}.self_attn.o_proj:in",
    "attn.resid_delta": "model.layers.{i}.self_attn",
    "resid_mid": "model.layers.{i}.post_attention_layernorm:in",
    "mlp.act_in": "model.layers.{i}.post_attention_layernorm",
    "mlp.post_act": "model.layers.{i}.mlp.down_proj:in",
    "mlp.resid_delta": "model.layers.{i}.mlp",
    "after": "model.layers.{i}",
    "final_resid": "model.norm:in",
}
PREFIX = "model"
ALSO_NAMED: dict[str, str] = {}
PASSED_OVER = {
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "the rotary angles, which follow from the config",
}


def read(config: Any, architecture: str) -> DecoderConfig | None:
    """Read the config of the families of Llama; None where the model is another one than the rules describe."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = rotary_of(LlamaRotaryEmbedding, config)
    if rotary is None:
        return None
    return DecoderConfig(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        rms=True,
        eps=config.rms_norm_eps,
        activation=config.hidden_act,
        rotary=rotary,
        windows=_windows(config, architecture),
    )


def _windows(config: Any, architecture: str) -> tuple[int | None, ...]:
    """Return the window of each layer; each class reads other fields of the config for it."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if architecture == "LlamaForCausalLM":
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def layer(get: Weights, i: int) -> DecoderLayer:
    """Collect the weights of layer ``i``."""
    path = f"model.layers.{i}"
    attention = f"{path}.self_attn"
    return DecoderLayer(
        norm1=norm_at(get, f"{path}.input_layernorm"),
        norm2=norm_at(get, f"{path}.post_attention_layernorm"),
        qkv=tuple(dense_at(get, f"{attention}.{name}_proj") for name in "qkv"),
        q_norm=get(f"{attention}.q_norm.weight") if f"{attention}.q_norm.weight" in get else None,
        k_norm=get(f"{attention}.k_norm.weight") if f"{attention}.k_norm.weight" in get else None,
        out=dense_at(get, f"{attention}.o_proj"),
        up=(dense_at(get, f"{path}.mlp.gate_proj"), dense_at(get, f"{path}.mlp.up_proj")),
        down=dense_at(get, f"{path}.mlp.down_proj"),
    )


def embed(get: Weights, ids: Tensor, positions: Tensor) -> Tensor:
    """Look up the residual stream (B, L, width) before the first layer."""
    return get.rows("model.embed_tokens.weight", ids)


def final(get: Weights) -> tuple[NormWeight, Dense]:
    """Collect the weights of the last norm and of the output matrix."""
    head = "lm_head.weight" if "lm_head.weight" in get else "model.embed_tokens.weight"
    return norm_at(get, "model.norm"), Dense(get(head))
