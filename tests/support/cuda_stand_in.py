"""The GPU kernels on a machine without a GPU, and fixtures that use them, or a GPU where there is one.

A C++ compiler builds the kernels against tests/native/host_cuda, which runs their threads on the CPU.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock

import scalpel.covariance.on_device
import scalpel.lanes
import scalpel.topk
from places import ROOT
from scalpel._native import runs_on

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DSCALPEL_BINDS_CUDA", "-DSCALPEL_CUDA_MODULE=stand_in"]
LIBRARY = f"stand_in{sysconfig.get_config_var('EXT_SUFFIX')}"
NO_GPU = "needs a GPU, and a build with nvcc"
# The modules that look up which core a tensor needs.
_CALLERS = (scalpel.topk, scalpel.lanes, scalpel.covariance.on_device)


BINDINGS = ("arrays", "cuda_module", "init_covariance_cuda", "init_jvp", "init_topk")


def sources(folder: Path) -> list[Path]:
    # All sources are compiled as one file, because parsing pybind11 takes the compiler longer than the sources
    # themselves.
    bindings = folder / "bindings.cpp"
    bindings.write_text("".join(f'#include "bindings/{name}.cpp"\n' for name in BINDINGS))
    others = ("csrc/topk/check.cpp", "tests/native/host_cuda/host_cuda.cpp")
    return [bindings, *sorted(ROOT.glob("csrc/**/*_cuda.cu")), *(ROOT / name for name in others)]


def build(folder: Path) -> None:
    """The module of the stand-in, built in ``folder``."""
    import pybind11

    includes = [ROOT / "csrc", ROOT / "tests/native/host_cuda", sysconfig.get_path("include"), pybind11.get_include()]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]

    def compile_(source: Path) -> Path:
        out = folder / f"{source.name}.o"
        _run(COMPILER, *flags, *(["-x", "c++"] if source.suffix == ".cu" else []), "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sources(folder)))
    linked = folder / "linked"
    _run(COMPILER, "-shared", *objects, "-o", linked)
    linked.replace(folder / LIBRARY)  # a move, so that the file is either complete or absent


def loaded(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_in", folder / LIBRARY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


@dataclass(frozen=True)
class Gpu:
    """The device for tensors of the GPU kernels; ``real`` tells whether it is a GPU."""

    device: str
    real: bool


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Build the stand-in once per run: the first process builds it and the others wait."""
    if COMPILER is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a C++ compiler and the source tree")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the folder of the whole run
    folder = folder / "stand_in"
    with FileLock(f"{folder}.lock"):
        if not (folder / LIBRARY).exists():
            folder.mkdir(exist_ok=True)
            build(folder)
    return loaded(folder)


@pytest.fixture(
    params=[pytest.param("stand-in", marks=pytest.mark.native), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The GPU kernels: on the CPU through the stand-in, and on a GPU where there is one."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and runs_on(torch.device("cuda"))):
            pytest.skip(NO_GPU)
        yield Gpu("cuda", True)
        return
    module = request.getfixturevalue("stand_in")
    for caller in _CALLERS:
        monkeypatch.setattr(caller, "core_of", _stands_in(module), raising=False)
    yield Gpu("cpu", False)


def _stands_in(module: ModuleType) -> Callable[..., tuple[ModuleType, tuple[int, int]]]:
    return lambda x, *others: (module, (0, 0))


@pytest.fixture
def cuda() -> torch.device:
    """A GPU; without one the test is skipped."""
    if not (torch.cuda.is_available() and runs_on(torch.device("cuda"))):
        pytest.skip(NO_GPU)
    return torch.device("cuda")
