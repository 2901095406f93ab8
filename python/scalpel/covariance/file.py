"""Files of covariance states: safetensors with a JSON header, written whole or not at all."""

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
VERSION = 2  # 1: the scatter in full, never released


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Replaces path by a new file in one step. Raises OSError when the folder can't be written to."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {path.parent}; make it first")
    header = {**header, "version": VERSION, "crc32": {name: _checksum(t) for name, t in tensors.items()}}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"kind": KIND, "header": json.dumps(header, sort_keys=True)})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors.

    Raises FileNotFoundError, or ValueError for a truncated, damaged or foreign file.
    """
    name = os.fspath(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} doesn't exist")
    if Path(path).is_dir():
        raise ValueError(f"{name} is a folder; give the file that StreamingCovariance.save wrote")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{name} is a safetensors file, but not one that StreamingCovariance.save wrote")
            header = json.loads(metadata["header"])
            if header["version"] != VERSION:
                raise ValueError(
                    f"{name} has format version {header['version']}, this release reads {VERSION}; install the "
                    "scalpel that wrote it"
                )
            sums = {key: value for key, value in header["crc32"].items()}  # noqa: C416  # no mapping: AttributeError
            tensors = {key: file.get_tensor(key) for key in sums}
            for key, tensor in tensors.items():
                if _checksum(tensor) != sums[key]:
                    raise ValueError(f"{name} is damaged: the checksum of {key} differs from the one in its header")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is truncated or no covariance state at all ({error})") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} has a damaged header ({error!r})") from error
    return header, tensors


def check_header(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Refuses, with ValueError, a header that no state writes, before anything of its size is made."""
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
    """Refuses, with ValueError, what is not the tensors of a state: ``like`` are those of an empty one."""
    if count < 0:
        raise ValueError(f"count is {count}")
    if set(tensors) != set(like):
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted(like)}")
    shapes = {name: tuple(each.shape) for name, each in like.items()}
    shapes["scatter"] = (dim * (dim + 1) // 2 if count else 0,)
    for name, given in tensors.items():
        fits = given.shape[1:] == like[name].shape[1:] if name == "directions" else tuple(given.shape) == shapes[name]
        if not fits or given.dtype != like[name].dtype:
            raise ValueError(f"{name} is {given.dtype} of shape {tuple(given.shape)}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} isn't finite")
    if int(tensors["count"]) != count:
        raise ValueError(f"count is {count} and {int(tensors['count'])}")


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
