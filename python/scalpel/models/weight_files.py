"""Reading and writing files of weights: names to plain tensors, and nothing else.

No code that came with a checkpoint ever runs here: pickles go through torch's restricted unpickler, which
builds tensors and containers only, and everything that isn't a plain tensor is refused.
"""

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In the order in which they are looked for: the public format first, then what the hub's tools write.
WEIGHT_FILES = (
    "final_model.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAMPLE_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that can't be honoured exactly; the message names the key or file, the cause and what to
    do.
    """


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the first of :data:`WEIGHT_FILES` that ``folder`` holds, on the CPU, as they are stored.

    Raises CheckpointError where there is none, a shard is missing, or a file holds anything but plain
    tensors.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _read_shards(path) if name.endswith(".index.json") else _read_file(path)
    for name in WEIGHT_FILES:
        check_link(folder / name)
    raise CheckpointError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} was expected beside the config")


class PickledWeights:
    """The tensors of a folder's pytorch_model.bin, whole or in shards, which stay in the file until they are used."""

    def __init__(self, folder: Path) -> None:
        whole, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
        if not whole.is_file() and not index.is_file():
            for name in WEIGHT_FILES[1:]:
                check_link(folder / name)
            raise CheckpointError(
                f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES[1:])} was expected beside config.json"
            )
        self.tensors = _read_file(whole, True) if whole.is_file() else _read_shards(index, True)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def equal(self, one: str, other: str) -> bool:
        return numbers_equal(self.tensors[one], self.tensors[other])


def numbers_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their dtypes."""
    size = 1 << 24  # no whole copies in float64
    pairs = zip(one.flatten().split(size), other.flatten().split(size), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def check_link(path: Path) -> None:
    """CheckpointError where ``path`` is a symbolic link that leads to nothing: it is listed, and can't be read."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {path.readlink()}, which is not there: put that file back, or download it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value


def _read_shards(index: Path, mapped: bool = False) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of key to file name")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():  # a map may not point outside its folder
            raise CheckpointError(f"{index.name} names the shard {name!r}, which is not in {index.parent}")
        for key, tensor in _read_file(shard, mapped).items():
            if where.get(key) != name:
                raise CheckpointError(f"{name} holds {key!r}, which {index.name} places in {where.get(key)!r}")
            weights[key] = tensor
    if absent := sorted(where.keys() - weights.keys()):
        raise CheckpointError(f"{index.name} lists {some(absent)}, which no shard holds")
    return weights


def _read_file(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, mapped)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # cloned: what is handed out maps the file, and would change or crash when the file does
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error


def _check_sums(path: Path) -> None:
    """CheckpointError for a record with a wrong checksum: torch doesn't look, and a bit flips a weight."""
    if not zipfile.is_zipfile(path):
        return  # torch's format before 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its record {damaged!r} is wrong. Download or save it again "
            "(with torch's set_crc32_options at its default, if it was switched off)."
        )


def _read_pickle(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    _check_sums(path)
    mapped = mapped and zipfile.is_zipfile(path)  # torch's format before 1.6 can't be
    try:
        # weights_only is given explicitly, so that no environment variable can switch it off
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain file of tensors and was not executed: {_first_line(error)} "
            "Ask for the weights as a state dict or as safetensors."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read as a torch file: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a dict of tensors was expected")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds {type(tensor).__name__} under {key!r}; a flat dict of names to tensors was expected"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{key!r} in {path} is {tensor.layout}; store it dense, zeros included")
    return {key: tensor.detach() for key, tensor in value.items()}


def write_weights(weights: dict[str, Tensor], path: Path, *, compress: bool = True) -> None:
    """Write a dict of tensors that ``torch.load(path, weights_only=True)`` reads back bit for bit.

    ``compress`` rewrites the archive with DEFLATE, which torch reads as it does its own: weight-sparse
    matrices, stored with explicit zeros, shrink to about their non-zeros. Records that would hardly shrink
    stay as they are.
    """
    plain = {key: _owning(tensor) for key, tensor in weights.items()}
    if "lm_head.weight" in weights and _same_memory(weights, "lm_head.weight", "transformer.wte.weight"):
        plain["lm_head.weight"] = plain["transformer.wte.weight"]  # tied: one record in the file
    if not compress:
        torch.save(plain, path)
        return
    loose = path.with_name(path.name + ".loose")
    try:
        torch.save(plain, loose)
        del plain
        _deflate(loose, path)
    finally:
        loose.unlink(missing_ok=True)


def _owning(tensor: Tensor) -> Tensor:
    """The tensor on the CPU without a larger storage behind it: torch.save writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _same_memory(weights: dict[str, Tensor], one: str, other: str) -> bool:
    return other in weights and weights[one].data_ptr() == weights[other].data_ptr()


def _deflate(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            # a fixed date: equal weights give equal bytes
            record = zipfile.ZipInfo(entry.filename, date_time=(1980, 1, 1, 0, 0, 0))
            with old.open(entry) as data:
                sample = data.read(_SAMPLE_BYTES)
            shrinks = len(zlib.compress(sample, 1)) < 0.9 * len(sample)
            record.compress_type = zipfile.ZIP_DEFLATED if shrinks else zipfile.ZIP_STORED
            record.file_size = entry.file_size
            with old.open(entry) as data, new.open(record, "w") as out:
                while chunk := data.read(_SAMPLE_BYTES):
                    out.write(chunk)


def _first_line(error: Exception) -> str:
    line = next(iter(io.StringIO(str(error))), "").strip() or type(error).__name__
    return line if line.endswith(".") else line + "."


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of ``names`` for a message."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
