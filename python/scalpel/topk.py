"""TopK along the last dimension: masks, kept values, indices, and the layer that uses them.

Order, ties and NaN follow csrc/topk/topk.h: NaN ranks above every number, -0.0 equals 0.0, and among equal values
the lower index wins. Exactly k entries of every row are kept, and the bits are the same on every CPU target and for
any number of threads.

The mask is a property of the primal, so derivatives treat it as a constant. That is the true derivative wherever one
exists, which is wherever the k-th and the (k+1)-th ranked values differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch

from ._integers import integer
from ._native import (
    DTYPE_NAMES,
    check_device,
    core_of,
    cpu_core,
    empty,
    from_dlpack,
    memory_of,
    memory_of_array,
    writeable,
)
from ._watching import transformed, unwatched

__all__ = ["AbsTopK", "keep_topk", "topk_indices", "topk_mask"]

By = Literal["magnitude", "value"]
Array = TypeVar("Array")

_RESULTS = {"topk_mask": "the mask", "keep_topk": "the kept values", "topk_indices": "the indices"}
_FLOATS = "float16, bfloat16, float32, float64"


def topk_mask(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """Mark the k largest entries of each row along the last dimension.

    Equals ``torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.abs().topk(k).indices, True)`` except for ties, where
    the lower index wins here. NaN ranks above every number, and -0.0 equals 0.0. The mask is not differentiable.

    Args:
        x: An array of shape (..., width) in float16, bfloat16, float32 or float64, with any strides: a tensor on the
            CPU or a GPU, a numpy array, or an array of another library that supports DLPack.
        k: How many entries of each row to keep, 0 <= k <= width.
        by: "magnitude" ranks by |x|, "value" ranks by x.
        out: A bool tensor (or array) of x's shape, with any strides, to write the mask to. None allocates one.

    Returns:
        A bool tensor of x's shape with exactly k True entries in each row. For an array it is an array of the same
        library, or a tensor if that library has no ``__array_namespace__().from_dlpack``.

    Raises:
        TypeError: If k is not an integer, or the dtype of x or out is not allowed.
        ValueError: If k is out of range, or the device, shape or memory of out does not fit.

    Example:
        >>> scalpel.topk_mask(torch.tensor([[0.5, -3.0, 2.0, 1.0]]), k=2)
        tensor([[False,  True,  True, False]])
    """
    return cast(Array, _call("topk_mask", x, k, by, out))


def keep_topk(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """Keep the k largest entries of each row along the last dimension and set the others to 0.

    Kept entries keep every bit. Without out the function is differentiable: the gradient is mask * g and the tangent
    mask * t, which are 0 where masked even if g or t is infinite or NaN there.

    Args:
        x: An array of shape (..., width), as for `topk_mask`.
        k: How many entries of each row to keep, 0 <= k <= width.
        by: "magnitude" ranks by |x|, "value" ranks by x.
        out: A tensor (or array) of x's shape and dtype to write to; it may be x itself. None allocates one.

    Returns:
        A tensor (or array) like x.

    Raises:
        TypeError: If k is not an integer, or the dtype of x or out is not allowed.
        ValueError: If k is out of range, or the device, shape or memory of out does not fit.
        RuntimeError: If out is given and a gradient would have to be computed, as for torch's own functions.

    Example:
        >>> scalpel.keep_topk(torch.tensor([[0.5, -3.0, 2.0, 1.0]]), k=2)
        tensor([[ 0., -3.,  2.,  0.]])
    """
    return cast(Array, _call("keep_topk", x, k, by, out))


def topk_indices(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """Find the indices of the k largest entries of each row along the last dimension.

    The result is not differentiable.

    Args:
        x: An array of shape (..., width), as for `topk_mask`.
        k: How many indices to return for each row, 0 <= k <= width.
        by: "magnitude" ranks by |x|, "value" ranks by x.
        out: An int64 tensor (or array) of shape (..., k) to write to. None allocates one.

    Returns:
        An int64 tensor (or array) of shape (..., k), in ascending order of index within each row.

    Raises:
        TypeError: If k is not an integer, or the dtype of x or out is not allowed.
        ValueError: If k is out of range, or the device, shape or memory of out does not fit.

    Example:
        >>> scalpel.topk_indices(torch.tensor([[0.5, -3.0, 2.0, 1.0]]), k=2)
        tensor([[1, 2]])
    """
    return cast(Array, _call("topk_indices", x, k, by, out))


class AbsTopK(torch.nn.Module):
    """Keep the k entries of largest magnitude along the last dimension: ``keep_topk(x, k)`` as a layer.

    Gao et al. 2025 (arXiv 2511.13653), section 2, use it at the nodes of weight-sparse transformers.

    Args:
        k: How many entries of each row to keep, at least 0. That it is at most the width is checked in `forward`.

    Raises:
        TypeError: If k is not an integer.
        ValueError: If k is negative.

    Example:
        >>> layer = scalpel.AbsTopK(1)
        >>> layer(torch.tensor([[0.5, -3.0, 2.0]]))
        tensor([[ 0., -3.,  0.]])
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = integer(k)
        if self.k < 0:
            raise ValueError(f"k is {self.k}; allowed: 0 <= k <= width")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep exactly k entries of each row.

        Args:
            x: A tensor of shape (..., width).

        Returns:
            A tensor of the same shape and dtype.

        Example:
            >>> scalpel.AbsTopK(2).forward(torch.tensor([1.0, -3.0, 2.0]))
            tensor([ 0., -3.,  2.])
        """
        return keep_topk(x, self.k)

    def extra_repr(self) -> str:
        """Show k in the layer's repr."""
        return f"k={self.k}"


# ---- arguments ---------------------------------------------------------------------------------


def _check_range(shape: tuple[int, ...], k: int) -> None:
    """Check k against the width, for code that runs before the core's own check or without it.

    The shape of a result is needed before the core is called, and tensors without memory never reach the core.
    """
    if len(shape) == 0:
        raise ValueError("x has no dimension; TopK needs at least one, of which the last is ranked")
    if not 0 <= k <= shape[-1]:
        raise ValueError(f"k is {k}, but the last dimension of x has width {shape[-1]}; allowed: 0 <= k <= width")


def _by_value(by: str) -> bool:
    if by not in ("magnitude", "value"):
        raise ValueError(f"by is {by!r}; allowed: 'magnitude', 'value'")
    return by == "value"


def _call(op: str, x: Any, k: Any, by: str, out: Any) -> Any:
    k = integer(k)
    _by_value(by)
    if isinstance(x, torch.Tensor):
        return _call_tensor(op, x, k, by, out)
    if isinstance(x, np.ndarray):
        return _call_numpy(op, x, k, by, out)
    if hasattr(x, "__dlpack__"):
        return _call_dlpack(op, x, k, by, out)
    raise TypeError(
        f"x is a {type(x).__name__}; allowed: a torch tensor, a numpy array, or an array that supports DLPack"
    )


def _call_tensor(op: str, x: torch.Tensor, k: int, by: str, out: Any) -> torch.Tensor:
    _check_tensor(x, "x", floating=True)
    _check_range(x.shape, k)
    if out is None:
        return _DISPATCH[op](x, k, by)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a {type(out).__name__}, but x is a tensor; give a tensor as out")
    _check_tensor(out, "out")
    _check_out(op, x, k, out)
    if op == "keep_topk" and torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise RuntimeError(
            "keep_topk with out= cannot be differentiated, but x or out requires grad; call it without out="
        )
    if transformed(x) or transformed(out):
        raise RuntimeError(
            f"{op} with out= cannot run under a torch.func transform or forward AD; call it without out="
        )
    if x.device != out.device:
        raise ValueError(f"x is on {x.device}, out on {out.device}; they must be on one device")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "out was made in inference mode, so it cannot be written to outside of it; give another tensor"
        )
    if not torch.compiler.is_compiling() and unwatched(x) and unwatched(out):
        _into(op, x.detach(), k, by, out)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        _OUT_OPS[op](x.detach(), k, by, out)
    return out


def _call_dlpack(op: str, x: Any, k: int, by: str, out: Any) -> Any:
    """Run an op on an array of another library, through a tensor that shares its memory."""
    result = _call_tensor(op, from_dlpack(x, "x"), k, by, None if out is None else writeable(out))
    if out is not None:
        return out
    namespace = getattr(x, "__array_namespace__", None)
    return namespace().from_dlpack(result) if namespace is not None else result


def _check_out(op: str, x: torch.Tensor, k: int, out: torch.Tensor) -> None:
    dtype, shape = _result_dtype(op, x), _result_shape(op, x, k)
    if out.dtype != dtype:
        raise TypeError(f"out ({_RESULTS[op]}) is {_name(out.dtype)}; it must be {_name(dtype)}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out ({_RESULTS[op]}) has shape {tuple(out.shape)}; it must be {shape}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(x: torch.Tensor, name: str, floating: bool = False) -> None:
    if floating and (x.dtype not in DTYPE_NAMES or not x.dtype.is_floating_point):
        raise TypeError(f"{name} is {_name(x.dtype)}; allowed: {_FLOATS}")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; allowed: rows of one width (pad them)")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; allowed: torch.strided (call .to_dense())")
    check_device(x, name)


# ---- the core ----------------------------------------------------------------------------------


def _into(op: str, x: torch.Tensor, k: int, by: str, out: torch.Tensor) -> None:
    """Run the core, which needs x and out to be contiguous along the last dimension."""
    if x.is_neg():
        x = x.resolve_neg()
    if x.dim() > 0 and x.stride(-1) != 1 and x.size(-1) > 1:
        x = x.contiguous()
    target = out
    if out.is_neg() or (out.dim() > 0 and out.stride(-1) != 1 and out.size(-1) > 1):
        target = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    core, place = core_of(x)
    on = None if x.is_cpu else x.device
    getattr(core, op)(memory_of(x, "x", on), k, by == "value", memory_of(target, "out", on), place)
    if target is not out:
        out.copy_(target)


def _call_numpy(op: str, x: np.ndarray, k: int, by: str, out: Any) -> np.ndarray:
    if x.dtype.type not in (np.float16, np.float32, np.float64):
        raise TypeError(f"x is {x.dtype}; allowed: float16, float32, float64 (bfloat16 as a tensor)")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("x is a masked array, whose mask TopK would ignore; fill it first (x.filled(...))")
    _check_range(x.shape, k)
    if not x.flags.aligned or not x.dtype.isnative or x.strides[-1:] != (x.itemsize,):
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    if out is None:
        shape = (*x.shape[:-1], k) if op == "topk_indices" else x.shape
        dtype = {"topk_mask": np.bool_, "keep_topk": x.dtype, "topk_indices": np.int64}[op]
        out = np.empty(shape, dtype=dtype)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out is a {type(out).__name__}, but x is a numpy array; give a numpy array as out")
    elif not out.flags.writeable or not out.flags.aligned or not out.dtype.isnative:
        raise ValueError("out must be writeable, aligned and of native byte order")
    target = (
        out if out.ndim == 0 or out.strides[-1] == out.itemsize or out.shape[-1] <= 1 else np.empty_like(out, order="C")
    )
    threads = torch.get_num_threads()
    getattr(cpu_core, op)(memory_of_array(x, "x"), k, _by_value(by), memory_of_array(target, "out"), threads)
    if target is not out:
        out[...] = target
    return cast(np.ndarray, out)


# ---- torch -------------------------------------------------------------------------------------
# The mask and the indices are custom ops, which is what torch.compile and dispatch modes see. They take a detached x,
# because a custom op whose input is differentiated silently loses its derivative under func.jvp; a mask has no
# derivative. keep_topk is not an op of its own: it is torch.where of the mask, so its derivatives of any order and
# under any transform are those of torch.where. One function around each of them goes into dynamo's graph as it is,
# for which `stay_whole` tells dynamo about it. A call that nothing traces or transforms goes straight to the core,
# because on a small tensor the custom op alone costs more than the whole PyTorch expression.


def _result_dtype(op: str, x: torch.Tensor) -> torch.dtype:
    return {"topk_mask": torch.bool, "topk_indices": torch.int64}.get(op, x.dtype)


def _result_shape(op: str, x: torch.Tensor, k: int) -> tuple[int, ...]:
    return (*x.shape[:-1], k) if op == "topk_indices" else tuple(x.shape)


def _result_like(op: str, x: torch.Tensor, k: int) -> torch.Tensor:
    return x.new_empty(_result_shape(op, x, k), dtype=_result_dtype(op, x))


def _run(op: str, x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    out = empty(_result_shape(op, x, k), _result_dtype(op, x), x.device)
    _into(op, x, k, by, out)
    return out


def _define(op: str) -> Callable[[torch.Tensor, int, str], torch.Tensor]:
    @torch.library.custom_op(f"scalpel::{op}", mutates_args=(), schema="(Tensor x, SymInt k, str by) -> Tensor")
    def run(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
        return _run(op, x, k, by)

    @run.register_fake
    def _(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
        return _result_like(op, x, k)

    @run.register_vmap
    def _(info: Any, in_dims: Any, x: torch.Tensor, k: int, by: str) -> tuple[torch.Tensor, int | None]:
        return (run(x, k, by), None) if in_dims[0] is None else (run(x.movedim(in_dims[0], 0), k, by), 0)

    return run


def _define_out(op: str) -> Callable[[torch.Tensor, int, str, torch.Tensor], None]:
    """Define the op that writes to out, declared as a mutation so that autograd knows that out's old value is gone."""
    schema = "(Tensor x, SymInt k, str by, Tensor(a!) out) -> ()"

    @torch.library.custom_op(f"scalpel::{op}_out", mutates_args=("out",), schema=schema)
    def run(x: torch.Tensor, k: int, by: str, out: torch.Tensor) -> None:
        _into(op, x, k, by, out)

    @run.register_fake
    def _(x: torch.Tensor, k: int, by: str, out: torch.Tensor) -> None:
        return None

    return run


_OUT_OPS = {op: _define_out(op) for op in _RESULTS}
_mask_op = _define("topk_mask")
_indices_op = _define("topk_indices")


def _mask_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        return _run("topk_mask", x, k, by)
    return _mask_op(x.detach(), k, by)


def _indices_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        return _run("topk_indices", x, k, by)
    return _indices_op(x.detach(), k, by)


def _keep_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        if x.requires_grad and torch.is_grad_enabled():
            return torch.where(_run("topk_mask", x, k, by), x, 0)
        return _run("keep_topk", x, k, by)
    return torch.where(_mask_dispatch(x, k, by), x, 0)


_DISPATCH = {"topk_mask": _mask_dispatch, "keep_topk": _keep_dispatch, "topk_indices": _indices_dispatch}


def stay_whole(dynamo: Any) -> None:
    """Let torch.compile put each function of ``_DISPATCH`` into its graph as one node, without looking inside.

    It is called when ``torch._dynamo`` is imported, which a decorator would do at once.
    """
    for function in _DISPATCH.values():
        dynamo.allow_in_graph(function)
