"""The benchmark verifies before it times, times all contenders, and reports its environment."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from scalpel import StreamingCovariance
from scalpel import topk as ops
from scalpel.cli import bench
from scalpel.jacobians.operator import Jacobian


@contextmanager
def one_thread() -> Iterator[None]:
    """Use small sizes: on a shared machine, threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_quick_run_gives_medians_and_ratios_as_json() -> None:
    seen: list[tuple[str, float]] = []
    with one_thread():
        report = bench.run(quick=True, progress=lambda what, done: seen.append((what, done)))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [c["name"] for c in report["cases"]] == ["keep_topk", "StreamingCovariance.update", "jacobian(...).jvp"]
    for case in report["cases"]:
        median = case["median_ms"]
        assert all(median[who] > 0 for who in bench.CONTENDERS)
        assert case["speedup"] == median["peer"] / median["ours"]
        assert case["over_floor"] == median["ours"] / median["floor"]
        low, high = case["speedup_quartiles"]
        assert 0 < low <= high
        assert case["peer"] and case["floor"] and case["shape"]
        assert case["device"] == report["device"] == "cpu"
    assert "non-zero weights" in report["cases"][2]["note"]
    assert {"torch", "target", "threads", "processor", "cores"} <= report["environment"].keys()
    done = [d for _, d in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 1


def _wrong_keep(x: torch.Tensor, k: int, by: str = "magnitude", out: Any = None) -> torch.Tensor:
    return out.copy_(x)  # wrong on purpose: keeps everything


def _wrong_update(self: StreamingCovariance, x: torch.Tensor) -> StreamingCovariance:
    return _RIGHT_UPDATE(self, x * 1.001)


_RIGHT_UPDATE = StreamingCovariance.update


def _wrong_jvp(self: Jacobian, v: torch.Tensor) -> torch.Tensor:
    return torch.zeros(v.shape[0], *self.target_shape)


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "message"),
    [
        (ops, "keep_topk", _wrong_keep, "keep_topk and torch differ in"),
        (StreamingCovariance, "update", _wrong_update, "our covariance is"),
        (Jacobian, "jvp", _wrong_jvp, r"jvp is .* off vmap\(jvp\)"),
    ],
)
def test_a_wrong_answer_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any, message: str
) -> None:
    def never(*_: Any) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(bench, "_timed", never)
    with one_thread(), pytest.raises(bench.WrongAnswer, match=message):
        bench.run(quick=True)


def test_nan_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jacobian, "jvp", lambda self, v: torch.full((len(v), *self.target_shape), torch.nan))
    with one_thread(), torch.no_grad(), pytest.raises(bench.WrongAnswer):
        bench.jacobian_jvp(quick=True).check()


def test_every_contender_is_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    case = replace(
        bench.keep_topk(quick=True),
        ours=lambda: calls.append("ours"),
        peer=lambda: calls.append("peer"),
        floor=lambda: calls.append("floor"),
    )
    monkeypatch.setattr(bench, "_repeats", lambda function, device: 1)
    bench._timed(case, rounds=3, device="cpu")
    assert [calls[i] for i in (0, 3, 6)] == ["ours", "peer", "floor"]  # each round starts with another contender
    assert all(sorted(calls[i : i + 3]) == ["floor", "ours", "peer"] for i in (0, 3, 6))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="'abacus', which PyTorch does not have"):
        bench.run(quick=True, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda', which PyTorch does not have"):
            bench.run(quick=True, device="cuda")
