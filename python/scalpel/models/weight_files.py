"""Reading and writing files of weights, which hold plain tensors by name and nothing else.

No code that comes with a checkpoint ever runs here: pickles go through torch's restricted unpickler, which builds
only tensors and containers, and everything that isn't a plain tensor is refused.
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

# In the order in which they are tried: first the format of the published circuit models, then what the hub's tools
# write.
WEIGHT_FILES = (
    "final_model.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAMPLE_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint can't be read exactly as it is; the message names the key or file, the cause, and what to do."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of the first of :data:`WEIGHT_FILES` that ``folder`` holds, on the CPU, as they are stored.

    Raises:
        CheckpointError: If the folder holds none of them, a shard is missing, or a file holds anything but plain
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
    """The tensors of a folder's pytorch_model.bin, in one file or in shards, which are read when they are used.

    Raises:
        CheckpointError: If the folder holds no such file, or the file holds anything but plain tensors.
    """

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

    def equal(self, name: str, other_name: str) -> bool:
        return numbers_equal(self.tensors[name], self.tensors[other_name])


def numbers_equal(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors of the same shape hold the same numbers, whatever their dtypes."""
    size = 1 << 24  # entries at a time, so that no large tensor is copied whole to float64
    chunks = zip(left.flatten().split(size), right.flatten().split(size), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in chunks)


def check_link(path: Path) -> None:
    """Check that ``path`` is not a broken symbolic link, which a folder lists although it can't be read.

    Raises:
        CheckpointError: If it is one.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {path.readlink()}, which doesn't exist: put that file back, or download it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: If the file can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Read from the index of a checkpoint in shards which file holds each tensor.

    Raises:
        CheckpointError: If the index says nothing of the kind.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from the names of tensors to the names of files")
    return shard_of


def _read_shards(index: Path, mapped: bool = False) -> dict[str, Tensor]:
    shard_of = read_weight_map(index)
    weights: dict[str, Tensor] = {}
    for name in sorted(set(shard_of.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():  # an index may not point outside its folder
            raise CheckpointError(f"{index.name} names the shard {name!r}, which is not in {index.parent}")
        for key, tensor in _read_file(shard, mapped).items():
            if shard_of.get(key) != name:
                raise CheckpointError(f"{name} holds {key!r}, which {index.name} places in {shard_of.get(key)!r}")
            weights[key] = tensor
    if absent := sorted(shard_of.keys() - weights.keys()):
        raise CheckpointError(f"{index.name} lists {some(absent)}, which no shard holds")
    return weights


def _read_file(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, mapped)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # Copied, because these tensors map the file: a later change of the file would change them, or crash.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error


def _check_sums(path: Path) -> None:
    """Check the checksums in torch's file, which torch ignores: one flipped bit would change a weight unnoticed.

    Raises:
        CheckpointError: If one of them is wrong.
    """
    if not zipfile.is_zipfile(path):
        return  # torch's format before 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its record {damaged!r} is wrong. Download it again, or save it "
            "again (with torch's set_crc32_options at its default, if checksums were switched off)."
        )


def _read_pickle(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    _check_sums(path)
    mapped = mapped and zipfile.is_zipfile(path)  # torch's format before 1.6 can't be mapped
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
            raise CheckpointError(f"{key!r} in {path} is {tensor.layout}; store it as a dense tensor, zeros included")
    return {key: tensor.detach() for key, tensor in value.items()}


def write_weights(weights: dict[str, Tensor], path: Path, *, compress: bool = True) -> None:
    """Write tensors by name, so that ``torch.load(path, weights_only=True)`` reads them back bit for bit.

    Args:
        weights: The tensors. Those of the embedding and the output matrix are stored once where they are tied.
        path: The file.
        compress: Whether to rewrite the archive with DEFLATE, which torch reads too. Sparse matrices with explicit
            zeros then take about as much space as their non-zero entries; records that would hardly shrink stay as
            they are.
    """
    plain = {key: _without_spare_storage(tensor) for key, tensor in weights.items()}
    if "lm_head.weight" in weights and _same_memory(weights, "lm_head.weight", "transformer.wte.weight"):
        plain["lm_head.weight"] = plain["transformer.wte.weight"]  # tied: one record in the file
    if not compress:
        torch.save(plain, path)
        return
    uncompressed = path.with_name(path.name + ".loose")
    try:
        torch.save(plain, uncompressed)
        del plain
        _deflate(uncompressed, path)
    finally:
        uncompressed.unlink(missing_ok=True)


def _without_spare_storage(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, copied if its storage is larger than itself: torch.save writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    fills_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills_storage else tensor.clone()


def _same_memory(weights: dict[str, Tensor], name: str, other_name: str) -> bool:
    return other_name in weights and weights[name].data_ptr() == weights[other_name].data_ptr()


def _deflate(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            # The date is fixed, so that equal weights give equal bytes.
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
    """Write the first ``limit`` of ``names`` for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
