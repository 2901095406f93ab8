"""A simulated device: tensors that claim to be on cuda:0 and compute on the CPU.

PyTorch's own rules hold: an operation on tensors of both devices is an error, and so is reading the memory as CPU
memory, unless `.cpu()` brought it there. Together with the stand-in for the kernels (cuda_stand_in.py), this tests the
package's whole GPU path on a machine without a GPU. It cannot reveal concurrency on streams, reuse of memory, or
running times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_TAG = 1 << 62  # added to addresses on DEVICE, so that only a kernel of the device can read them
_T = torch.Tensor
# Operations that return numbers to Python, from any device.
TO_PYTHON = {
    _T.tolist,
    _T.item,
    _T.__bool__,
    _T.__int__,
    _T.__float__,
    _T.__index__,
    _T.__complex__,
    torch.equal,
    _T.equal,
}
# Operations that may read a tensor of the other device: copies, and look-ups, whose indices may be on the CPU.
MAY_MIX = {_T.copy_, _T.__getitem__, _T.__setitem__}
ABOUT_THE_DEVICE = {_T.device.__get__, _T.is_cuda.__get__, _T.is_cpu.__get__, _T.data_ptr, _T.__repr__}  # type: ignore


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE whose numbers are in ``inner``. It is created only within Factories."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        address = self.inner.data_ptr()
        return address | _TAG if address else 0

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} came by Factories")


def bare(x: Any) -> Any:
    """The same value on the CPU; DEVICE itself becomes the CPU."""
    if isinstance(x, Elsewhere):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device | str) and there(x) else x


def elsewhere(x: Any) -> Any:
    """Move a CPU tensor, or a model with everything it contains, to DEVICE."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = elsewhere(parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = elsewhere(buffer)
        return x
    if not isinstance(x, torch.Tensor) or isinstance(x, Elsewhere):
        return x
    return Elsewhere(x.detach().requires_grad_(x.requires_grad) if isinstance(x, nn.Parameter) else x)


class Factories(TorchFunctionMode):
    """Run every PyTorch function on DEVICE too."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}
        named = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, torch.device | str) and is_device(x)]
        if func in ABOUT_THE_DEVICE or not (wrappers or any(there(x) for x in named)):
            return func(*args, **kwargs)
        if func in (_T.numpy, _T.__array__):
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; use .cpu() first")
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"{func}: the generator is on the CPU, and the numbers would be on {DEVICE}")
        if wrappers and func not in MAY_MIX:
            for x in tensors:
                if not isinstance(x, Elsewhere) and x.dim() > 0 and func is not _T.to:
                    raise RuntimeError(f"{func}: all tensors should be on one device, but found cpu and {DEVICE}")
        if func in (_T.__getitem__, _T.__setitem__) and wrappers and not isinstance(args[0], Elsewhere):
            raise RuntimeError(f"{func}: indices and values should be on the CPU, as what is indexed; found {DEVICE}")
        here = func is _T.cpu or (bool(named) and not any(there(x) for x in named)) or func in TO_PYTHON
        here = here or (func is _T.copy_ and not isinstance(args[0], Elsewhere))
        found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if here:
            return found
        return tree_map(lambda x: wrappers[id(x)] if id(x) in wrappers else elsewhere(x), found)


def is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or x.split(":")[0] in ("cpu", "cuda")


def there(x: Any) -> bool:
    """Whether x names DEVICE as a device."""
    if isinstance(x, str):
        return x.split(":")[0] == "cuda"
    return isinstance(x, torch.device) and x.type == "cuda"


def _may_change_in_place(input: torch.Tensor, from_: torch.Tensor) -> bool:
    """The part of a parameter that Module.to reads; names and types are PyTorch's."""
    return isinstance(input, Elsewhere) == isinstance(from_, Elsewhere)


class Kernels:
    """The ops of ``core``, restricted to memory of DEVICE."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._core, name)
        if not callable(op):
            return op
        return lambda *args, **kwargs: op(*map(_read, args), **{key: _read(value) for key, value in kwargs.items()})


def _read(argument: Any) -> Any:
    """Convert memory on DEVICE to what the core takes, with a real address. An address of the CPU is an error."""
    if isinstance(argument, tuple) and len(argument) == 4 and isinstance(argument[1], str):
        assert argument[0] == 0 or argument[0] & _TAG, f"a kernel was given memory of the CPU: {argument}"
        return (argument[0] & ~_TAG, *argument[1:])
    return type(argument)(map(_read, argument)) if isinstance(argument, (list, tuple)) else argument


@contextmanager
def device_with(core: Any, monkeypatch: Any) -> Iterator[None]:
    """Make DEVICE available, with `core` as its ops."""
    kernels = Kernels(core)
    monkeypatch.setattr("scalpel._native._imported", lambda name: kernels)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", _may_change_in_place)
    with Factories():
        yield
