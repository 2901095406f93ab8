"""TopK along the last dimension: masks, kept values, indices, and the layer that uses them.

Order, ties and NaN are those of csrc/topk/topk.h: NaN ranks above every number, -0.0 equals 0.0, and among
equals the lower index wins, so exactly k entries of every row are kept, with the same bits for every CPU
target and any number of threads.

The mask is a property of the primal: derivatives treat it as a constant. That is the derivative wherever it
exists, that is where the k-th and the (k+1)-th rank differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ._native import DTYPE_NAMES, check_device, core_of, cpu_core, empty, memory_of, memory_of_array

__all__ = ["AbsTopK", "keep_topk", "topk_indices", "topk_mask"]

By = Literal["magnitude", "value"]
Array = TypeVar("Array")

_RESULTS = {"topk_mask": "the mask", "keep_topk": "the kept values", "topk_indices": "the indices"}
_FLOATS = "float16, bfloat16, float32, float64"


def topk_mask(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """Where the k largest entries along the last dimension are.

    x: (..., width), float16, bfloat16, float32 or float64, any strides; a tensor of the CPU or of a GPU, a numpy
        array, or another library's array that speaks DLPack.
    k: 0 <= k <= width.
    by: "magnitude" ranks |x|, "value" ranks x.
    out: a bool tensor (array) of x's shape to write to, any strides.

    Returns bool like x with exactly k True a row: a tensor for a tensor, else an array of x's library (a
    tensor where that has no ``__array_namespace__().from_dlpack``). Not differentiable.
    Equals ``torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.abs().topk(k).indices, True)``, ties aside.

    Raises TypeError (k is not an integer, a dtype is not allowed), ValueError (k out of range; device, shape
    or memory of out).
    """
    return cast(Array, _call("topk_mask", x, k, by, out))


def keep_topk(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """x where it is among the k largest along the last dimension, 0 elsewhere.

    Arguments and errors as for `topk_mask`; out has x's dtype and may be x itself. Kept entries keep every
    bit. Differentiable without out: the gradient is mask * g, the tangent mask * t (0 where masked, whatever
    g or t is). With out and a gradient to compute: RuntimeError, as everywhere in torch.
    """
    return cast(Array, _call("keep_topk", x, k, by, out))


def topk_indices(x: Array, k: int, by: By = "magnitude", out: Array | None = None) -> Array:
    """The indices of the k largest entries along the last dimension, in ascending order.

    Arguments and errors as for `topk_mask`; out is int64 of shape (..., k). Returns int64 (..., k).
    Not differentiable.
    """
    return cast(Array, _call("topk_indices", x, k, by, out))


class AbsTopK(torch.nn.Module):
    """Keeps the k entries of largest magnitude along the last dimension: ``keep_topk(x, k)`` as a layer.

    Gao et al. 2025 (arXiv 2511.13653), section 2, use it at the nodes of weight-sparse transformers.

    k: at least 0; at most the width of what passes through, which is checked there.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _integer(k)
        if self.k < 0:
            raise ValueError(f"k is {self.k}; allowed: 0 <= k <= width")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., width) → the same shape, exactly k entries a row kept."""
        return keep_topk(x, self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"


# ---- arguments ---------------------------------------------------------------------------------


def _integer(k: Any) -> int:
    if not isinstance(k, (bool, np.bool_, np.ndarray, torch.Tensor)):
        try:
            return operator.index(k)
        except TypeError:
            pass
    raise TypeError(f"k is {k!r} of type {type(k).__name__}; it must be an integer")


def _check_range(shape: tuple[int, ...], k: int) -> None:
    """The core's own check, for what comes before it: the shape of a result, and tensors without memory."""
    if len(shape) == 0:
        raise ValueError("x has no dimension; TopK needs at least one, of which the last is ranked")
    if not 0 <= k <= shape[-1]:
        raise ValueError(f"k is {k}, but the last dimension of x has width {shape[-1]}; allowed: 0 <= k <= width")


def _by_value(by: str) -> bool:
    if by not in ("magnitude", "value"):
        raise ValueError(f"by is {by!r}; allowed: 'magnitude', 'value'")
    return by == "value"


def _call(op: str, x: Any, k: Any, by: str, out: Any) -> Any:
    k = _integer(k)
    _by_value(by)
    if isinstance(x, torch.Tensor):
        return _call_tensor(op, x, k, by, out)
    if isinstance(x, np.ndarray):
        return _call_numpy(op, x, k, by, out)
    if hasattr(x, "__dlpack__"):
        return _call_dlpack(op, x, k, by, out)
    raise TypeError(f"x is a {type(x).__name__}; allowed: a torch tensor, a numpy array, or what speaks DLPack")


def _call_tensor(op: str, x: torch.Tensor, k: int, by: str, out: Any) -> torch.Tensor:
    _check_tensor(x, "x", floating=True)
    _check_range(x.shape, k)
    if out is None:
        return _DISPATCH[op](x, k, by)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a {type(out).__name__}, but x is a tensor; give a tensor")
    _check_tensor(out, "out")
    _check_out(op, x, k, out)
    if op == "keep_topk" and torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise RuntimeError(
            "keep_topk with out= can't be differentiated, but x or out requires grad; call it without out="
        )
    if _transformed(x) or _transformed(out):
        raise RuntimeError(f"{op} with out= can't run under a torch.func transform or forward AD; call it without out=")
    if x.device != out.device:
        raise ValueError(f"x is on {x.device}, out on {out.device}; they must be on one device")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("out was made in inference mode, so it can't be written outside; give another tensor")
    if not torch.compiler.is_compiling() and unwatched(x) and unwatched(out):
        _into(op, x.detach(), k, by, out)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        _OUT_OPS[op](x.detach(), k, by, out)
    return out


def _call_dlpack(op: str, x: Any, k: int, by: str, out: Any) -> Any:
    """Through a tensor that shares x's memory."""
    result = _call_tensor(op, _from_dlpack(x, "x"), k, by, None if out is None else _writeable(out))
    if out is not None:
        return out
    namespace = getattr(x, "__array_namespace__", None)
    return namespace().from_dlpack(result) if namespace is not None else result


def _writeable(out: Any) -> torch.Tensor:
    """A tensor on out's own memory."""
    if isinstance(out, torch.Tensor):
        return out
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out must be writeable")
        return torch.from_numpy(out)
    shared = _from_dlpack(out, "out")
    if shared.data_ptr() != _from_dlpack(out, "out").data_ptr():
        raise TypeError(
            f"out (a {type(out).__name__}) gives a copy of itself through DLPack, which can't be written to"
        )
    return shared


def _from_dlpack(x: Any, name: str) -> torch.Tensor:
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} is a {type(x).__name__}, which does not speak DLPack")
    try:
        return torch.from_dlpack(x)
    except Exception as error:  # whatever the other library raises
        raise TypeError(f"{name} (a {type(x).__name__}) can't be read through DLPack: {error}") from error


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
    """Runs the core, which wants x and out contiguous along the last dimension."""
    if x.is_neg():
        x = x.resolve_neg()
    if x.dim() > 0 and x.stride(-1) != 1 and x.size(-1) > 1:
        x = x.contiguous()
    to = out
    if out.is_neg() or (out.dim() > 0 and out.stride(-1) != 1 and out.size(-1) > 1):
        to = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    core, place = core_of(x)
    on = None if x.is_cpu else x.device
    getattr(core, op)(memory_of(x, "x", on), k, by == "value", memory_of(to, "out", on), place)
    if to is not out:
        out.copy_(to)


def _call_numpy(op: str, x: np.ndarray, k: int, by: str, out: Any) -> np.ndarray:
    if x.dtype.type not in (np.float16, np.float32, np.float64):
        raise TypeError(f"x is {x.dtype}; allowed: float16, float32, float64 (bfloat16 as a tensor)")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("x is a masked array, whose mask TopK would not see; fill it first (x.filled(...))")
    _check_range(x.shape, k)
    if not x.flags.aligned or not x.dtype.isnative or x.strides[-1:] != (x.itemsize,):
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    if out is None:
        shape = (*x.shape[:-1], k) if op == "topk_indices" else x.shape
        dtype = {"topk_mask": np.bool_, "keep_topk": x.dtype, "topk_indices": np.int64}[op]
        out = np.empty(shape, dtype=dtype)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out is a {type(out).__name__}, but x is a numpy array; give a numpy array")
    elif not out.flags.writeable or not out.flags.aligned or not out.dtype.isnative:
        raise ValueError("out must be writeable, aligned and of native byte order")
    to = (
        out if out.ndim == 0 or out.strides[-1] == out.itemsize or out.shape[-1] <= 1 else np.empty_like(out, order="C")
    )
    threads = torch.get_num_threads()
    getattr(cpu_core, op)(memory_of_array(x, "x"), k, _by_value(by), memory_of_array(to, "out"), threads)
    if to is not out:
        out[...] = to
    return cast(np.ndarray, out)


# ---- torch -------------------------------------------------------------------------------------
# The mask and the indices are custom ops: that is what torch.compile and the dispatcher's modes see. They take
# a detached x, for a custom op whose input is differentiated loses the derivative under func.jvp without a
# word; a mask has none. keep_topk is no op: it is torch.where of the mask, so its derivatives, of any order and
# under any transform, are torch.where's. Around each one function that dynamo puts into its graph as it is. A
# call that nobody traces or transforms goes straight to the core: the custom op alone costs more than the whole
# PyTorch expression on a small tensor.


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
    """The op that writes to out, declared as such: autograd learns that out's old value is gone."""

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


def _transformed(x: torch.Tensor) -> bool:
    """True under a transform of torch.func, and when x has a tangent of forward AD."""
    # Asked of x: a compiled graph enters forward AD's level without torch.autograd.forward_ad knowing of it.
    return torch._C._are_functorch_transforms_active() or torch._unpack_dual(x, level=0).tangent is not None


def unwatched(x: torch.Tensor) -> bool:
    """True when a plain tensor is computed on eagerly: no transform, mode, trace or profile is to see the op.

    What torch does not let one ask about (an ExecutionTraceObserver) does not see the plain call.
    """
    return untraced(x) and not torch.autograd._profiler_enabled()


def untraced(x: torch.Tensor) -> bool:
    """The same, but a profile may watch."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and (x.is_cpu or x.is_cuda)
        and not _transformed(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and _len_torch_dispatch_stack_pre_dispatch() == 0
        and not (torch._C._is_torch_function_mode_enabled() and _a_mode_watches())
        and torch._C._get_tracing_state() is None
    )


def _a_mode_watches() -> bool:
    """True when a torch function mode is there to see the op. A default device is such a mode, too, and it sees to
    nothing but where new tensors go."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


@torch.compiler.allow_in_graph
def _mask_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        return _run("topk_mask", x, k, by)
    return _mask_op(x.detach(), k, by)


@torch.compiler.allow_in_graph
def _indices_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        return _run("topk_indices", x, k, by)
    return _indices_op(x.detach(), k, by)


@torch.compiler.allow_in_graph
def _keep_dispatch(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
    if unwatched(x):
        if x.requires_grad and torch.is_grad_enabled():
            return torch.where(_run("topk_mask", x, k, by), x, 0)
        return _run("keep_topk", x, k, by)
    return torch.where(_mask_dispatch(x, k, by), x, 0)


_DISPATCH = {"topk_mask": _mask_dispatch, "keep_topk": _keep_dispatch, "topk_indices": _indices_dispatch}
