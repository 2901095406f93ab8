"""scalpel.jacobian over any nn.Module: transformers' GPT-2, plain stacks, odd inputs and outputs, errors."""

import importlib
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitgpt_cases import one_thread  # noqa: F401
from scalpel import AbsTopK, jacobian
from scalpel.reference.jacobian import jacobian_dense

pytestmark = pytest.mark.filterwarnings("ignore:scalpel.jacobian differentiates")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def gpt2(request: pytest.FixtureRequest) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = request.param
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def check(model: nn.Module, inputs: Any, source: str, target: str, positions=None, **keywords: Any) -> Any:
    J = jacobian(model, {"input_ids": inputs, **keywords} if keywords else inputs, source, target, positions)
    dense = jacobian_dense(model, inputs, source, target, positions, **keywords)
    assert J.shape == dense.shape
    assert bool(dense.any())
    torch.testing.assert_close(J.to_dense(), dense, **EXACT)
    torch.testing.assert_close(J.T.to_dense(), dense.T, **EXACT)
    return J


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize(
    "source,target,positions",
    [
        ("transformer.h.0:in", "transformer.h.1", None),
        ("transformer.h.0:in", "transformer.h.1", ([0, 1], -1)),
        ("transformer.wte", "logits", (1, [2, 4])),
        ("transformer.h.0.attn:in", "transformer.h.0.attn", 2),
        ("transformer.h.1.mlp.c_fc", "transformer.ln_f:in", slice(1, 3)),
        ("transformer.h.0", "lm_head", (None, -1)),
    ],
)
def test_gpt2(gpt2: nn.Module, source: str, target: str, positions) -> None:
    check(gpt2, IDS, source, target, positions)


def test_gpt2_with_padding_and_places(gpt2: nn.Module) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    J = check(gpt2, IDS, "transformer.h.0:in", "logits", (None, -1), attention_mask=mask, position_ids=places)
    assert not J.to_dense().reshape(2, 20, 2, 5, 8)[1, :, 1, :2].any()  # no padding token takes part
    beside = jacobian(gpt2, IDS, "transformer.h.0:in", "logits", (None, -1), attention_mask=mask, position_ids=places)
    assert torch.equal(beside.to_dense(), J.to_dense())


def test_gpt2_composes(gpt2: nn.Module) -> None:
    first = jacobian(gpt2, IDS, "transformer.h.0:in", "transformer.h.0")
    second = jacobian(gpt2, IDS, "transformer.h.0", "transformer.h.1")
    whole = jacobian(gpt2, IDS, "transformer.h.0:in", "transformer.h.1")
    torch.testing.assert_close((second @ first).to_dense(), whole.to_dense(), **EXACT)


@pytest.mark.parametrize(
    "source,target,positions",
    [
        ("transformer.h.1", "transformer.h.0", None),
        ("transformer.h.1.mlp", "transformer.h.1.attn", None),
        ("transformer.h.0:in", "transformer.wpe", None),
        ("transformer.h.0:in", "logits", (3, 2)),
    ],
)
def test_gpt2_no_path(gpt2: nn.Module, source: str, target: str, positions) -> None:
    with pytest.raises(ValueError, match="no path"):
        jacobian(gpt2, IDS, source, target, positions)


def test_gpt2_errors(gpt2: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"unknown source '0.resid' for this GPT2LMHeadModel.*near it: .*'0.resid_in'"):
        jacobian(gpt2, IDS, "0.resid")
    with pytest.raises(ValueError, match=r"unknown target 'transformer.h.2'.*near it: .*'transformer.h'"):
        jacobian(gpt2, IDS, "transformer.wte", "transformer.h.2")
    with pytest.raises(TypeError, match=r"'transformer.wte:in' is torch.int64"):
        jacobian(gpt2, IDS, "transformer.wte:in", "logits")
    with pytest.raises(ValueError, match="target position 5 is outside the text of 5 tokens"):
        jacobian(gpt2, IDS, "transformer.wte", "logits", (0, 5))
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        batch = {"input_ids": IDS, "attention_mask": IDS}
        jacobian(gpt2, batch, "transformer.wte", "logits", attention_mask=IDS)


def test_training_flags_gradients_and_dropout(gpt2: nn.Module) -> None:
    still = jacobian(gpt2, IDS, "transformer.wte", "logits").to_dense()
    gpt2.train()
    gpt2.transformer.h[1].eval()
    flags = [module.training for module in gpt2.modules()]
    J = jacobian(gpt2, IDS, "transformer.wte", "logits")
    assert torch.equal(J.to_dense(), still) and torch.equal(J.T.to_dense(), J.T.to_dense())
    assert [module.training for module in gpt2.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in gpt2.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt2.modules())
    gpt2.eval()


def stack() -> nn.Sequential:
    layers = [nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), AbsTopK(4), nn.Linear(9, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*layers).double().train()


def test_sequential() -> None:
    model = stack()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    J = jacobian(model, x, ":in", "")
    assert (J.source_shape, J.target_shape) == ((3, 6), (3, 5))
    model.eval()
    check(model, x, ":in", "")
    check(model, x, "0", "4")
    check(model, x, "1:in", "logits")
    check(model, x, "3", "3")
    torch.testing.assert_close(jacobian(model, (x,), "0", "5:in").to_dense(), check(model, x, "0", "4").to_dense())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"positions need a source value \(batch, tokens, width\).*\(3, 9\)"):
        jacobian(model, x, "0", "4", 1)
    with torch.no_grad(), torch.inference_mode():
        K = jacobian(model, x.clone(), ":in", "")
        assert K.jvp(torch.ones(2, 3, 6, dtype=torch.float64)).shape == (2, 3, 5)


def test_layers_that_work_in_place() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 5)).double()
    plain = nn.Sequential(model[0], nn.ReLU(), model[2])
    x = torch.randn(3, 6, dtype=torch.float64)
    J, K = jacobian(model, x, "0", "2"), jacobian(plain, x, "0", "2")
    assert torch.equal(J.to_dense(), K.to_dense()) and torch.equal(J.T.to_dense(), K.T.to_dense())
    assert torch.equal(J.T.primal, model[0](x))


def test_user_hooks_come_first() -> None:
    model = stack().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = jacobian(model, x, "0", "4").to_dense()
    handle = model[4].register_forward_hook(lambda module, given, output: 2 * output)
    torch.testing.assert_close(jacobian(model, x, "0", "4").to_dense(), 2 * plain)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


class Odd(nn.Module):
    """A model with tuples, keywords and dictionaries, a module that runs twice, and the fused attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.shared = nn.Linear(4, 4)
        self.named = Named()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        count, (a, _) = self.pair(x)
        a = self.shared(a).tanh()
        a = F.scaled_dot_product_attention(a[:, None], a[:, None], a[:, None], is_causal=True)[:, 0]
        a = self.shared(a)
        out = self.named(hidden=a if scale is None else a * scale)
        return {"note": count, "logits": out["value"]}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[str, tuple[Tensor, Tensor]]:
        return "two", (x * x, x)


class Named(nn.Module):
    def forward(self, *, hidden: Tensor) -> OrderedDict[str, Any]:
        return OrderedDict(size=3, value=hidden.sin())


def test_odd_inputs_and_outputs() -> None:
    model = Odd().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64)

    def rest(a: Tensor) -> Tensor:
        b = model.shared(a).tanh()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            b = F.scaled_dot_product_attention(b[:, None], b[:, None], b[:, None], is_causal=True)[:, 0]
        return (model.shared(b) * scale).sin()

    J = jacobian(model, {"x": x, "scale": scale}, "pair", "logits")
    expected = torch.autograd.functional.jacobian(rest, x * x).reshape(J.shape)
    torch.testing.assert_close(J.to_dense(), expected, **EXACT)
    torch.testing.assert_close(jacobian(model, (x, scale), "pair", "named").to_dense(), expected, **EXACT)
    # As a source, 'shared' means its first run; as a target, its first run after the source.
    first = jacobian(model, x, "shared", "shared")
    assert torch.equal(first.to_dense(), torch.eye(40, dtype=torch.float64))
    into_keyword = jacobian(model, x, "named:in", "named")
    torch.testing.assert_close(into_keyword.to_dense(), torch.diag(into_keyword.to_dense().diag()))
    causal = jacobian(model, x, ":in", "logits", (0, 4))
    assert causal.shape == (8, 8)
    with pytest.raises(ValueError, match="no path"):
        jacobian(model, x, ":in", "logits", (4, 0))


def test_what_cannot_be_differentiated_forward_is_named() -> None:
    class Distances(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x + 1)

    with pytest.raises(NotImplementedError, match=r"between '0' and '1' uses _cdist_forward"):
        jacobian(nn.Sequential(nn.Linear(4, 4), Distances()), torch.randn(3, 4), "0", "1")

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Own.apply(x)

    with pytest.raises(NotImplementedError, match=r"between '0' and '1'.*jvp"):
        jacobian(nn.Sequential(nn.Linear(4, 4), Custom()), torch.randn(3, 4), "0", "1")

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    J = jacobian(nn.Sequential(nn.Linear(4, 4), Noisy()), torch.randn(3, 4), "0", "1")
    with pytest.raises(NotImplementedError, match="random"):
        J.jvp(torch.randn(2, 3, 4))


def test_detached_is_no_path_and_nan_is_an_error() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * 2

    with pytest.raises(ValueError, match="no path from '0' to '1': the target does not read the source"):
        jacobian(nn.Sequential(nn.Linear(4, 4), Cut()), torch.randn(3, 4), "0", "1")
    with pytest.raises(ValueError, match="NaN at ':in'"):
        jacobian(stack(), torch.full((3, 6), float("nan"), dtype=torch.float64), ":in", "")


def test_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("scalpel.jacobians.derivative"), "_announced", False)
    with pytest.warns(UserWarning, match="Sequential through torch.func with the math attention backend"):
        jacobian(stack(), torch.randn(3, 6).double(), "0", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        jacobian(stack(), torch.randn(3, 6).double(), "0", "4")
