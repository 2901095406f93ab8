"""The gate to the core: which tensors may be passed to it, and the messages for those that may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import scalpel
from circuitgpt_cases import build, one_thread, tokens
from scalpel._native import memory_of, memory_of_array
from scalpel.lanes import Lanes, Norm, SparseWeight

__all__ = ["one_thread"]

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def released() -> torch.Tensor:
    x = torch.ones(3, 4)
    x.untyped_storage().resize_(0)
    return x


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


HAVE_NO_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "fake": fake,
    "functional": lambda: torch._to_functional_tensor(torch.ones(3, 4)),
    "released": released,
    "zero": lambda: torch._efficientzerotensor(3, 4),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", HAVE_NO_MEMORY)
def test_what_has_no_memory_is_refused(kind: str) -> None:
    x = HAVE_NO_MEMORY[kind]()
    with pytest.raises(ValueError, match=r"the rows has no memory that can be read: .*\(3, "):
        memory_of(x, "the rows")


def test_what_stands_for_another_tensor_is_refused() -> None:
    def taken(row: torch.Tensor) -> torch.Tensor:
        memory_of(row, "a row")
        return row

    with pytest.raises(ValueError, match="a row has no memory"):
        torch.func.vmap(taken)(torch.ones(2, 3))
    with pytest.raises(ValueError, match="a row has no memory"):
        torch.func.jvp(taken, (torch.ones(3),), (torch.ones(3),))


def test_what_is_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the rows, of shape \(2, 3\), is on meta.*device='cpu'"):
        memory_of(torch.ones(2, 3, device="meta"), "the rows")
    with pytest.raises(ValueError, match=r"the rows, of shape \(2,\), is on meta.*needed on cuda:1"):
        memory_of(torch.ones(2, device="meta"), "the rows", torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"the rows is on cpu, and the operation runs on cuda:1.*to\('cuda:1'\)"):
        memory_of(torch.ones(2), "the rows", torch.device("cuda", 1))
    with pytest.raises(TypeError, match="the rows is torch.int16; the core knows float32"):
        memory_of(torch.ones(2, dtype=torch.int16), "the rows")


def test_what_may_pass_the_gate() -> None:
    x = torch.arange(12, dtype=torch.float64).view(3, 4)[:, 1:]
    assert memory_of(x) == (x.data_ptr(), "float64", (3, 3), (4, 1)) == memory_of(x, on=torch.device("cpu"))
    assert memory_of(torch.ones(0, 3))[2] == (0, 3)  # none of its memory is read
    assert memory_of(nn.Parameter(torch.ones(2)))[1:] == ("float32", (2,), (1,))


def test_the_gate_of_arrays() -> None:
    class Liar(np.ndarray):
        @property
        def __array_interface__(self) -> dict[str, Any]:
            return {"data": (0, False)}

    x = np.ones((3, 4), np.float32)
    assert memory_of_array(x.view(Liar)) == (x.ctypes.data, "float32", (3, 4), (4, 1))
    assert np.array_equal(scalpel.topk_mask(x.view(Liar), 2).sum(-1), [2, 2, 2])
    crooked = np.ndarray((3,), np.float32, np.zeros(20, np.uint8), strides=(6,))
    with pytest.raises(ValueError, match=r"x has strides \(6,\).*pass a copy"):
        memory_of_array(crooked, "x")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", ["fake", "released"])
def test_rows_without_memory_leave_a_state_as_it_was(rank: int | None, kind: str) -> None:
    state = scalpel.StreamingCovariance(4, rank).update(torch.ones(5, 4))
    x = HAVE_NO_MEMORY[kind]()
    with pytest.raises(ValueError, match="x has no memory"):
        state.update(x)
    assert state.count == 5 and state.mean.tolist() == [1.0] * 4


def test_a_state_that_was_taken_elsewhere_is_named() -> None:
    """Earlier versions passed a null address to the core."""
    state = scalpel.StreamingCovariance(4).update(torch.ones(5, 4))
    state._state._mean = state._state._mean.to("meta")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the state's mean, of shape \(4,\), is on meta"):
        state.update(torch.ones(5, 4))


def test_the_rules_refuse_what_is_elsewhere() -> None:
    weight = SparseWeight.from_dense(torch.eye(4))
    lost = SparseWeight(weight.starts.to("meta"), weight.columns, weight.weights, 4)
    x = Lanes.from_rows(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"starts, of shape \(5,\), is on meta"):
        lost.apply(x, None)
    norm = Norm.of(nn.RMSNorm(4), torch.ones(3, 4))
    lost_norm = Norm(norm.normed, norm.rate.to("meta"), norm.gain, False, 4)
    with pytest.raises(ValueError, match="the norm's rate.*is on meta"):
        lost_norm.jvp(x, None)


def test_topk_of_what_has_no_memory() -> None:
    with pytest.raises(ValueError, match="x has no memory"):
        scalpel.keep_topk(released(), 2)
    with pytest.raises(ValueError, match="out has no memory"):
        scalpel.keep_topk(torch.ones(3, 4), 2, out=released())


def test_tangents_with_a_negative_bit() -> None:
    """The memory of such a tensor holds the negated numbers."""
    model = build("plain")
    J = scalpel.jacobian(model, tokens(model), "0.resid_in", "final_resid")
    V = torch.randn(2, *J.source_shape, dtype=torch.float64)
    assert torch.equal(J.jvp(torch._neg_view(V)), J.jvp(-V))
    assert torch.equal(J.vjp(torch._neg_view(V)), J.vjp(-V))
