"""`pytest benches --benchmark-enable`: the cases of scalpel.cli.bench, checked and then timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalpel._native import runs_on
from scalpel.cli import bench


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Files here are named bench_*.py, so that the tests' own pattern leaves them alone."""
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(params=bench.CONTENDERS)
def contender(request: pytest.FixtureRequest) -> bench.Contender:
    """Ours, the peer and the floor, one after the other."""
    return request.param


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    if request.param == "cuda" and not (torch.cuda.is_available() and runs_on(torch.device("cuda"))):
        pytest.skip("needs a GPU, and a build with nvcc")
    return request.param


@pytest.fixture
def timed(benchmark: Any, contender: bench.Contender, device: str) -> Callable[[bench.Case], None]:
    """Checks a case's answer, then times one contender; its environment stands in pytest-benchmark's JSON."""

    def go(case: bench.Case) -> None:
        with torch.no_grad():
            case.check()
            benchmark.group = f"{case.name} on {device}: {case.shape}"
            benchmark.extra_info |= {
                "peer": case.peer_is,
                "floor": case.floor_is,
                "threads": torch.get_num_threads(),
                "device": device,
            }
            once = case.contender(contender)
            benchmark(once if device == "cpu" else lambda: (once(), torch.cuda.synchronize()))

    return go
