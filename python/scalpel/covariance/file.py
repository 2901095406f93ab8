"""Files of covariance states: safetensors with a JSON header, each written in one step."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._files import replacing

KIND = "scalpel.StreamingCovariance"
VERSION = 2  # version 1 held the full scatter and was never released


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a new file, which replaces the old one in one step.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written because there is no folder {path.parent}; create it first")
    header = {**header, "version": VERSION, "crc32": {name: _checksum(t) for name, t in tensors.items()}}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"kind": KIND, "header": json.dumps(header, sort_keys=True)})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the header and the tensors.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is truncated, damaged or of another kind.
    """
    name = os.fspath(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} does not exist")
    if Path(path).is_dir():
        raise ValueError(f"{name} is a folder; pass a file that StreamingCovariance.save wrote")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{name} is a safetensors file, but not one that StreamingCovariance.save wrote")
            header = json.loads(metadata["header"])
            if header["version"] != VERSION:
                raise ValueError(
                    f"{name} has format version {header['version']}, this release reads {VERSION}; install the "
                    "version of scalpel that wrote it"
                )
            sums = {key: value for key, value in header["crc32"].items()}  # noqa: C416  # no mapping: AttributeError
            tensors = {key: file.get_tensor(key) for key in sums}
            for key, tensor in tensors.items():
                if _checksum(tensor) != sums[key]:
                    raise ValueError(f"{name} is damaged: the checksum of {key} differs from the one in its header")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is truncated or not a covariance state ({error})") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} has a damaged header ({error!r})") from error
    return header, tensors


def check_header(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Check that a state could have written a header, before memory of its sizes is allocated.

    Raises:
        ValueError: If no state writes such a header.
    """
    for name, kinds in (("dim", (int,)), ("count", (int,)), ("center", (bool,)), ("rank", (int, type(None)))):
        value = header[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name} is {value!r}")
    if tuple(tensors["mean"].shape) != (header["dim"],):
        raise ValueError(f"dim is {header['dim']}, and mean has shape {tuple(tensors['mean'].shape)}")
    if header["rank"] is not None:
        directions, (energy, shrunk) = tensors["directions"], tensors["energy"].tolist()
        lengths = torch.linalg.vector_norm(directions.double(), dim=-1)
        if directions.dim() != 2 or len(directions) > 2 * header["rank"]:
            raise ValueError(f"directions has shape {tuple(directions.shape)}, and rank is {header['rank']}")
        if bool((lengths.diff() > 1e-6 * lengths[:-1]).any()) or energy < 0 or shrunk < 0:
            raise ValueError("directions, or the energies, are not those of a sketch")


def check_tensors(tensors: dict[str, torch.Tensor], like: dict[str, torch.Tensor], count: int, dim: int) -> None:
    """Check that tensors are those of a state; ``like`` are those of an empty one.

    Raises:
        ValueError: If they are not.
    """
    if count < 0:
        raise ValueError(f"count is {count}, which is negative")
    if set(tensors) != set(like):
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted(like)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
    shapes["scatter"] = (dim * (dim + 1) // 2 if count else 0,)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = shape[1:] == tuple(like[name].shape[1:]) if name == "directions" else shape == shapes[name]
        if not fits or tensor.dtype != like[name].dtype:
            raise ValueError(f"{name} is {tensor.dtype} of shape {shape}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")
    if int(tensors["count"]) != count:
        raise ValueError(f"count is {count} and {int(tensors['count'])}")


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
