"""The rules on lanes, against their twins on every target, and the arguments they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import SUPPORTED
from lanes_cases import (
    ATTENTION,
    DTYPES,
    LINEAR,
    NORM,
    REFUSED,
    arguments,
    check_attention,
    check_channels_behind_a_norm_take_no_part,
    check_gather_and_scatter,
    check_layer,
    check_linear,
    check_many_keys_and_large_scores,
    check_norm,
    check_rows_and_lanes,
    close,
    index_of,
    random_lanes,
    tangents,
)
from pairs import pairs
from scalpel import _core
from scalpel._native import memory_of
from scalpel.lanes import Linear
from scalpel.reference import lanes as reference_lanes


# In the cases that `pairs` chooses, every shape occurs with every target and every dtype, and every dtype with every
# target.
@pytest.mark.parametrize(("shape", "dtype", "target"), pairs(LINEAR, DTYPES, SUPPORTED), indirect=["target"], ids=str)
def test_linear(shape: tuple[Any, ...], dtype: torch.dtype, target: str) -> None:
    before = _core.kernel_calls()["jvp"][target][1]
    entries = check_linear(shape, dtype)
    ran = _core.kernel_calls()["jvp"][target][1] > before
    assert ran == (entries > 0)


# Threads divide the tokens, so every number of tokens runs with one thread, and with more where there is something to
# divide.
TOKENS_AND_THREADS = [*((n, 1) for n in (0, 1, 15, 16, 17, 40)), (1, 5), (16, 2), (17, 2), (40, 2), (40, 5)]


@pytest.mark.parametrize(
    ("shared_out", "dtype", "target"), pairs(TOKENS_AND_THREADS, DTYPES, SUPPORTED), indirect=["target"], ids=str
)
def test_a_layer_with_tokens_in_the_lanes(shared_out: tuple[int, int], dtype: torch.dtype, target: str) -> None:
    tokens, threads = shared_out
    before = torch.get_num_threads()
    for rows, cols in ((30, 50), (1, 1), (16, 33), (300, 700), (3, 0)):
        calls = _core.kernel_calls()["jvp"][target][1]
        torch.set_num_threads(threads)
        check_layer(tokens, rows, cols, dtype)
        torch.set_num_threads(before)
        assert (_core.kernel_calls()["jvp"][target][1] > calls) == (tokens > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 15, 16])
def test_rows_and_lanes(count: int, dtype: torch.dtype, target: str) -> None:
    check_rows_and_lanes(count, dtype)


def test_sparse_and_dense_weights_agree_and_follow_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(20, 30).double()
    x = random_lanes(4, 20, 6, torch.float64)
    index = index_of(4, 30, 9)
    scale = torch.randn(4, 9, dtype=torch.float64)
    changes = (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.weight[0].zero_(),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(30, 20).double())),
    )
    for change in changes:
        with torch.no_grad():
            change()
        for rows in (None, slice(5, 25)):
            for transposed in (False, True):
                linear = Linear(layer, rows, transposed)
                there = linear.shape[0]
                given = x if not transposed else random_lanes(4, linear.shape[1], 5, torch.float64)
                at = index if (rows, transposed) == (None, False) else index_of(4, there, 9)
                found = []
                for limit in (0.0, 2.0):
                    monkeypatch.setattr("scalpel.lanes.SPARSE_BELOW", limit)
                    found.append(linear.apply(given, at, scale).values)
                close(found[0], found[1])
                dense = reference_lanes.linear(linear.dense())
                expected = reference_lanes.lanes_of([dense(t) for t in tangents(given)], at) * scale[..., None]
                close(found[0], expected)


@pytest.mark.parametrize(
    ("shape", "centered", "dtype", "target"),
    pairs(NORM, [False, True], DTYPES, SUPPORTED),
    indirect=["target"],
    ids=str,
)
def test_norm(shape: tuple[int, int | None], centered: bool, dtype: torch.dtype, target: str) -> None:
    check_norm(*shape, centered, dtype)


def test_channels_behind_a_norm_take_no_part() -> None:
    check_channels_behind_a_norm_take_no_part()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_scatter(dtype: torch.dtype, target: str) -> None:
    check_gather_and_scatter(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "target"), pairs(ATTENTION, DTYPES, SUPPORTED), indirect=["target"], ids=str
)
def test_attention(shape: tuple[Any, ...], dtype: torch.dtype, target: str) -> None:
    check_attention(shape, dtype)


def test_many_keys_and_large_scores() -> None:
    check_many_keys_and_large_scores()


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {**arguments(), **change}
    with pytest.raises(kind, match=message):
        _core.linear_lanes(**{n: memory_of(v) if isinstance(v, Tensor) else v for n, v in given.items()})
