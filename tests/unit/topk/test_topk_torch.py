"""TopK under torch's transforms: every derivative treats the mask as a constant."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import scalpel
from scalpel import topk as ops

K = 3


def keep(x: Tensor) -> Tensor:
    return scalpel.keep_topk(x, K)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10, dtype=torch.float64)


@pytest.fixture
def mask(x: Tensor) -> Tensor:
    return scalpel.topk_mask(x, K)


def test_backward(x: Tensor, mask: Tensor) -> None:
    x.requires_grad_()
    g = torch.randn_like(x)
    keep(x).backward(g)
    assert torch.equal(x.grad, g * mask)


def test_gradcheck_and_gradgradcheck(x: Tensor) -> None:
    x.requires_grad_()
    options = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(keep, (x,), check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(lambda x: keep(x).square(), (x,), check_fwd_over_rev=True, **options)


def test_double_backward_has_no_term_of_its_own(x: Tensor, mask: Tensor) -> None:
    x.requires_grad_()
    g = torch.randn_like(x, requires_grad=True)
    (first,) = torch.autograd.grad(keep(x), x, g, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), g)
    assert torch.equal(second, mask.double())


def test_gradient_is_zero_where_masked_whatever_arrives(x: Tensor, mask: Tensor) -> None:
    x.requires_grad_()
    keep(x).backward(torch.full_like(x, float("inf")))
    assert torch.equal(x.grad, torch.zeros_like(x).masked_fill(mask, float("inf")))


def test_forward_ad(x: Tensor, mask: Tensor) -> None:
    t = torch.randn_like(x)
    with fwd.dual_level():
        y, tangent = fwd.unpack_dual(keep(fwd.make_dual(x, t)))
        assert fwd.unpack_dual(scalpel.topk_mask(fwd.make_dual(x, t), K)).tangent is None
    assert torch.equal(y, x * mask)
    assert torch.equal(tangent, t * mask)


def test_jvp(x: Tensor, mask: Tensor) -> None:
    # The silent failure to guard against: a bare custom op under jvp gives a tangent of zeros, or of the wrong mask.
    t = torch.randn_like(x)
    y, tangent = jvp(keep, (x,), (t,))
    assert torch.equal(y, x * mask)
    assert torch.equal(tangent, t * mask)
    assert tangent.count_nonzero() == 4 * K


def test_jvp_of_what_comes_after(x: Tensor, mask: Tensor) -> None:
    t = torch.randn_like(x)
    _, tangent = jvp(lambda x: keep(2 * x).pow(3).sum(-1), (x,), (t,))
    torch.testing.assert_close(tangent, (3 * (2 * x) ** 2 * 2 * t * mask).sum(-1))


def test_no_grad_does_not_switch_forward_mode_off(x: Tensor, mask: Tensor) -> None:
    t = torch.randn_like(x)
    with torch.no_grad():
        assert torch.equal(jvp(keep, (x,), (t,))[1], t * mask)


def test_vjp_and_vmap_of_vjp(x: Tensor, mask: Tensor) -> None:
    y, pull = vjp(keep, x)
    u = torch.randn(5, *x.shape, dtype=x.dtype)
    assert torch.equal(y, x * mask)
    assert torch.equal(pull(u[0])[0], u[0] * mask)
    assert torch.equal(vmap(pull)(u)[0], u * mask)


def test_vmap_of_jvp(x: Tensor, mask: Tensor) -> None:
    t = torch.randn(5, *x.shape, dtype=x.dtype)
    assert torch.equal(vmap(lambda t: jvp(keep, (x,), (t,))[1])(t), t * mask)


def test_jvp_of_vmap(x: Tensor, mask: Tensor) -> None:
    t = torch.randn_like(x)
    y, tangent = jvp(vmap(keep), (x,), (t,))
    assert torch.equal(y, x * mask)
    assert torch.equal(tangent, t * mask)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_any_dimension(dim: int) -> None:
    x = torch.randn(5, 6, 7)
    expected = torch.stack([keep(row) for row in x.unbind(dim)])
    assert torch.equal(vmap(keep, in_dims=dim)(x), expected)
    for op in (scalpel.topk_mask, scalpel.topk_indices):
        expected = torch.stack([op(row, K) for row in x.unbind(dim)])
        assert torch.equal(vmap(lambda row, op=op: op(row, K), in_dims=dim)(x), expected)


def test_vmap_of_vmap(x: Tensor, mask: Tensor) -> None:
    batch = x.expand(3, 4, 10) * torch.tensor([1.0, -2.0, 3.0]).double()[:, None, None]
    assert torch.equal(vmap(vmap(keep))(batch), batch * mask)


def test_per_sample_gradients(x: Tensor, mask: Tensor) -> None:
    result = vmap(grad(lambda row: keep(row).pow(3).sum()))(x)
    torch.testing.assert_close(result, 3 * x**2 * mask)


def test_jacobians_and_hessians(x: Tensor, mask: Tensor) -> None:
    row, kept = x[0], mask[0].double()
    assert torch.equal(jacfwd(keep)(row), torch.diag(kept))
    assert torch.equal(jacrev(keep)(row), torch.diag(kept))
    for h in (hessian(lambda x: keep(x).pow(3).sum()), jacrev(jacrev(lambda x: keep(x).pow(3).sum()))):
        torch.testing.assert_close(h(row), torch.diag(6 * row * kept))


@pytest.mark.parametrize("op", [scalpel.topk_mask, scalpel.topk_indices])
def test_selections_have_no_derivative(op: Callable, x: Tensor) -> None:
    selected, tangent = jvp(lambda x: op(x, K), (x,), (torch.randn_like(x),))
    assert torch.equal(selected, op(x, K))
    assert not tangent.any()
    assert not op(x.requires_grad_(), K).requires_grad


def test_layer_through_functional_call(x: Tensor, mask: Tensor) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10).double(), scalpel.AbsTopK(K))
    parameters = dict(model.named_parameters())
    grads = grad(lambda p: functional_call(model, p, (x,)).sum())(parameters)
    kept = scalpel.topk_mask(model[0](x), K).double()
    torch.testing.assert_close(grads["0.weight"], kept.T @ x)
    torch.testing.assert_close(grads["0.bias"], kept.sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_differentiate(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    keep(x).sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad.bool(), scalpel.topk_mask(x, K))


def test_out_with_a_gradient_is_refused(x: Tensor) -> None:
    out = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="requires grad"):
        scalpel.keep_topk(x.clone().requires_grad_(), K, out=out)
    with torch.no_grad():
        scalpel.keep_topk(x.clone().requires_grad_(), K, out=out)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        vmap(lambda x: scalpel.keep_topk(x, K, out=out[0]))(x)


def test_autograd_notices_that_out_was_overwritten(x: Tensor) -> None:
    weight, value = torch.ones_like(x, requires_grad=True), x.clone()
    loss = (weight * value).sum()
    scalpel.keep_topk(value, K, out=value)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors_come_through_transforms(x: Tensor) -> None:
    with pytest.raises(ValueError, match="k is 11.*width 10"):
        jvp(lambda x: scalpel.keep_topk(x, 11), (x,), (x,))
    with pytest.raises(ValueError, match="k is 11.*width 10"):
        scalpel.keep_topk(x.requires_grad_(), 11)


def test_what_watches_sees_the_op(x: Tensor) -> None:
    # A plain call goes straight to the core. That must not bypass anything that records, fakes or times ops.
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen.append(op.name())
            return op(*args, **(kwargs or {}))

    with Names() as mode:
        keep(x)
        scalpel.keep_topk(x, K, out=torch.empty_like(x))
    assert {"scalpel::topk_mask", "scalpel::keep_topk_out"} <= set(mode.seen)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(keep(x), FakeTensor)
    graph = make_fx(keep)(x)
    assert "scalpel.topk_mask" in graph.code
    assert torch.equal(graph(2 * x), keep(2 * x))
    with torch.profiler.profile() as profile:
        keep(x)
    assert "scalpel::topk_mask" in {event.key for event in profile.key_averages()}


def test_traced_and_exported(x: Tensor) -> None:
    layer = scalpel.AbsTopK(K)
    other = torch.randn_like(x)
    traced = torch.jit.trace(layer, (x,))
    assert torch.equal(traced(other), layer(other))
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(other), layer(other))


def test_captured_graphs_keep_their_derivative(x: Tensor, mask: Tensor) -> None:
    t = torch.randn_like(x)
    for graph in (
        make_fx(keep)(x),
        make_fx(keep, pre_dispatch=True)(x),
        torch.export.export(scalpel.AbsTopK(K), (x,)).module(),
    ):
        assert torch.equal(jvp(graph, (x,), (t,))[1], t * mask)
        leaf = x.clone().requires_grad_()
        graph(leaf).backward(t)
        assert torch.equal(leaf.grad, t * mask)


def test_what_is_no_plain_memory(x: Tensor, mask: Tensor) -> None:
    with torch.device("meta"):
        assert torch.equal(keep(x), x * mask)
    out = torch._neg_view(torch.zeros_like(x))
    assert torch.equal(scalpel.keep_topk(x, K, out=out), x * mask)
    with pytest.raises(ValueError, match="x has no memory"):
        keep(torch._efficientzerotensor(3, 8))
    odd = torch.frombuffer(bytearray(4 * 80 + 1), dtype=torch.float32, offset=1).view(4, 20)
    with pytest.raises(ValueError, match="does not begin at a multiple"):
        scalpel.keep_topk(torch.randn(4, 20), K, out=odd)
    with torch.inference_mode():
        made = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="inference mode"):
        scalpel.keep_topk(x, K, out=made)
    with pytest.raises(TypeError, match="nested"):
        keep(torch.nested.nested_tensor([torch.randn(3), torch.randn(4)]))


def test_subclasses_stay_what_they_are(x: Tensor, mask: Tensor) -> None:
    class Named(Tensor):
        pass

    assert type(keep(x.as_subclass(Named))) is Named
    assert torch.equal(keep(torch.nn.Parameter(x)).detach(), x * mask)


def test_a_plain_call_goes_straight_to_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain call makes only few dispatcher calls and checks, because either would dominate on a small tensor.

    A custom op alone costs more than the whole PyTorch expression. The test counts calls instead of measuring time,
    which would depend on the load of the machine.
    """
    x = torch.randn(4, 64)
    indices = x.abs().topk(16).indices
    assert torch.equal(scalpel.keep_topk(x, 16), torch.zeros_like(x).scatter_(-1, indices, x.gather(-1, indices)))

    def never(*_: object) -> Tensor:
        raise AssertionError("through the dispatcher")

    for name in ("_mask_op", "_indices_op"):
        monkeypatch.setattr(ops, name, never)
    monkeypatch.setattr(ops, "_OUT_OPS", dict.fromkeys(ops._OUT_OPS, never))
    out = torch.empty_like(x)
    calls: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name if event == "call" else function.__name__)

    for call, most in (
        (lambda: scalpel.keep_topk(x, 16), 70),
        (lambda: scalpel.topk_mask(x, 16), 70),
        (lambda: scalpel.topk_indices(x, 16), 70),
        (lambda: scalpel.keep_topk(x, 16, out=out), 110),
    ):
        calls.clear()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert len(calls) <= most, calls
        assert calls.count("empty") <= 2  # one call by us and one by torch, for the single result


def test_opcheck() -> None:
    for name in ("topk_mask", "topk_indices"):
        op = getattr(torch.ops.scalpel, name).default
        torch.library.opcheck(op, (torch.randn(3, 8), K, "magnitude"), test_utils=["test_schema", "test_faketensor"])


F = torch.func
FUNCTIONALIZED = {
    "alone": lambda keep: F.functionalize(keep),
    "in vmap": lambda keep: F.vmap(F.functionalize(keep)),
    "around vmap": lambda keep: F.functionalize(F.vmap(keep)),
    "in jvp": lambda keep: lambda x: F.jvp(F.functionalize(keep), (x,), (x.cos(),))[1],
    "around jvp": lambda keep: F.functionalize(lambda x: F.jvp(keep, (x,), (x.cos(),))[1]),
    "in grad": lambda keep: F.grad(lambda x: F.functionalize(keep)(x).pow(3).sum()),
    "around a Hessian": lambda keep: F.functionalize(F.hessian(lambda x: keep(x).pow(3).sum())),
}


@pytest.mark.parametrize("made", FUNCTIONALIZED.values(), ids=FUNCTIONALIZED.keys())
def test_functionalize(made) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    plain = made(lambda x: torch.where(x.abs() >= x.abs().sort(-1).values[..., -3:-2], x, 0))
    assert torch.equal(made(lambda x: scalpel.keep_topk(x, 3))(x), plain(x))


def test_a_function_mode_sees_the_op() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        scalpel.keep_topk(torch.randn(3, 8), 2)
    assert any("scalpel.topk_mask" in name for name in seen.names)
