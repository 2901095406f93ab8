"""The rules on lanes on a GPU, against their twins on the cases of lanes_cases.py; without a GPU, on the stand-in."""

from types import ModuleType
from typing import Any

import pytest
import torch

import lanes_cases as lanes
import scalpel
from circuitgpt_cases import build, tokens, torch_func
from cuda_stand_in import Gpu
from pairs import pairs
from scalpel._native import memory_of


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("shape", lanes.LINEAR, ids=str)
def test_linear(shape: tuple[Any, ...], dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_linear(shape, dtype)


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_a_layer(tokens: int, dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        for rows, cols in ((30, 50), (1, 1), (16, 33), (150, 300), (3, 0)):
            lanes.check_layer(tokens, rows, cols, dtype)


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 15, 16])
def test_rows_and_lanes(count: int, dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_rows_and_lanes(count, dtype)


@pytest.mark.parametrize(("shape", "centered", "dtype"), pairs(lanes.NORM, [False, True], lanes.DTYPES), ids=str)
def test_norm(shape: tuple[int, int | None], centered: bool, dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_norm(*shape, centered, dtype)


def test_channels_behind_a_norm_take_no_part(gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_channels_behind_a_norm_take_no_part()


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
def test_gather_and_scatter(dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_gather_and_scatter(dtype)


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("shape", lanes.ATTENTION, ids=str)
def test_attention(shape: tuple[Any, ...], dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_attention(shape, dtype)


def test_many_keys_and_large_scores(gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.check_many_keys_and_large_scores()


# The errors that are detected without reading GPU memory; the contents of an index are not checked there.
SEEN = ("dtype", "lanes", "tokens", "index dtype", "strided", "scale", "half")


@pytest.mark.parametrize("name", SEEN)
def test_refused(name: str, stand_in: ModuleType) -> None:
    change, kind, message = lanes.REFUSED[name]
    given = {**lanes.arguments(), **change}
    memory = {n: memory_of(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    with pytest.raises(kind, match=message):
        stand_in.linear_lanes(**memory, queue=(0, 0))


def test_tensors_of_two_devices_are_refused() -> None:
    weight = lanes.SparseWeight.from_dense(torch.eye(4))
    x = lanes.Lanes(torch.empty(3, 4, 16, device="meta"), None, 4)
    with pytest.raises(ValueError, match="one tensor is on meta, another on cpu"):
        weight.apply(x, None)


# ---- only on a real GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["like_csp_yolo2", "positions_concatenated_rms", "plain"])
def test_the_jacobian_of_a_model(case: str, cuda: torch.device) -> None:
    """The whole engine against torch.func; test_elsewhere.py tests it without a GPU."""
    model = build(case)
    ids = tokens(model)
    with torch_func(model):
        expected = scalpel.jacobian(model, ids)
        V, U = (torch.randn(3, *shape, dtype=torch.float64) for shape in (expected.source_shape, expected.target_shape))
        right, back = expected.jvp(V), expected.vjp(U)
    model, ids, V, U = (part.to(cuda) for part in (model, ids, V, U))
    found = scalpel.jacobian(model, ids)
    lanes.close(found.jvp(V).cpu(), right)
    lanes.close(found.vjp(U).cpu(), back)


def test_the_rules_captured_in_a_graph(cuda: torch.device) -> None:
    """Each op can be captured in a graph and replayed on other tangents."""
    with torch.device("cuda"):
        weight = lanes.SparseWeight.from_dense(lanes.sparse_matrix(48, 64, 0.2, torch.float32))
        norm = lanes.Norm.of(torch.nn.RMSNorm(48), torch.randn(20, 48))
        q, k, v = (torch.randn(1, 20, 48) for _ in range(3))
        allowed = torch.ones(1, 20, 20, dtype=torch.bool).tril()
        twin = lanes.reference_lanes.attend(4, 4, allowed, None, 0.3)
        at = lanes.Attention(q, k, v, twin(q, k, v).contiguous(), allowed, None, 4, 4, 0.3)
        rows = torch.randn(16, 20, 64)

    def through() -> torch.Tensor:
        moved = norm.jvp(weight.apply(lanes.Lanes.from_rows(rows), None), None)
        back = at.vjp(at.jvp(moved, moved, moved), None, None, None)
        return sum((part.values for part in back), torch.zeros_like(back[0].values))

    through()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = through()
    for _ in range(3):
        rows.copy_(torch.randn_like(rows))
        graph.replay()
        lanes.close(found, through())


def test_a_jacobian_made_on_one_stream_and_used_on_others(cuda: torch.device) -> None:
    model = build("like_csp_yolo2").to(cuda)
    J = scalpel.jacobian(model, tokens(model).to(cuda))
    V = torch.randn(5, *J.source_shape, dtype=torch.float64, device=cuda)
    expected = J.jvp(V)
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(J.jvp(V))
    torch.cuda.synchronize()
    for each in found:
        lanes.close(each, expected)


def test_no_autocast_of_the_gpu(cuda: torch.device) -> None:
    model = build("plain", torch.float32).to(cuda)
    ids = tokens(model).to(cuda)
    V = torch.randn(2, 2, 7, model.config.d_model, device=cuda)
    expected = scalpel.jacobian(model, ids).jvp(V)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        lanes.close(scalpel.jacobian(model, ids).jvp(V), expected)
