"""The kernels that read the rows of a covariance: the stand-in on CPU tensors, and a GPU where there is one."""

import pytest
import torch
from torch import Tensor

from covariance_states import gram_bound, within
from cuda_stand_in import Gpu
from scalpel._native import Memory, memory_of
from scalpel.covariance import on_device
from scalpel.covariance.on_device import OnDevice

NARROW = [torch.float16, torch.bfloat16, torch.float32]
DTYPES = [*NARROW, torch.float64]
where = torch.device("cpu")  # the device of the running test


@pytest.fixture(autouse=True)
def _kernels(gpu: Gpu) -> None:
    global where
    where = torch.empty(0, device=gpu.device).device


def memory(x: Tensor) -> Memory:
    """The queue for an op on the device of x."""
    return memory_of(x, on=x.device)


def gram_lower(x: Tensor, shift: Tensor | None, scatter: Tensor, splits: int) -> None:
    core, place = on_device.core_of(x)
    core.gram_lower(memory(x), None if shift is None else memory(shift), memory(scatter), splits, place)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", NARROW)
def test_gram_lower(splits: int, dtype: torch.dtype, gpu: Gpu) -> None:
    """Shapes around the sizes of tiles and slabs, any alignment, with or without a shift; the upper triangle stays."""
    for rows, dim, left in [(1, 1, 0), (2, 7, 1), (31, 63, 1), (32, 64, 0), (33, 65, 0), (5, 300, 3), (0, 4, 0)]:
        x = torch.randn(rows, dim + 4).to(where, dtype)[:, left : left + dim]
        for shift in (None, torch.randn(dim).to(where)):
            upper = torch.ones(dim, dim, dtype=torch.bool, device=where).triu(1)
            start = torch.randn(dim, dim, dtype=torch.float64).to(where)
            scatter = start.masked_fill(upper, float("nan"))
            gram_lower(x, shift, scatter, splits)
            assert scatter[upper].isnan().all()
            apart = x.float() if shift is None else x.float() - shift
            apart = (apart.bfloat16() if splits == 1 else apart).double()
            bound = gram_bound(apart, splits, gpu.real) + 2.0**-52 * start.abs()  # the result is added to it in float64
            assert within((scatter - start).masked_fill(upper, 0.0), (apart.T @ apart).tril(), bound)


def test_what_gram_lower_refuses() -> None:
    x, shift = torch.ones(4, 6).to(where), torch.ones(6).to(where)
    scatter = torch.zeros(6, 6, dtype=torch.float64, device=where)
    for arguments, kind, words in (
        ((x.double(), shift, scatter, 3), TypeError, "x is float64"),
        ((x[:, ::2], None, scatter[:3, :3].contiguous(), 3), ValueError, "stride 1"),
        ((x, shift[:5], scatter, 3), ValueError, "shift must be"),
        ((x, shift.double(), scatter, 3), ValueError, "shift must be"),
        ((x, shift, scatter.float(), 3), ValueError, "scatter must be"),
        ((x, shift, scatter[:5], 3), ValueError, "scatter must be"),
        ((x, shift, scatter, 2), ValueError, "splits is 2"),
    ):
        with pytest.raises(kind, match=words):
            gram_lower(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums(dtype: torch.dtype) -> None:
    """Sizes around that of a chunk, every alignment, and outputs that start as NaN."""
    core, place = on_device.core_of(torch.empty(0, device=where))
    chunk = core.COLUMN_SUMS_ROWS
    for rows, dim, left in [(1, 1, 0), (63, 7, 1), (64, 64, 0), (65, 130, 2), (200, 1100, 0), (3, 16, 8), (130, 33, 3)]:
        x = torch.randn(rows, dim + 8).to(where, dtype)[:, left : left + dim]
        sums = torch.full((-(-rows // chunk), dim), float("nan"), dtype=torch.float64, device=where)
        told = torch.tensor([rows, 0.0, 0.0], dtype=torch.float64, device=where)
        core.column_sums(memory(x), 1e4, memory(sums), memory(told), place)
        apart = x.double() - x[0].double()
        expected = torch.stack([part.sum(dim=0) for part in apart.split(chunk)])
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
        first, size, farthest = told.tolist()
        assert first == rows and size == float(x.abs().max())
        assert farthest == pytest.approx(float(apart.abs().max()), rel=1e-6)
    for value in (float("nan"), float("inf"), -2e4):
        x = torch.randn(150, 40).to(where, dtype)
        x[[149, 70, 71], [3, 39, 0]] = value
        told = torch.tensor([150, 0.0, 0.0], dtype=torch.float64, device=where)
        sums = torch.empty(3, 40, dtype=torch.float64, device=where)
        core.column_sums(memory(x), 1e4, memory(sums), memory(told), place)
        assert told[0] == 70


def test_many_states_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    stacked = torch.stack
    monkeypatch.setattr(on_device.torch, "stack", lambda parts, **by: waits.append(len(parts)) or stacked(parts, **by))
    x = [torch.randn(rows, dim).to(where) for rows, dim in ((50, 4), (0, 3), (70, 9))]
    states = [OnDevice(part.shape[1], False, where) for part in x]
    assert on_device.update_all(states, x) == [-1, -1, -1] and [state.count for state in states] == [50, 0, 70]
    assert waits == [2]
    x[2][33, 1] = float("nan")
    assert on_device.update_all(states, x) == [-1, -1, 33] and [state.count for state in states] == [100, 0, 70]


def test_captured_in_a_graph(gpu: Gpu, cuda: torch.device) -> None:
    """The kernels can be captured in a graph and replayed on other rows."""
    core, _ = on_device.core_of(torch.empty(0, device=cuda))
    x, sums = torch.randn(300, 48, device=cuda), torch.empty(5, 48, dtype=torch.float64, device=cuda)
    scatter, told = (
        torch.zeros(48, 48, dtype=torch.float64, device=cuda),
        torch.zeros(3, dtype=torch.float64, device=cuda),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, place = on_device.core_of(x)  # the capturing stream
        scatter.zero_()
        core.column_sums(memory(x), 1e9, memory(sums), memory(told), place)
        core.gram_lower(memory(x), None, memory(scatter), 3, place)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert within(scatter.tril(), (x.double().T @ x.double()).tril(), gram_bound(x, 3, True))
        torch.testing.assert_close(sums.sum(dim=0), (x.double() - x[0].double()).sum(dim=0))
