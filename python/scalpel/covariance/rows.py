"""What a user passes as rows, as the core takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._native import check_device

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rows_of(x: Any, dim: int, cuda: bool = False) -> torch.Tensor:
    """Return x (..., dim) as a tensor (rows, dim) whose last stride is 1, copied only if necessary.

    Args:
        x: The rows, a tensor or a numpy array.
        dim: The width that they must have.
        cuda: Whether they may be on a CUDA device.

    Raises:
        TypeError: If x is of another kind, layout or dtype.
        ValueError: If the width or the device is not allowed.
    """
    if isinstance(x, np.ndarray):
        if x.dtype.type not in (np.float16, np.float32, np.float64):
            raise TypeError(f"x is {x.dtype}; allowed: float16, float32, float64 (bfloat16 as a tensor)")
        x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), copy=_copy_needed(x)))
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; allowed: a torch tensor or a numpy array")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}; allowed: torch.strided (call .to_dense())")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {str(x.dtype).removeprefix('torch.')}; allowed: float16, bfloat16, float32, float64")
    if x.device.type != "cpu" and not (cuda and x.device.type == "cuda"):
        raise ValueError(
            f"x is on {x.device}, but rows are read on the CPU only (for exact covariances also on CUDA devices); "
            "move it with x.cpu()"
        )
    check_device(x, "x")
    if x.dim() < 1 or x.shape[-1] != dim:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., {dim}), as dim is {dim}")
    x = x.detach().resolve_neg().reshape(-1, dim)
    return x if x.stride(-1) == 1 else x.contiguous()


def _copy_needed(x: np.ndarray) -> bool | None:
    """True for arrays that torch cannot or will not share; None leaves the decision to numpy."""
    return True if not x.flags.writeable or any(s < 0 or s % x.itemsize for s in x.strides) else None
