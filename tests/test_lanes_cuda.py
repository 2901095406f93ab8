"""The rules on lanes on a GPU, against their twins on the cases of test_lanes.py; without a GPU, by the stand-in."""

from types import ModuleType
from typing import Any

import pytest
import torch

import scalpel
import test_lanes as lanes
from circuitgpt_cases import build, tokens, torch_func
from cuda_stand_in import Gpu
from scalpel._memory import memory_of


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
        lanes.test_rows_and_lanes(count, dtype, "")


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("entries", [None, 0, 1, 9])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_norm(width: int, entries: int | None, centred: bool, dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.test_norm(width, entries, centred, dtype, "")


def test_channels_behind_a_norm_take_no_part(gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.test_channels_behind_a_norm_take_no_part()


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
def test_gather_and_scatter(dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.test_gather_and_scatter(dtype, "")


@pytest.mark.parametrize("dtype", lanes.DTYPES, ids=str)
@pytest.mark.parametrize("shape", lanes.ATTENTION, ids=str)
def test_attention(shape: tuple[Any, ...], dtype: torch.dtype, gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.test_attention(shape, dtype, "")


def test_many_keys_and_large_scores(gpu: Gpu) -> None:
    with torch.device(gpu.device):
        lanes.test_many_keys_and_large_scores()


# What is seen without reading the GPU's memory; what an index holds is not looked at there.
SEEN = ("dtype", "lanes", "tokens", "index dtype", "strided", "scale", "half")


@pytest.mark.parametrize("name", SEEN)
def test_refused(name: str, stand_in: ModuleType) -> None:
    change, kind, message = lanes.REFUSED[name]
    given = {**lanes.arguments(), **change}
    memory = {n: memory_of(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    with pytest.raises(kind, match=message):
        stand_in.linear_lanes(**memory, queue=(0, 0))


@pytest.mark.parametrize("case", ["like_csp_yolo2", "positions_concatenated_rms", "plain"])
def test_the_jacobian_of_a_model(case: str, gpu: Gpu) -> None:
    """The whole engine on the GPU's kernels, against torch.func."""
    model = build(case)
    ids = tokens(model)
    with torch_func(model):
        expected = scalpel.jacobian(model, ids)
        V, U = (torch.randn(3, *shape, dtype=torch.float64) for shape in (expected.source_shape, expected.target_shape))
        right, back = expected.jvp(V), expected.vjp(U)
    model, ids, V, U = (part.to(gpu.device) for part in (model, ids, V, U))
    found = scalpel.jacobian(model, ids)
    lanes.close(found.jvp(V).cpu(), right)
    lanes.close(found.vjp(U).cpu(), back)
