"""The native core: the module with the ops of each device, tensors and arrays as it takes them, memory for its results.

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
    """x as the core takes it; x must outlive the call.

    The core reads what stands at an address and can't see what that is, so every tensor goes to it through here.
    ``name``: what an error calls x. ``on``: the device of the operation; the CPU if not given.

    Raises ValueError where x is elsewhere, or has no memory (a fake tensor, one inside a transform of torch.func, one
    whose storage was released), and TypeError for a dtype that the core doesn't know.
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
    """The same of a numpy array, which is always on the CPU. ValueError where its strides aren't whole elements."""
    x = np.asarray(x)  # a subclass may say anything of itself
    if any(s % x.itemsize for s in x.strides):
        raise ValueError(
            f"{name} has strides {x.strides} in bytes, which aren't whole elements of {x.itemsize}: give a copy of it"
        )
    strides = tuple(s // x.itemsize for s in x.strides)
    return x.__array_interface__["data"][0], str(x.dtype), x.shape, strides


def _is_elsewhere(x: torch.Tensor, name: str, on: torch.device | None) -> str:
    there = "cpu" if on is None else str(on)
    if x.device.type == "meta":
        return (
            f"{name}, of shape {tuple(x.shape)}, is on meta, where tensors have a shape and no numbers, and it is "
            f"needed on {there}: make it with device={there!r}. A tensor made without a device is put on meta by "
            'torch.set_default_device("meta") and by torch.device("meta") as a context'
        )
    return f"{name} is on {x.device}, and the operation runs on {there}; move it there with .to({there!r})"


def _has_no_memory(x: torch.Tensor, name: str) -> str:
    return (
        f"{name} has no memory that can be read: it is a {type(x).__name__} of shape {tuple(x.shape)} that is fake, "
        "stands for another tensor inside a transform (torch.func, vmap, functionalization), or whose storage was "
        "released. Give an ordinary tensor with numbers"
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Fresh memory. That of the CPU is on huge pages if it is large and the system gives them: page faults would cost
    more than what is written there."""
    fresh = torch.empty(shape, dtype=dtype, device=device)
    if fresh.numel() >= 1 << 19 and fresh.is_cpu:
        cpu_core.prefer_huge_pages(memory_of(fresh, "a new tensor")[0], fresh.nbytes)
    return fresh


# ---- where an op runs --------------------------------------------------------------------------


def core_of(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, Any]:
    """The module with the ops for x's device, and what its ops take last: how many threads, or (device, stream).

    ValueError where there is none, or where one of ``others`` is on another device: an op is given addresses alone.
    """
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"one tensor is on {x.device}, another on {other.device}; move them to one device")
    if x.is_cpu:
        return cpu_core, torch.get_num_threads()
    check_device(x, "a tensor")
    return cuda_core(), (x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


@cache
def _found(name: str) -> Any:
    return import_module(name)


def cuda_core() -> Any:
    """The module with the ops for GPUs. ImportError where it wasn't built."""
    return _found("scalpel._cuda")


def runs_on(device: torch.device) -> bool:
    """Whether there are ops for that device."""
    if device.type == "cuda":
        try:
            cuda_core()
        except ImportError:
            return False
    return device.type in ("cpu", "cuda")


def device_named(name: str | torch.device) -> torch.device:
    """ "cpu", "cuda" or "cuda:1" as a device. ValueError where it isn't there, or no op runs on it."""
    try:
        there = torch.empty(0, dtype=torch.uint8, device=name).device
    except (AssertionError, RuntimeError) as error:  # no such kind, PyTorch without CUDA, no driver, no such GPU
        raise ValueError(f"device is {str(name)!r}, and PyTorch has none such here: {error}") from error
    if not runs_on(there):
        raise ValueError(f"device is {str(name)!r}, but {_why_not(there)}")
    return there


def check_device(x: torch.Tensor, name: str) -> None:
    """ValueError where no op runs on x's device."""
    if x.device.type != "meta" and not runs_on(x.device):
        raise ValueError(f"{name} is on {x.device}, but {_why_not(x.device)}; move it with {name}.cpu()")


def _why_not(device: torch.device) -> str:
    if device.type == "cuda":
        return "this build runs on the CPU only: nvcc wasn't found when it was installed"
    return "there are kernels for the CPU and for CUDA only"
