"""The published file of a Jacobian lens, and what stands beside it.

The file is what ``torch.save`` writes of a dict with J, {layer: matrix}, n_prompts, source_layers and d_model, in
float16 by default. It doesn't say which model, target, corpus or estimator a lens is of, and has no errors. Both stand
in a second file, ``<name>.scalpel.json``, which is bound to the first by its SHA-256: beside another file of the same
name it isn't believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._files import check_folder, replace_text, replacing
from ..._json import plain

__all__ = ["BESIDE", "Stored", "read", "write"]

BESIDE = ".scalpel.json"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAID = {"target_layer": "target", "skip_first": "skip_first"}  # what others' files may say, and what it is called here


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file holds.

    Attributes:
        J: {layer: (width, width)}, in the dtype of the file.
        n_prompts: The number of prompts; 0 where the file doesn't say.
        error: {layer: relative error}, NaN where unknown.
        about: How the lens was made, as far as it is known.
    """

    J: dict[Any, Tensor]
    n_prompts: int
    error: dict[Any, float]
    about: dict[str, Any]


def write(
    path: Path, J: Mapping[Any, Tensor], n_prompts: int, error: Mapping[Any, float], about: Any, dtype: Any
) -> None:
    """Write a lens and what stands beside it, each in one step.

    Raises:
        ValueError: An entry is too large for the dtype, or the dtype is not one of floating point.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(map(str, _DTYPES))}")
    matrices = {}
    for layer in J:
        matrix = J[layer].detach().cpu()
        narrow = matrix.to(dtype).contiguous()
        if not narrow.isfinite().all():
            raise ValueError(
                f"layer {layer!r} has an entry of {float(matrix.abs().max()):g}, and {dtype} holds at most "
                f"{torch.finfo(dtype).max:g}: save with dtype=torch.bfloat16 or torch.float32"
            )
        matrices[layer] = narrow.clone() if narrow is matrix else narrow
    width = len(next(iter(matrices.values())))
    content = {"J": matrices, "n_prompts": int(n_prompts), "source_layers": list(matrices), "d_model": width}
    check_folder(path.parent)
    with replacing(path) as temporary:
        torch.save(content, temporary)
    said = {
        "format": 1,
        "sha256": _sha256(path),
        "layers": list(matrices),
        "error": [plain(float(error[layer])) for layer in matrices],
        "about": plain(about),
    }
    replace_text(path.with_name(path.name + BESIDE), json.dumps(said, indent=1) + "\n")


def read(path: Path, beside: Path | None = None) -> Stored:
    """Read a lens in the published form, or a checkpoint of a fit in that of the published code.

    Args:
        path: The file.
        beside: What stands beside it; by default ``<path>.scalpel.json``, if that exists.

    Raises:
        ValueError: The file is no lens, can't be read without running code, or maps between different widths.
        FileNotFoundError: There is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; give the path of a lens, such as name_jacobian_lens.pt"
        )
    content = _loaded(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; a lens is a dict with J, n_prompts and source_layers")
    if "J" in content:
        stored, n_prompts = content["J"], int(content.get("n_prompts") or 0)
    elif "jacobian_sum" in content and int(content.get("n_done", 0)) > 0:
        n_prompts = int(content["n_done"])
        stored = {layer: total.double().div(n_prompts).float() for layer, total in content["jacobian_sum"].items()}
    else:
        raise ValueError(
            f"{path} has no J; it has the keys {sorted(map(str, content))}. A lens is a dict with J, n_prompts, "
            "source_layers and d_model, or a checkpoint of a fit with jacobian_sum and n_done, of at least one prompt"
        )
    J = _checked(path, stored, content)
    about = _about(content, J)
    error = dict.fromkeys(J, math.nan)
    beside = path.with_name(path.name + BESIDE) if beside is None else beside
    if beside.is_file():
        said = _beside(beside, path, list(J))
        if said is not None:
            error = {layer: math.nan if e is None else float(e) for layer, e in zip(J, said["error"], strict=True)}
            about |= said["about"]
    return Stored(J, n_prompts, error, about)


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # the sentences of torch that advise to load the file without this protection stay out
        lines = [line.rpartition("WeightsUnpickler error: ")[2].strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line and "weights_only" not in line), type(error).__name__)
        raise ValueError(
            f"{path} can't be read as tensors and plain data alone, and anything else in it could run code when it is "
            f"loaded, so it isn't ({reason}). If you trust its author, load it yourself with weights_only=False, in a "
            "sandbox, and save a dict of J, n_prompts, source_layers and d_model"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a file of another kind torch reads bytes as instructions, which fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no file of torch.save, or is damaged: {reason}") from error


def _checked(path: Path, stored: Any, content: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The matrices of a file in the order of its layers."""
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(each, Tensor) for each in stored.values()):
        raise ValueError(f"J in {path} is no mapping from layers to matrices")
    given = content.get("source_layers")
    if given is None:
        given = sorted(stored, key=lambda layer: (isinstance(layer, str), layer))
    layers = given.tolist() if isinstance(given, Tensor) else list(given)
    if set(layers) != set(stored) or len(layers) != len(stored):
        raise ValueError(f"{path} names the layers {layers} and has matrices of {list(stored)}; they must be the same")
    wrong = next((layer for layer in layers if isinstance(layer, bool) or not isinstance(layer, int | str)), None)
    if wrong is not None:
        raise ValueError(f"{path} has a layer {wrong!r}; a layer is a number or the path of a module")
    width = int(content.get("d_model") or (*stored[layers[0]].shape, 0)[0])
    for layer in layers:
        matrix = stored[layer]
        shape = tuple(matrix.shape)
        if len(shape) == 2 and shape[0] == width and (shape[1] != width or content.get("d_source", width) != width):
            raise ValueError(
                f"the matrix of layer {layer!r} in {path} is {shape[0]} × {shape[1]}: it reads several streams, or one "
                "of another width, and a lens here reads one residual stream of the target's width"
            )
        if shape != (width, width) or not matrix.dtype.is_floating_point:
            raise ValueError(
                f"the matrix of layer {layer!r} in {path} has shape {shape} and dtype {matrix.dtype}; expected "
                f"{(width, width)}, floating point"
            )
        if not matrix.isfinite().all():
            raise ValueError(
                f"the matrix of layer {layer!r} in {path} holds NaN or an infinity; it may have overflowed float16 "
                "when it was saved"
            )
    return {layer: stored[layer] for layer in layers}


def _about(content: Mapping[str, Any], J: Mapping[Any, Tensor]) -> dict[str, Any]:
    """What others' files say beside the matrices."""
    about: dict[str, Any] = {}
    for name in ("metadata", "provenance", "rules"):
        if name in content:
            about[name] = plain(content[name])
    for holder in (content.get("metadata"), content):
        if isinstance(holder, Mapping):
            about |= {ours: plain(holder[theirs]) for theirs, ours in _SAID.items() if holder.get(theirs) is not None}
    last = list(J)[-1]
    if torch.equal(J[last].float(), torch.eye(len(J[last]), dtype=torch.float32, device="cpu")):
        about["identity_slot"] = last  # some writers store the target too
    return about


def _beside(beside: Path, path: Path, layers: list[Any]) -> dict[str, Any] | None:
    """What stands beside a file, if it belongs to it."""
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
        known = said["sha256"], said["layers"], said["error"], said["about"]
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{beside} can't be read ({error}), and is passed over", stacklevel=4)
        return None
    if known[0] != _sha256(path) or known[1] != layers or len(known[2]) != len(layers):
        warnings.warn(
            f"{beside} belongs to another file than {path.name}, and is passed over: errors and origin are unknown",
            stacklevel=4,
        )
        return None
    return dict(said)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
