"""Digests of a model and of plain values that are the same in every process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["model_mark", "value_mark"]


def model_mark(model: nn.Module) -> str:
    """Compute the SHA-256 of what determines a model's values.

    These are its class, its config, the numbers, texts and switches among the attributes of its modules, and the name,
    shape, dtype and bytes of each tensor.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config: Any = getattr(model, "config", None)
    if config is not None:
        fields = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
        fields = fields.to_dict() if hasattr(fields, "to_dict") else fields
        if isinstance(fields, dict):  # the folder of a model does not change the model
            fields = {name: value for name, value in fields.items() if name != "_name_or_path"}
        digest.update(json.dumps(fields, sort_keys=True, default=repr).encode())
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, (int, float, str, bool))}
        digest.update(f"{name} {type(module).__qualname__} {sorted(plain.items())}".encode())
    for name, tensor in model.state_dict().items():
        weight = _offloaded(model, name) if tensor.device.type == "meta" else tensor
        digest.update(name.encode() + value_mark(weight))
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """Read a weight that accelerate keeps in memory or on disk until its layer runs.

    Raises:
        ValueError: If there is no such weight.
    """
    path = name.split(".")
    for i in reversed(range(len(path))):
        hook = getattr(model.get_submodule(".".join(path[:i])), "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights = getattr(part, "weights_map", None)
            local = ".".join(path[i:])
            if weights is not None and local in weights:
                weight: Tensor = weights[local]
                return weight
    raise ValueError(f"the weight {name!r} is on the device 'meta', so it has no data: load the model's weights first")


def value_mark(value: Any) -> bytes:
    """Return bytes that distinguish a value, such as a tensor or a function's default, from others."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} ".encode() + raw
    if isinstance(value, CodeType):
        return value.co_code + repr(value.co_names).encode() + b"".join(map(value_mark, value.co_consts))
    code = getattr(value, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return b"|".join(map(value_mark, (code, value.__defaults__, value.__kwdefaults__, *cells)))
    if isinstance(value, (tuple, list)):
        return b"(" + b",".join(map(value_mark, value)) + b")"
    if isinstance(value, Mapping):
        return value_mark(sorted(value.items(), key=lambda item: str(item[0])))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()  # without addresses, which differ between processes
