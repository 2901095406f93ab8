"""A table of tiny configurations that covers every variant that a public checkpoint can have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from scalpel.models.circuitgpt.config import ABS_TOPK_LOCATIONS, CircuitGPTConfig
from scalpel.models.circuitgpt.model import CircuitGPT

BASE: dict[str, Any] = {
    "block_size": 12,
    "vocab_size": 13,
    "n_layer": 2,
    "n_head": 3,
    "d_model": 12,
    "d_mlp": 20,
    "tied_unembed": False,
}
ALL_LOCATIONS = ",".join(ABS_TOPK_LOCATIONS)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied_unembed": True},
    "no_bias": {"bias": False},
    "layer_norm_without_bias": {"ln_bias": False},
    "rms_norm": {"rms_norm": True},
    "relu": {"activation_type": "relu"},
    "relu_residual": {"residual_activation_type": "relu"},
    "wide_heads": {"d_head": 7},
    "narrow_heads": {"n_head": 2, "d_head": 3},
    "sink": {"sink": True},
    "bigram_buffer": {"enable_bigram_table": True},
    "bigram_learnable": {"enable_bigram_table": True, "learnable_bigram_table": True},
    "positions_concatenated": {"d_pos_emb": 5},
    "positions_concatenated_rms": {
        "d_pos_emb": 4,
        "rms_norm": True,
        "afrac": 0.25,
        "afrac_loctypes": "attn_in,mlp_in",
    },
    "sinusoids_even": {"d_pos_emb": 6, "sinusoidal_cat_pos_emb": True},
    "sinusoids_odd": {"d_pos_emb": 5, "sinusoidal_cat_pos_emb": True},
    "sinusoids_one": {"d_pos_emb": 1, "sinusoidal_cat_pos_emb": True},
    "one_layer": {"n_layer": 1},
    "no_layer": {"n_layer": 0},
    "afrac_0": {"afrac": 0.0, "afrac_loctypes": "attn_v,mlp_neuron"},
    "afrac_1": {"afrac": 1.0, "afrac_loctypes": ALL_LOCATIONS},
    "afrac_without_locations": {"afrac": 0.5, "afrac_loctypes": ""},
    "afrac_none": {"afrac": None, "afrac_loctypes": ALL_LOCATIONS},
    **{f"topk_{location}": {"afrac": 0.4, "afrac_loctypes": location} for location in ABS_TOPK_LOCATIONS},
    "topk_everywhere": {"afrac": 0.5, "afrac_loctypes": ALL_LOCATIONS},
    "topk_everywhere_relu_residual": {
        "afrac": 0.6,
        "afrac_loctypes": ALL_LOCATIONS,
        "residual_activation_type": "relu",
        "sink": True,
    },
    # the variants that csp_yolo2 combines
    "like_csp_yolo2": {
        "rms_norm": True,
        "sink": True,
        "enable_bigram_table": True,
        "afrac": 0.25,
        "afrac_loctypes": "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out",
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run tiny models on one torch thread: on a busy machine a pool costs milliseconds per op and gains nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> CircuitGPT:
    """The model of a case, with every parameter and buffer drawn at random, so that no term is zero by chance."""
    model = CircuitGPT(CircuitGPTConfig.from_dict(BASE | CASES[name]), seed=seed).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key == "transformer.wpe.weight" and model.config.sinusoidal_cat_pos_emb:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
            tensor.copy_(1 + 0.3 * noise if ".ln_" in key and key.endswith("weight") else 0.5 * noise)
    return model


def tokens(model: CircuitGPT, batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


@contextmanager
def torch_func(model: CircuitGPT) -> Iterator[CircuitGPT]:
    """Make Jacobians that are created and used inside this context go through torch.func.

    The native rules do not apply to a model whose modules have hooks.
    """
    handle = model.register_forward_hook(lambda *_: None)
    try:
        yield model
    finally:
        handle.remove()
