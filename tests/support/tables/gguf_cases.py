"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis_cases import LETTERS

WIDTH, HEADS, KV_HEADS, LAYERS, NEURONS, VOCAB, CONTEXT = 32, 4, 2, 2, 64, 19, 24
TOKENS = [*LETTERS, "Ġ", "ab", "1", "2", "ĠĠ", "<|end|>"]  # VOCAB tokens in total

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(LAYERS) for ours, theirs in _LAYER.items()
}


def llama(seed: int = 0, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": False,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def by_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k as ggml does: channel c beside channel c + half of its head."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape))


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors that the file of ``model`` holds, in float32."""
    found = {}
    for name, tensor in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            array = by_pairs(array, HEADS if stem.endswith("q_proj") else KV_HEADS)
        found[f"{NAMES[stem]}.{end}"] = array
    return found


FACTS: dict[str, Any] = {
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "feed_forward_length": NEURONS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-3,
    "rope.dimension_count": WIDTH // HEADS,
    "rope.freq_base": 500.0,
    "vocab_size": VOCAB,
}


def write(
    path: Path,
    tensors: dict[str, Any],
    facts: dict[str, Any] | None = None,
    kinds: dict[str, Any] | None = None,
    cut: str | None = "smollm",
    tokens: bool = True,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file of ``tensors``.

    ``facts`` are metadata beyond FACTS; a value of None removes one. ``kinds`` gives the types of tensors that are
    bytes.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    for key, value in (FACTS | (facts or {})).items():
        name = key if key.startswith("split.") else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        if cut is not None:
            writer.add_tokenizer_pre(cut)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
        writer.add_token_merges(["a b", "Ġ Ġ"])
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- other architectures -------------------------------------------------------------------------

_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"} | {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
_NORMS_OF_HEADS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def _drawn(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def gpt2(path: Path) -> Any:
    """A GPT-2 with transformers' default context (its reader accepts no other), and its file at ``path``."""
    import transformers

    sizes = {"n_layer": LAYERS, "n_head": 2, "n_embd": 8, "vocab_size": VOCAB, "n_positions": 1024}
    model = _drawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    names |= {f"transformer.h.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(LAYERS) for ours, theirs in _GPT2.items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        turned = ".c_" in stem and end == "weight"
        if stem in names:
            tensors[f"{names[stem]}.{end}"] = np.ascontiguousarray(tensor.numpy().T if turned else tensor.numpy())
    facts: dict[str, Any] = dict.fromkeys(FACTS)
    facts |= {"context_length": 1024, "embedding_length": 8, "block_count": LAYERS, "feed_forward_length": 32}
    facts |= {"attention.head_count": 2, "attention.layer_norm_epsilon": 1e-5}
    write(path, tensors, facts, architecture="gpt2", cut="gpt-2")
    return model


def qwen(path: Path, version: int, **facts: Any) -> Any:
    """A Qwen2 or Qwen3, and its file at ``path``."""
    import transformers

    name, head_dim = f"Qwen{version}", 128 if version == 3 else WIDTH // HEADS
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "head_dim": head_dim,
    }
    model = _drawn(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)))
    tensors = {}
    names = NAMES | {
        f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}"
        for i in range(LAYERS)
        for ours, theirs in _NORMS_OF_HEADS.items()
    }
    for key, tensor in model.state_dict().items():
        stem, _, end = key.rpartition(".")
        tensors[f"{names[stem]}.{end}"] = tensor.numpy()  # q and k are not reordered
    metadata = {"rope.dimension_count": None, "vocab_size": None}
    if version == 3:
        metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    write(path, tensors, metadata | facts, architecture=name.lower(), cut="qwen2")
    return model
