"""The slow twin of :func:`scalpel.jacobian`: its matrix, row by row, through plain reverse-mode autograd.

It uses no vmap, no forward mode and no operator, so it does not share their faults.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.circuitgpt.model import CircuitGPT


def jacobian_dense(
    model: nn.Module,
    input_ids: Any,
    source: str = "0.resid_in",
    target: str = "final_resid",
    positions: Any = None,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    **inputs: Any,
) -> Tensor:
    """Compute a Jacobian as a matrix, in the dtype of the model.

    Ends without a path between them give zeros instead of an error.

    Args:
        model: A CircuitGPT, or an nn.Module whose hooks are module paths.
        input_ids: The input of the model.
        source: The hook to differentiate at, as in :func:`scalpel.jacobian`.
        target: The hook to differentiate, as in :func:`scalpel.jacobian`.
        positions: The positions of source and target, as in :func:`scalpel.jacobian`.
        function: A function that is applied to the value at the target's positions.
        **inputs: Further arguments of the forward pass.

    Returns:
        The matrix, (numel(target), numel(source)).
    """
    at_source, at_target = positions if isinstance(positions, tuple) else (positions, positions)
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> Tensor:
        if name == source:
            seen["delta"] = torch.zeros_like(_at(value, at_source)).requires_grad_()
            value = value.detach() if name == target else value
            moved = value.clone()
            moved[_index(value, at_source)] = _at(value, at_source) + seen["delta"]
            value = moved
        if name == target:
            seen["target"] = value
        return value

    with torch.enable_grad():
        if isinstance(model, CircuitGPT):
            seen["logits"] = model(input_ids, **inputs, tap=record, patterns=[target])
        else:
            seen["logits"] = _run_module(model, input_ids, inputs, source, target, record)
        value = _at(seen["logits"] if target == "logits" else seen["target"], at_target)
        if function is not None:
            value = function(value)
        rows = [torch.zeros_like(seen["delta"]).flatten() for _ in range(value.numel())]
        unit = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        for i in range(value.numel() if value.requires_grad else 0):
            unit.view(-1).zero_()[i] = 1
            (row,) = torch.autograd.grad(value, seen["delta"], unit, retain_graph=True, allow_unused=True)
            rows[i] = rows[i] if row is None else row.flatten()
    return torch.stack(rows).detach()


def _run_module(
    model: nn.Module,
    arguments: Any,
    keywords: dict[str, Any],
    source: str,
    target: str,
    record: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Run an nn.Module whose hooks are module paths that take and return a tensor, or a tuple that begins with one."""
    handles = []
    for path in dict.fromkeys((source, target)):
        if path == "logits":
            continue
        module = model.get_submodule(path.removesuffix(":in"))
        if path.endswith(":in"):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, path=path: (record(path, args[0]), *args[1:]))
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, path=path: (
                        (record(path, output[0]), *output[1:]) if isinstance(output, tuple) else record(path, output)
                    )
                )
            )
    try:
        output = model(arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return output if isinstance(output, Tensor) else output[0]


def _index(value: Tensor, positions: Any) -> Any:
    if positions is None:
        return slice(None)
    if isinstance(positions, int):
        positions = [positions]
    return (slice(None), positions)


def _at(value: Tensor, positions: Any) -> Tensor:
    return value[_index(value, positions)]
