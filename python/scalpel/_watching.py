"""Who would see an op on a tensor: transforms, modes, traces, profilers. Where nobody would, dispatch is skipped."""

from __future__ import annotations

import torch
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["transformed", "untraced", "unwatched"]


def transformed(x: torch.Tensor) -> bool:
    """Whether x is inside a transform of torch.func or carries a tangent of forward AD."""
    # Ask x itself: a compiled graph enters the level of forward AD without telling torch.autograd.forward_ad.
    return torch._C._are_functorch_transforms_active() or torch._unpack_dual(x, level=0).tangent is not None


def unwatched(x: torch.Tensor) -> bool:
    """Whether x is a plain tensor in eager mode, so that no transform, mode, trace or profiler has to see the op.

    Torch does not say whether an ExecutionTraceObserver is active, so such an observer does not see the plain call.
    """
    return untraced(x) and not torch.autograd._profiler_enabled()


def untraced(x: torch.Tensor) -> bool:
    """Whether nothing but a profiler could observe an op on x."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and (x.is_cpu or x.is_cuda)
        and not transformed(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and _len_torch_dispatch_stack_pre_dispatch() == 0
        and not (torch._C._is_torch_function_mode_enabled() and _mode_watches())
        and torch._C._get_tracing_state() is None
    )


def _mode_watches() -> bool:
    """Whether a torch function mode would see the op.

    A default device is such a mode, too, but it only decides where new tensors go.
    """
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
