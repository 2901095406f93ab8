"""The matrices of a prompt where no decoder's rules apply: CircuitGPTs, models with hooks, and modules of any kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitgpt_cases import CASES, build, one_thread, tokens, torch_func  # noqa: F401
from decoder_cases import exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from scalpel import CircuitGPT
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    pytest.importorskip("transformers")
    with exact_norms():
        yield


# ---- CircuitGPT ----------------------------------------------------------------------------------


def of_circuit(model: CircuitGPT, ids: Tensor, source: str, target: str, mask: Tensor | None = None) -> Tensor:
    """The derivative (L, width, L, width) between two hooks, by autograd through the model's own forward pass."""

    def moved(delta: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}

        def tap(name: str, value: Tensor) -> Tensor:
            value = value + delta if name == source else value
            seen[name] = value
            return value

        model(ids, mask, tap=tap)
        return seen[target]

    zero = torch.zeros(1, ids.shape[1], model.config.d_model, dtype=torch.float64)
    full: Tensor = torch.autograd.functional.jacobian(moved, zero)
    return full[0, :, :, 0]


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("no_layer", "one_layer")])
def test_every_variant_of_circuitgpt(case: str) -> None:
    model = build(case)
    ids = tokens(model, 1, 7)
    full = of_circuit(model, ids, "1.resid_in", "final_resid")
    for targets in ("after", "same"):
        right = lens_matrix(full, range(2, 6), targets)
        found = lens_matrices(model, ids, layers=[1, 0], skip_first=2, targets=targets, groups=None)
        torch.testing.assert_close(found[0], right, **EXACT)
        assert torch.equal(found[1], torch.eye(model.config.d_model, dtype=torch.float64))
        with torch_func(model):  # a hook, with which the rules don't hold
            by_autograd = lens_matrices(model, ids, layers=[0], skip_first=2, targets=targets, groups=None)
        torch.testing.assert_close(by_autograd[0], right, **EXACT)


def test_circuitgpt_with_three_layers_padding_and_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "deep", CASES["like_csp_yolo2"] | {"n_layer": 4})
    model = build("deep")
    ids = tokens(model, 1, 7)
    for target, end in ((None, "final_resid"), (2, "3.resid_in")):
        found = lens_matrices(model, ids, layers=[0, 1, 2], target=target, skip_first=1)
        for layer in range(3):
            right = lens_matrix(of_circuit(model, ids, f"{layer + 1}.resid_in", end), range(1, 6), "after")
            torch.testing.assert_close(found[layer], right, **EXACT)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    padded = torch.cat([ids[:, :1].expand(1, 3), ids], 1)
    right = lens_matrix(of_circuit(model, padded, "1.resid_in", "final_resid", mask), range(4, 9), "after")
    batch = {"input_ids": padded, "attention_mask": mask}
    torch.testing.assert_close(lens_matrices(model, batch, layers=[0], skip_first=1)[0], right, **EXACT)


def test_an_ablation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "deep", CASES["like_csp_yolo2"] | {"n_layer": 3})
    model = build("deep")
    ids = tokens(model, 1, 7)
    plain = lens_matrices(model, ids, layers=[0, 1], skip_first=1)
    with model.ablate(["1.mlp.post_act", "2.resid_in:1", "2.resid_in:5"], "zero"):
        full = of_circuit(model, ids, "1.resid_in", "final_resid")
        found = lens_matrices(model, ids, layers=[0, 1], skip_first=1)
        with torch_func(model):
            by_autograd = lens_matrices(model, ids, layers=[0], skip_first=1)
    right = lens_matrix(full, range(1, 6), "after")
    torch.testing.assert_close(found[0], right, **EXACT)
    torch.testing.assert_close(by_autograd[0], right, **EXACT)
    assert not torch.allclose(plain[0], right)
    # A source is the value after the ablation there, so layer 1's output still moves the target at ablated channels.
    assert bool(found[1][:, 1].any())


def test_circuitgpt_refuses() -> None:
    model = build("plain")
    with pytest.raises(ValueError, match="a CircuitGPT has none of that precision"):
        lens_matrices(model, tokens(model, 1, 7), layers=[0], skip_first=1, precision="bfloat16")
    with pytest.raises(ValueError, match="the prompt has 4 tokens"):
        lens_matrices(model, tokens(model, 1, 4), layers=[0], skip_first=3)
    with pytest.raises(ValueError, match="input_ids holds 2 prompts"):
        lens_matrices(model, tokens(model, 2, 7), layers=[0], skip_first=3)
    empty = build("no_layer")
    with pytest.raises(ValueError, match="has no layers"):
        lens_matrices(empty, tokens(empty, 1, 7), layers=[0], skip_first=1)


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mistral", "qwen3"])
def test_a_decoder_with_a_users_hook(name: str) -> None:
    """The hook changes the values, so a sweep that passed it over would give other matrices."""
    model, ids = model_of(name), ids_of(1, 8)
    plain = lens_matrices(model, ids, layers=[0, 1], skip_first=2)
    middle = next(module for path, module in model.named_modules() if path.endswith("1.mlp"))
    handle = middle.register_forward_hook(lambda module, given, output: 1.5 * output)
    blocks = blocks_of(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    padded = {"input_ids": torch.cat([ids[:, :2], ids], 1), "attention_mask": mask}
    places = padded | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    for targets in ("after", "same"):
        options: dict[str, Any] = {"skip_first": 2, "targets": targets, "groups": None}
        found = lens_matrices(model, ids, layers=[0, 1, 2], **options)
        of_padded = lens_matrices(model, padded, layers=[0, 1], **options)
        for layer in (0, 1):
            full = block_jacobian(model, {"input_ids": ids}, blocks[layer], blocks[-1], model.config.hidden_size)
            torch.testing.assert_close(found[layer], lens_matrix(full, range(2, 7), targets), **EXACT)
            full = block_jacobian(model, places, blocks[layer], blocks[-1], model.config.hidden_size)
            torch.testing.assert_close(of_padded[layer], lens_matrix(full, range(4, 9), targets), **EXACT)
        assert torch.equal(found[2], torch.eye(model.config.hidden_size, dtype=torch.float64))
    handle.remove()
    assert not torch.allclose(plain[0], found[0])
    assert all(torch.equal(lens_matrices(model, ids, layers=[0], skip_first=2)[0], plain[0]) for _ in range(2))


class Summing(nn.Module):
    """A block that reads all earlier tokens, and works in place on what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x += 0.5 * self.dropout(torch.tanh(self.inside(x.cumsum(1))))
        return x


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Summing(6) for _ in range(3)])
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.runs += 1
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_any_module_by_the_paths_of_its_blocks() -> None:
    torch.manual_seed(0)
    model = Plain().double().train()
    ids = ids_of(1, 7) % 11
    before = copy.deepcopy(model.state_dict())
    paths = ["blocks.0", "blocks.1"]
    found = {
        targets: lens_matrices(model, ids, layers=paths, target="blocks.2", skip_first=1, targets=targets, groups=None)
        for targets in ("after", "same")
    }
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    for number, path in enumerate(paths):
        full = block_jacobian(model, {"input_ids": ids}, model.blocks[number], model.blocks[2], 6)
        for targets in found:
            torch.testing.assert_close(found[targets][path], lens_matrix(full, range(1, 6), targets), **EXACT)
    by_number = lens_matrices(model, ids, layers=[1, 0], skip_first=1)
    assert list(by_number) == [0, 1]
    assert all(torch.equal(by_number[number], found["after"][path]) for number, path in enumerate(paths))


def test_modules_are_refused_where_they_cant_be_read() -> None:
    model, ids = Plain(), ids_of(1, 7) % 11
    options: dict[str, Any] = {"skip_first": 1}
    with pytest.raises(ValueError, match=r"unknown layer 'blocks.7'"):
        lens_matrices(model, ids, layers=["blocks.0", "blocks.7"], target="blocks.2", **options)
    with pytest.raises(ValueError, match=r"no path from 'blocks.2' to 'blocks.1'"):
        lens_matrices(model, ids, layers=["blocks.0", "blocks.2"], target="blocks.1", **options)
    with pytest.raises(ValueError, match="the prompt has 7 tokens"):
        lens_matrices(model, ids, layers=["blocks.0"], target="blocks.1", skip_first=6)
    with pytest.raises(ValueError, match="holds 2 prompts"):
        lens_matrices(model, ids.expand(2, 7), layers=["blocks.0"], target="blocks.1", **options)
    with pytest.raises(ValueError, match="precision='bfloat16' needs the rules"):
        lens_matrices(model, ids, layers=["blocks.0"], target="blocks.1", precision="bfloat16", **options)
    with torch.no_grad():
        model.table.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN at 'blocks.0'"):
        lens_matrices(model, ids, layers=["blocks.0"], target="blocks.1", **options)


def test_under_no_grad_inference_mode_and_autocast() -> None:
    model, ids = Plain().eval(), ids_of(1, 7) % 11
    options: dict[str, Any] = {"layers": ["blocks.0"], "target": "blocks.2", "skip_first": 1}
    right = lens_matrices(model, ids, **options)["blocks.0"]
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found = lens_matrices(model, ids, **options)["blocks.0"]
        assert torch.equal(found, right)
        assert not found.requires_grad
