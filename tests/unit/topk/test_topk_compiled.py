"""TopK under torch.compile, which imports its compiler and learns of our functions only when somebody compiles."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import scalpel

K = 3


def keep(x: Tensor) -> Tensor:
    return scalpel.keep_topk(x, K)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10, dtype=torch.float64)


@pytest.fixture
def mask(x: Tensor) -> Tensor:
    return scalpel.topk_mask(x, K)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_out_compiles(x: Tensor, mask: Tensor, backend: str) -> None:
    def f(x: Tensor, out: Tensor) -> Tensor:
        return scalpel.keep_topk(x, K, out=out) * 2

    out = torch.empty_like(x)
    assert torch.equal(torch.compile(f, backend=backend)(x, out), torch.where(mask, 2 * x, 0))
    assert torch.equal(out, torch.where(mask, x, 0))


def forward_ad(x: Tensor, t: Tensor) -> Tensor:
    with fwd.dual_level():
        return fwd.unpack_dual(keep(fwd.make_dual(x, t)))[1]


COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": lambda x, t: keep(2 * x),
    "vmap": lambda x, t: vmap(keep)(x),
    "grad": lambda x, t: grad(lambda x: keep(x).pow(3).sum())(x),
    "jvp": lambda x, t: jvp(keep, (x,), (t,))[1],
    "vjp": lambda x, t: vjp(keep, x)[1](t)[0],
    "vmap of jvp": lambda x, t: vmap(lambda s: jvp(keep, (x,), (s * t,))[1])(torch.ones_like(t)),
    "vmap of vjp": lambda x, t: vmap(vjp(keep, x)[1])(torch.stack([t, 2 * t]))[0],
    "forward AD": forward_ad,
    "mask and indices": lambda x, t: scalpel.topk_mask(x, K) * t + scalpel.topk_indices(x, K).sum(),
}


# What inductor makes code for is the graph of aot_eager. Our op is one call in it, whatever the transform was, so three
# graphs are enough: the op forwards, with a derivative, and both ops that select.
WITH_INDUCTOR = ("eager", "grad", "mask and indices")
COMPILERS = [
    (name, backend)
    for name in COMPILED
    for backend in ("eager", "aot_eager", "inductor")
    if backend != "inductor" or name in WITH_INDUCTOR
]


@pytest.mark.parametrize(("name", "backend"), COMPILERS)
def test_compile_in_one_graph(name: str, backend: str, x: Tensor) -> None:
    f = COMPILED[name]
    torch._dynamo.reset()
    t = torch.randn_like(x)
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    found, expected = compiled(x, t), f(x, t)
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(found, expected)


def test_compiled_backward(x: Tensor, mask: Tensor) -> None:
    torch._dynamo.reset()
    x.requires_grad_()
    torch.compile(lambda x: keep(x).pow(3), backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * x.detach() ** 2 * mask)


def test_who_does_not_compile_does_not_import_the_compiler() -> None:
    """It takes as long to import as torch itself; once it is there, it takes each function as one node."""
    code = """
import sys, torch, scalpel
import scalpel.cli.commands, scalpel.experiments.suite
model = scalpel.CircuitGPT.from_pretrained("parity-mini")
ids = torch.tensor([[1, 2, 3]])
J = scalpel.jacobian(model, ids)
J.jvp(torch.ones(1, *J.source_shape))
scalpel.collect(model, [ids], ["0.resid_in", "0.resid_in.grad"], progress=False)
assert "torch._dynamo" not in sys.modules
graphs = []
def backend(graph, inputs):
    graphs.append(graph.graph)
    return graph.forward
f = lambda x: (scalpel.topk_mask(x, 3), scalpel.keep_topk(x, 3), scalpel.topk_indices(x, 3))
torch.compile(f, backend=backend, fullgraph=True)(torch.randn(2, 5))
print([node.target.__name__ for node in graphs[0].nodes if node.op == "call_function"], len(graphs))
"""
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout == "['_mask_dispatch', '_keep_dispatch', '_indices_dispatch'] 1\n", done.stdout + done.stderr
