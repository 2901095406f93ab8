"""The native core: the module of each device, tensors and arrays as memory, and new memory for results.

No other file imports the compiled modules.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

import scalpel._core as cpu_core  # after torch, so that both share one OpenMP

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


def memory_of(x: torch.Tensor, name: str = "a tensor", on: torch.device | None = None) -> Memory:
    """Describe a tensor as the core takes it; the tensor must outlive the call.

    The core reads whatever is at an address and cannot tell what that is, so every tensor passes through this check.

    Args:
        x: The tensor.
        name: What an error message calls x.
        on: The device of the operation; None means the CPU.

    Returns:
        The address, the name of the dtype, the shape, and the strides in elements.

    Raises:
        ValueError: If x is on another device, or has no memory (a fake tensor, a tensor inside a transform of
            torch.func, or one whose storage was released).
        TypeError: If the core does not know the dtype.
    """
    if not (x.is_cpu if on is None else x.device == on):
        raise ValueError(_is_elsewhere(x, name, on))
    try:
        address = x.data_ptr()
        memory = address, DTYPE_NAMES[x.dtype], tuple(x.shape), x.stride()
    except KeyError:
        raise TypeError(f"{name} is {x.dtype}; the core knows {', '.join(DTYPE_NAMES.values())}") from None
    except RuntimeError as error:
        raise ValueError(_has_no_memory(x, name)) from error
    if not address and x.numel():
        raise ValueError(_has_no_memory(x, name))
    return memory


def memory_of_array(x: np.ndarray, name: str = "an array") -> Memory:
    """Describe a numpy array, which is always on the CPU, as `memory_of` describes a tensor.

    Raises:
        ValueError: If its strides are not whole elements.
    """
    x = np.asarray(x)  # a subclass may override what is read here
    if any(s % x.itemsize for s in x.strides):
        raise ValueError(
            f"{name} has strides {x.strides} in bytes, which are not whole elements of {x.itemsize}: pass a copy"
        )
    strides = tuple(s // x.itemsize for s in x.strides)
    return x.__array_interface__["data"][0], str(x.dtype), x.shape, strides


def writeable(out: Any) -> torch.Tensor:
    """Return a tensor that shares out's memory."""
    if isinstance(out, torch.Tensor):
        return out
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out must be writeable")
        return torch.from_numpy(out)
    shared = from_dlpack(out, "out")
    if shared.data_ptr() != from_dlpack(out, "out").data_ptr():
        raise TypeError(
            f"out (a {type(out).__name__}) exports only a copy of itself through DLPack, so it cannot be written to"
        )
    return shared


def from_dlpack(x: Any, name: str) -> torch.Tensor:
    """Return a tensor that shares the memory of an array that supports DLPack."""
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} is a {type(x).__name__}, which does not support DLPack")
    try:
        return torch.from_dlpack(x)
    except Exception as error:  # other libraries raise errors of any kind
        raise TypeError(f"{name} (a {type(x).__name__}) cannot be read through DLPack: {error}") from error


def _is_elsewhere(x: torch.Tensor, name: str, on: torch.device | None) -> str:
    expected = "cpu" if on is None else str(on)
    if x.device.type == "meta":
        return (
            f"{name}, of shape {tuple(x.shape)}, is on meta, where tensors have a shape but no numbers, and it is "
            f"needed on {expected}: make it with device={expected!r}. A tensor made without a device is put on meta by "
            'torch.set_default_device("meta") and by torch.device("meta") as a context'
        )
    return f"{name} is on {x.device}, and the operation runs on {expected}; move it there with .to({expected!r})"


def _has_no_memory(x: torch.Tensor, name: str) -> str:
    return (
        f"{name} has no memory that can be read: it is a {type(x).__name__} of shape {tuple(x.shape)} that is fake, "
        "stands for another tensor inside a transform (torch.func, vmap, functionalization), or whose storage was "
        "released. Pass an ordinary tensor that holds numbers"
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Allocate a tensor whose values are not set.

    Large tensors on the CPU are put on huge pages if the system provides them, because page faults would cost more than
    writing the values.
    """
    fresh = torch.empty(shape, dtype=dtype, device=device)
    if fresh.numel() >= 1 << 19 and fresh.is_cpu:
        cpu_core.prefer_huge_pages(memory_of(fresh, "a new tensor")[0], fresh.nbytes)
    return fresh


# ---- where an op runs --------------------------------------------------------------------------


def core_of(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, Any]:
    """Find the module with the ops for x's device, and the last argument that its ops take.

    Returns:
        The module, and the number of threads (CPU) or the device's index and stream (GPU).

    Raises:
        ValueError: If no op runs on x's device, or one of ``others`` is on another device: an op receives addresses
            only and could not tell.
    """
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"one tensor is on {x.device}, another on {other.device}; move them to one device")
    if x.is_cpu:
        return cpu_core, torch.get_num_threads()
    check_device(x, "a tensor")
    return cuda_core(), (x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


@cache
def _imported(name: str) -> Any:
    return import_module(name)


def cuda_core() -> Any:
    """Return the module with the ops for GPUs.

    Raises:
        ImportError: If this build does not contain it.
    """
    return _imported("scalpel._cuda")


def runs_on(device: torch.device) -> bool:
    """Whether this build has ops for a device."""
    if device.type == "cuda":
        try:
            cuda_core()
        except ImportError:
            return False
    return device.type in ("cpu", "cuda")


def device_named(name: str | torch.device) -> torch.device:
    """Resolve a device given as "cpu", "cuda" or "cuda:1", or as a torch.device.

    Raises:
        ValueError: If PyTorch does not have the device on this machine, or no op runs on it.
    """
    try:
        device = torch.empty(0, dtype=torch.uint8, device=name).device
    except (AssertionError, RuntimeError) as error:  # an unknown kind, PyTorch without CUDA, no driver, no such GPU
        raise ValueError(f"device is {str(name)!r}, which PyTorch does not have on this machine: {error}") from error
    if not runs_on(device):
        raise ValueError(f"device is {str(name)!r}, but {_why_not(device)}")
    return device


def check_device(x: torch.Tensor, name: str) -> None:
    """Check that ops can run on x's device.

    Raises:
        ValueError: If they cannot.
    """
    if x.device.type != "meta" and not runs_on(x.device):
        raise ValueError(f"{name} is on {x.device}, but {_why_not(x.device)}; move it with {name}.cpu()")


def _why_not(device: torch.device) -> str:
    if device.type == "cuda":
        return "this build runs on the CPU only, because nvcc was not found when it was installed"
    return "there are kernels for the CPU and for CUDA only"
