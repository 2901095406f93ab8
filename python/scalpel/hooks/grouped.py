"""The matrix products of a mixture of experts, group by group, so that PyTorch can differentiate them.

transformers computes all experts of a layer in one grouped product, ``torch._grouped_mm`` or an operator of its own.
Neither has a formula for forward derivatives or a rule for many tangents at once, and the first takes no float64. One
plain product for each expert has all of these. The weights are not copied, as they would be for every token with
transformers' ``batched_mm``, and the model and its config stay as they are, so other threads notice nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["GroupByGroup", "experts_of", "groups_in_float64"]

_GROUPED = "grouped_mm"  # transformers' name of its default implementation of experts
_PLAIN = (None, "eager", "batched_mm", _GROUPED)  # implementations that consist of operations with derivatives, or here


class GroupByGroup(TorchFunctionMode):
    """A mode in which a grouped matrix product is a plain one for each group, in this thread.

    Attributes:
        used: Whether there was a grouped product since the mode was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_grouped(func):
            self.used = True
            operands = _operands(*args, **kwargs)
            if operands is not None:
                return _products(*operands)
        return func(*args, **kwargs)


def _is_grouped(func: Any) -> bool:
    if func is getattr(torch, "_grouped_mm", None):
        return True
    name = getattr(func, "_qualified_op_name", None) or getattr(getattr(func, "_schema", None), "name", "")
    return name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def _operands(
    rows: Tensor, matrices: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the operands of a product of experts; None for a product of another kind, which stays as it is."""
    if (
        offs is None
        or bias is not None
        or out_dtype not in (None, rows.dtype)
        or (rows.dim(), matrices.dim()) != (2, 3)
    ):
        return None
    return rows, matrices, offs


def _products(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """Multiply each group of rows by its matrix.

    Args:
        rows: (S, in), in which group g ends before row ``offs[g]``. Rows after the last group belong to none.
        matrices: (groups, in, out).
        offs: (groups,), integers.

    Returns:
        (S, out); zero where a row belongs to no group.
    """
    ends = [int(end) for end in offs]
    starts = [0, *ends]
    parts = [rows[i:j] @ matrices[g] for g, (i, j) in enumerate(zip(starts, ends, strict=False)) if i < j]
    others = rows[starts[-1] :]
    if len(others) or not parts:
        parts.append(others.new_zeros(len(others), matrices.shape[-1]))
    return torch.cat(parts)


def groups_in_float64(model: nn.Module) -> bool:
    """Tell whether the model's experts are float64 and would go through grouped products, which take no float64."""
    return any(
        kind == _GROUPED and any(weight.dtype == torch.float64 for weight in module.parameters(recurse=False))
        for module, kind in _experts(model)
    )


def experts_of(model: nn.Module) -> str | None:
    """Return the name of an implementation of the model's experts that this library knows nothing of, or None."""
    return next((str(kind) for _, kind in _experts(model) if kind not in _PLAIN), None)


def _experts(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """List the modules that hold a transformers model's experts, with the implementation that each will use."""
    return [
        (module, getattr(getattr(module, "config", None), "_experts_implementation", None))
        for module in model.modules()
        if hasattr(module, "_is_expert_parallel") or type(module).__name__.endswith("Experts")
    ]
