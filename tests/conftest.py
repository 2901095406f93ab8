"""Fixtures for every test, and the distribution of tests over processes."""

import gc
import os
from collections.abc import Iterator
from contextlib import suppress

if "PYTEST_XDIST_WORKER" in os.environ:  # with several processes, more threads only compete
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when it is imported

import hypothesis
import pytest
import torch  # before the core, so that both share one OpenMP

from cases import SUPPORTED
from scalpel import _core

with suppress(ImportError):  # once and here, since its extension can't be initialised twice in a process
    import libsemigroups_pybind11  # noqa: F401

pytest_plugins = ["analysis_cases", "cuda_stand_in", "smollm2"]

# Hypothesis draws the same inputs in every run and sets no deadline, so that a busy machine fails no test.
# `--hypothesis-profile=default` draws new inputs.
hypothesis.settings.load_profile("ci")


# The files that take longest start first, so that no process is left with one of them at the end.
FIRST = [
    "test_build.py",
    "test_shipped.py",
    "test_topk_cuda.py",
    "test_smollm2.py",
    "test_circuits.py",
    "test_analysis_spectra.py",
    "test_wrapped.py",
    "test_jacobian_decoders.py",
    "test_experiments.py",
    "test_extraction.py",
    "test_topk_compiled.py",
    "test_elsewhere.py",
    "test_analysis_kept.py",
    "test_sweep.py",
    "test_distributed.py",
    "test_topk.py",
    "test_transformers_classes.py",
    "test_cli_errors.py",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "cuda" in fixtures:
            item.add_marker(pytest.mark.gpu)
        if "stand_in" in fixtures:
            item.add_marker(pytest.mark.native)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the million objects of imported libraries out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep the tests of a file, or of an `xdist_group`, in one process, so that what they share is built once."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFileOrGroup(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group: str = super()._split_scope(nodeid)
            return group if group != nodeid else nodeid.partition("::")[0]

    return ByFileOrGroup(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.fixture(params=SUPPORTED)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each CPU target that runs here, one per test."""
    _core.force_target(request.param)
    yield request.param
    _core.force_target("")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
