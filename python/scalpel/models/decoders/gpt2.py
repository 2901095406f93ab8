"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one matrix for q, k and v; matrices stored (in, out)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .decoder import DecoderConfig, DecoderLayer, Dense, NormWeight, Weights, norm_at

ARCHITECTURES = ("GPT2LMHeadModel",)
HEADLESS = {"GPT2Model": "GPT2LMHeadModel"}
PATHS = {
    "resid_in": "transformer.h.{i}:in",
    "attn.act_in": "transformer.h.{i}.ln_1",
    "attn.y": "transformer.h.{i}.attn.c_proj:in",
    "attn.resid_delta": "transformer.h.{i}.attn",
    "resid_mid": "transformer.h.{i}.ln_2:in",
    "mlp.act_in": "transformer.h.{i}.ln_2",
    "mlp.post_act": "transformer.h.{i}.mlp.c_proj:in",
    "mlp.resid_delta": "transformer.h.{i}.mlp",
    "after": "transformer.h.{i}",
    "final_resid": "transformer.ln_f:in",
}
PREFIX = "transformer"  # the names in the public checkpoints lack it
ALSO_NAMED: dict[str, str] = {}
PASSED_OVER = {
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)": "the causal mask, and its number for minus infinity",
}


def read(config: Any, architecture: str) -> DecoderConfig | None:
    """Read the config of GPT-2; None where the model is another one than the rules describe."""
    if config.add_cross_attention:
        return None
    head_dim = config.n_embd // config.n_head
    scale = float(head_dim**-0.5) if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return DecoderConfig(
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_length=config.n_positions,
        rms=False,
        eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(config.n_layer)),
    )


def _transposed(get: Weights, name: str) -> Dense:
    return Dense(get(f"{name}.weight").T, get(f"{name}.bias"))


def layer(get: Weights, i: int) -> DecoderLayer:
    """Collect the weights of layer ``i``."""
    path = f"transformer.h.{i}"
    return DecoderLayer(
        norm1=norm_at(get, f"{path}.ln_1"),
        norm2=norm_at(get, f"{path}.ln_2"),
        qkv=(_transposed(get, f"{path}.attn.c_attn"),),
        out=_transposed(get, f"{path}.attn.c_proj"),
        up=(_transposed(get, f"{path}.mlp.c_fc"),),
        down=_transposed(get, f"{path}.mlp.c_proj"),
    )


def embed(get: Weights, ids: Tensor, positions: Tensor) -> Tensor:
    """Look up the residual stream (B, L, width) before the first layer."""
    return get.rows("transformer.wte.weight", ids) + get.rows("transformer.wpe.weight", positions)


def final(get: Weights) -> tuple[NormWeight, Dense]:
    """Collect the weights of the last norm and of the output matrix."""
    head = "lm_head.weight" if "lm_head.weight" in get else "transformer.wte.weight"
    return norm_at(get, "transformer.ln_f"), Dense(get(head))
