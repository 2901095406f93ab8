"""Lenses of random matrices for the tiny models of the other tables, and where those models' states are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import scalpel
from analysis_cases import letters
from circuitgpt_cases import build
from decoder_cases import model_of

KINDS = ("gpt2", "llama", "gpt_neox", "circuit")


def lens_model(kind: str) -> Any:
    """A model in float64, "circuit" for a CircuitGPT of two layers."""
    model = build("bigram_buffer", torch.float64) if kind == "circuit" else model_of(kind)
    if kind == "circuit":
        generator = torch.Generator().manual_seed(3)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.requires_grad_(False).add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def width_of(model: Any) -> int:
    return int(model.config.d_model if hasattr(model.config, "d_model") else model.config.hidden_size)


def layers_of(model: Any) -> int:
    return int(model.config.n_layer if hasattr(model.config, "d_model") else model.config.num_hidden_layers)


def random_lens(model: Any, seed: int = 0, count: int | None = None, **options: Any) -> scalpel.JacobianLens:
    """A lens of all layers but the last, attached to the model with a tokenizer of letters."""
    generator, width = torch.Generator().manual_seed(seed), width_of(model)
    layers = layers_of(model) - 1 if count is None else count
    J = {layer: torch.eye(width) + torch.randn(width, width, generator=generator) / 3 for layer in range(layers)}
    return scalpel.JacobianLens(J, 4, **options).attach(model, letters(13))


def states_of(model: Any, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """What each layer leaves, (B, S, width), by the model's own means."""
    if hasattr(model, "run_with_cache"):
        hooks = [*(f"{i}.resid_in" for i in range(1, layers_of(model))), "final_resid"]
        return list(model.run_with_cache(ids, hooks, **inputs)[1].values())
    kept: list[Tensor] = []

    def keep(module: Any, given: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        model(input_ids=ids, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def blocks_of(model: Any) -> Any:
    if hasattr(model, "transformer"):
        return model.transformer.h
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers


def logits_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    output = model(ids, **inputs)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def by_hand(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The last norm and the output matrix, written out, on residual streams (S, width)."""
    weights = model.state_dict()
    names = {
        "transformer.wte.weight": ("transformer.ln_f", "lm_head.weight"),
        "model.embed_tokens.weight": ("model.norm", "lm_head.weight"),
        "gpt_neox.embed_in.weight": ("gpt_neox.final_layer_norm", "lm_head.weight"),
    }
    norm, head = next(found for name, found in names.items() if name in weights)
    if norm == "model.norm":  # transformers rounds the input of an RMSNorm to float32
        rounded = x.float()
        scale = torch.rsqrt(rounded.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        x = weights[f"{norm}.weight"] * (rounded * scale).to(x.dtype)
    else:
        eps = getattr(model.config, "layer_norm_epsilon", getattr(model.config, "layer_norm_eps", 1e-5))
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        x = x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    logits = x @ weights[head].T
    if "final_logits_bias" in weights:
        logits = logits + weights["final_logits_bias"] + weights["bigram_table"][ids]
    return logits
