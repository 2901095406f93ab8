"""The GPU module is built where nvcc is, loads without a driver, and has the same op names as the CPU module."""

import shutil

import pytest
import torch

import scalpel
from scalpel import _core
from scalpel._native import cuda_core, memory_of, runs_on

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
BUILT = runs_on(torch.device("cuda"))
KINDS = ("topk", "mask", "indices", "lanes", "rows", "jvp", "vjp")
OTHERS = {"block_rows", "center_rows"}  # the covariance works differently on a GPU
SHARED = {name for name in dir(_core) if name.rpartition("_")[2] in KINDS} - OTHERS


@pytest.mark.skipif(NVCC is None, reason="nvcc isn't installed")
def test_where_nvcc_is_the_module_is_built() -> None:
    assert BUILT


@pytest.mark.skipif(not BUILT, reason="scalpel was built without nvcc")
def test_it_has_the_cpus_ops() -> None:
    assert {"keep_topk", "linear_lanes", "attention_vjp", "norm_jvp"} <= SHARED
    assert not {name for name in SHARED if not hasattr(cuda_core(), name)}
    assert hasattr(cuda_core(), "gram_lower")


@pytest.mark.skipif(not BUILT or torch.cuda.is_available(), reason="needs a build with nvcc and no GPU")
def test_without_a_gpu_it_says_why() -> None:
    with pytest.raises(RuntimeError, match="no GPU can be used: "):
        cuda_core().device_count()
    with pytest.raises(RuntimeError, match="cudaGetDevice: "):
        cuda_core().keep_topk(memory_of(torch.ones(1, 4)), 1, False, memory_of(torch.ones(1, 4)), (0, 0))
    assert scalpel.show_config()["cuda"].startswith("built; ")
