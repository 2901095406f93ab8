"""Tensors and arrays as the native core takes them, and fresh memory for its results."""

from __future__ import annotations

import numpy as np
import torch

from . import _core

Memory = tuple[int, str, tuple[int, ...], tuple[int, ...]]  # address, dtype, shape, strides in elements

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
    torch.int32: "int32",
    torch.int64: "int64",
}


def memory_of(x: torch.Tensor) -> Memory:
    """x as the core takes it; x must outlive the call."""
    return x.data_ptr(), DTYPE_NAMES[x.dtype], tuple(x.shape), x.stride()


def memory_of_array(x: np.ndarray) -> Memory:
    """The same of a numpy array whose strides are whole elements."""
    strides = tuple(s // x.itemsize for s in x.strides)
    return x.__array_interface__["data"][0], str(x.dtype), x.shape, strides


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fresh CPU memory, on huge pages if it is large and the system gives them: page faults would cost more
    than what is written there."""
    fresh = torch.empty(shape, dtype=dtype, device="cpu")
    if fresh.numel() >= 1 << 19:
        _core.prefer_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh
