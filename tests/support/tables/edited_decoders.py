"""Edits of transformers models, after which a model may no longer compute what its family's rules compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _register_attention(model: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def halved(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        weights = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scaling / 2).softmax(-1)
        return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("halved", halved)
    model.config._attn_implementation = "halved"


def another_head(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


def biased_head(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(19, dtype=torch.float64))


def _another_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.LayerNorm(12).double()


def _another_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def _one_more_layer(model: Any) -> None:
    layer = copy.deepcopy(model.transformer.h[1])
    layer.attn.layer_idx = 3
    model.transformer.h.append(layer)
    model.config.use_cache = False  # transformers' cache takes its number of layers from the config


EDITS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "an activation": ("llama", _another_activation),
    "a norm": ("llama", _another_norm),
    "a head": ("gpt2", another_head),
    "a head's bias": ("llama", biased_head),
    "the scale of scores": ("gpt2", lambda m: setattr(m.transformer.h[1].attn, "scaling", 2.0)),
    "a norm's eps": ("llama", lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 1.0)),
    "the config's eps": ("gpt2", lambda m: setattr(m.config, "layer_norm_epsilon", 1.0)),
    "a branch's place": ("gpt_neox", lambda m: setattr(m.gpt_neox.layers[0], "use_parallel_residual", False)),
    "a dropout": ("gpt_neox", lambda m: setattr(m.gpt_neox.layers[0], "post_mlp_dropout", nn.Tanh())),
    "one more layer": ("gpt2", _one_more_layer),
    "one layer less": ("gpt2", lambda m: m.transformer.h.__delitem__(2)),
    "rotary frequencies": ("llama", lambda m: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "causality": ("llama", lambda m: setattr(m.config, "is_causal", False)),
    "the attention": ("llama", _register_attention),
    "a window that Llama ignores": ("llama", lambda m: setattr(m.config, "sliding_window", 2)),
    "layer types that Mistral ignores": ("mistral", lambda m: setattr(m.config, "layer_types", ["full_attention"] * 3)),
}
