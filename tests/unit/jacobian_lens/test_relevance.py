"""The relevance lens, compared with autograd in float64 through forward passes whose constants are detached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from decoder_cases import MODELS, exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from relevance_oracle import relevance
from scalpel import CircuitGPT
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices
from scalpel.jacobians.choosing import pass_between
from scalpel.jacobians.trace import trace_of

EXACT = {"rtol": 1e-9, "atol": 1e-11}
BESIDE: dict[str, Any] = {"attention_mask": None, "position_ids": None}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    pytest.importorskip("transformers")
    with exact_norms():
        yield


def activation_of(model: Any) -> str:
    config = model.config
    return getattr(config, "hidden_act", None) or config.activation_function


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_decoder(name: str) -> None:
    model, ids = model_of(name), ids_of(1, 7)
    blocks, given = blocks_of(model), {"input_ids": ids}
    logits = model(**given).logits
    found = lens_matrices(model, ids, layers=[0, 1], skip_first=1, estimator="relevance")
    plain = lens_matrices(model, ids, layers=[0, 1], skip_first=1)
    with relevance(model, activation_of(model)):
        torch.testing.assert_close(model(**given).logits, logits, rtol=1e-12, atol=1e-12)
        for layer in (0, 1):
            full = block_jacobian(model, given, blocks[layer], blocks[-1], model.config.hidden_size)
            torch.testing.assert_close(found[layer], lens_matrix(full, range(1, 6), "after"), **EXACT)
            assert not torch.allclose(found[layer], plain[layer])


def test_the_values_keep_their_bits() -> None:
    for name in ("llama", "gpt2"):
        run = pass_between(model_of(name).float(), ids_of(1, 7), BESIDE, "0.resid_in", "final_resid")
        hooks = ["0.resid_in", "1.resid_mid", "1.mlp.post_act", "2.resid_in", "final_resid"]
        plain, other = trace_of(run, hooks), trace_of(run, hooks, relevance=True)
        assert all(torch.equal(plain.values[hook], other.values[hook]) for hook in hooks)


def test_an_activation_at_zero() -> None:
    """Neurons whose input is exactly zero have no quotient; its limit is sigmoid(0) and Φ(0), which is one half."""
    for name in ("llama", "gpt2"):
        model, ids = model_of(name), ids_of(1, 6)
        entry = next(
            p for path, p in model.named_parameters() if path.endswith(("1.mlp.gate_proj.weight", "1.mlp.c_fc.weight"))
        )
        (entry[3] if name == "llama" else entry[:, 3]).zero_()
        for path, bias in model.named_parameters():
            if path.endswith("c_fc.bias"):
                bias.zero_()
        found = lens_matrices(model, ids, layers=[0], skip_first=1, estimator="relevance")[0]
        with relevance(model, activation_of(model)):
            full = block_jacobian(model, {"input_ids": ids}, blocks_of(model)[0], blocks_of(model)[-1], 12)
        torch.testing.assert_close(found, lens_matrix(full, range(1, 5), "after"), **EXACT)


def of_circuit(model: CircuitGPT, ids: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {}

    def moved(delta: Tensor) -> Tensor:
        def tap(name: str, value: Tensor) -> Tensor:
            seen[name] = value + delta if name == "1.resid_in" else value
            return seen[name]

        with relevance(model, model.config.activation_type):
            model(ids, tap=tap)
        return seen["final_resid"]

    zero = torch.zeros(1, ids.shape[1], model.config.d_model, dtype=torch.float64)
    full: Tensor = torch.autograd.functional.jacobian(moved, zero)
    return full[0, :, :, 0]


@pytest.mark.parametrize(
    "case", ["plain", "relu", "rms_norm", "positions_concatenated_rms", "topk_everywhere", "like_csp_yolo2"]
)
def test_circuitgpt(case: str) -> None:
    model = build(case)
    ids = tokens(model, 1, 7)
    right = lens_matrix(of_circuit(model, ids), range(2, 6), "after")
    found = lens_matrices(model, ids, layers=[0], skip_first=2, estimator="relevance")[0]
    torch.testing.assert_close(found, right, **EXACT)
    assert not torch.allclose(found, lens_matrices(model, ids, layers=[0], skip_first=2)[0])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_who_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(1, 7)
    options: dict[str, Any] = {"skip_first": 1, "estimator": "relevance"}
    with pytest.raises(ValueError, match="here there are none: Plain is none of"):
        lens_matrices(Plain(), ids, layers=[0], **options)
    model = model_of("llama")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, given, output: 2 * output)
    with pytest.raises(ValueError, match="here there are none: there is a hook on the module 'model.layers.1.mlp'"):
        lens_matrices(model, ids, layers=[0], **options)
    handle.remove()
    with pytest.raises(ValueError, match="paths of modules that are none of the residual stream"):
        lens_matrices(model, ids, layers=["model.layers.0.mlp"], target="model.layers.2", **options)
    monkeypatch.setitem(MODELS, "tanh", MODELS["gpt2"])
    other = model_of("tanh")
    other.config.activation_function = "tanh"
    for block in other.transformer.h:
        block.mlp.act = nn.Tanh()
    with pytest.raises(ValueError, match="no rule for the activation 'tanh'"):
        lens_matrices(other, ids, layers=[0], **options)
    circuit = build("plain")
    with torch_func(circuit), pytest.raises(ValueError, match="CircuitGPT has a module or a hook that is not its own"):
        lens_matrices(circuit, tokens(circuit, 1, 7), layers=[0], **options)
    with pytest.raises(ValueError, match="estimator is 'gradient'; allowed: 'jacobian', 'relevance'"):
        lens_matrices(model, ids, layers=[0], skip_first=1, estimator="gradient")
