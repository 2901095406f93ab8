"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023).

Some channels of each head have rotary positions; attention and MLP read the same residual stream.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .decoder import DecoderConfig, DecoderLayer, Dense, NormWeight, Weights, dense_at, norm_at, rotary_of

ARCHITECTURES = ("GPTNeoXForCausalLM",)
HEADLESS = {"GPTNeoXModel": "GPTNeoXForCausalLM"}
PATHS = {
    "resid_in": "gpt_neox.layers.{i}:in",
    "attn.act_in": "gpt_neox.layers.{i}.input_layernorm",
    "attn.y": "gpt_neox.layers.{i}.attention.dense:in",
    "attn.resid_delta": "gpt_neox.layers.{i}.attention",
    "resid_mid": "gpt_neox.layers.{i}.post_attention_layernorm:in",
    "mlp.act_in": "gpt_neox.layers.{i}.post_attention_layernorm",
    "mlp.post_act": "gpt_neox.layers.{i}.mlp.dense_4h_to_h:in",
    "mlp.resid_delta": "gpt_neox.layers.{i}.mlp",
    "after": "gpt_neox.layers.{i}",
    "final_resid": "gpt_neox.final_layer_norm:in",
}
PREFIX = "gpt_neox"
# Checkpoints call the output matrix embed_out, as the class itself did before transformers 5.
ALSO_NAMED = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
PASSED_OVER = {
    r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)": "the causal mask, and its number for minus infinity",
    r"(gpt_neox\.)?(layers\.\d+\.attention\.)?rotary_emb\.inv_freq": "the rotary angles, which follow from the config",
}


def read(config: Any, architecture: str) -> DecoderConfig | None:
    """Read the config of GPT-NeoX; None where the model is another one than the rules describe."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    rotary = rotary_of(GPTNeoXRotaryEmbedding, config)
    if rotary is None:
        return None
    return DecoderConfig(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        rms=False,
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        rotary=rotary,
        parallel=config.use_parallel_residual,
    )


def layer(get: Weights, i: int) -> DecoderLayer:
    """Collect the weights of layer ``i``."""
    path = f"gpt_neox.layers.{i}"
    return DecoderLayer(
        norm1=norm_at(get, f"{path}.input_layernorm"),
        norm2=norm_at(get, f"{path}.post_attention_layernorm"),
        qkv=(dense_at(get, f"{path}.attention.query_key_value"),),
        by_head=True,
        out=dense_at(get, f"{path}.attention.dense"),
        up=(dense_at(get, f"{path}.mlp.dense_h_to_4h"),),
        down=dense_at(get, f"{path}.mlp.dense_4h_to_h"),
    )


def embed(get: Weights, ids: Tensor, positions: Tensor) -> Tensor:
    """Look up the residual stream (B, L, width) before the first layer."""
    return get.rows("gpt_neox.embed_in.weight", ids)


def final(get: Weights) -> tuple[NormWeight, Dense]:
    """Collect the weights of the last norm and of the output matrix."""
    head = "lm_head.weight" if "lm_head.weight" in get else "embed_out.weight"  # the latter before transformers 5
    head = head if head in get else "gpt_neox.embed_in.weight"
    return norm_at(get, "gpt_neox.final_layer_norm"), Dense(get(head))
