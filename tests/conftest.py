"""Fixtures for every test."""

from collections.abc import Iterator

import pytest
import torch  # before the core, so that both share one OpenMP

from scalpel import _core

pytest_plugins = ["analysis_cases", "cuda_stand_in", "smollm2"]

SUPPORTED = [t["name"] for t in _core.targets() if t["supported"]]


@pytest.fixture(params=SUPPORTED)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU target that runs here, forced."""
    _core.force_target(request.param)
    yield request.param
    _core.force_target("")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
