"""A decoder in a folder of safetensors, read one layer at a time, without building a module.

While one layer computes, the next is read into a second piece of memory. The two pieces are used in turn, so a model
of any size needs the memory of two layers. Files are read rather than mapped, because a mapped file would count as
resident. The files of a model that is too large for the system's cache are read past the cache, which leaves the
processor to the products (on two cores, copying through the cache took nine tenths of one of them).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gguf_files import gguf_in, no_stream
from ..weight_files import (
    WEIGHT_FILES,
    CheckpointError,
    PickledWeights,
    check_link,
    numbers_equal,
    read_weight_map,
    some,
)
from .decoder import Decoder, DecoderLayer
from .families import config_of, passed_over
from .strict import Stored, check_plain, config_in, expected_by, match

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNED = 4096  # bytes: reads past the cache begin and end at multiples of this, in the file and in memory
_PIECE = 1 << 26  # bytes of one read


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FolderWeights:
    """The tensors of a folder's safetensors by name, each read when it is asked for, and moved to ``device``."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.places: dict[str, _Place] = {}
        paths = _shards(folder)
        for path in paths:
            for name, place in _header(path).items():
                if name in self.places:
                    raise CheckpointError(
                        f"{self.places[name].path.name} and {path.name} in {folder} both hold {name!r}"
                    )
                self.places[name] = place
        self.past_cache = sum(path.stat().st_size for path in paths) > _memory_size() // 2

    def __call__(self, name: str) -> Tensor:
        place = self._place(name)
        memory = torch.empty(place.bytes, dtype=torch.uint8, device="cpu")
        _read(place.path, place.begin, memory)
        return _widen_float16(memory.view(place.dtype).view(place.shape)).to(self.device)

    def rows(self, name: str, index: Tensor) -> Tensor:
        place = self._place(name)
        count = place.shape[0] if place.shape else 0
        if index.numel() and int(index.max()) >= count:
            raise CheckpointError(
                f"{name!r} has {count} row{'' if count == 1 else 's'}, and row {int(index.max())} is asked for: "
                "check that config.json belongs to these weights"
            )
        step = place.bytes // max(1, count)
        wanted, where = index.cpu().unique(return_inverse=True)
        memory = torch.empty(len(wanted), step, dtype=torch.uint8, device="cpu")
        for row, number in zip(memory, wanted.tolist(), strict=True):
            _read(place.path, place.begin + number * step, row)
        return _widen_float16(memory.view(place.dtype))[where].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: place.dtype for name, place in self.places.items()}

    def equal(self, name: str, other_name: str) -> bool:
        return numbers_equal(self(name), self(other_name))

    def take(self, names: dict[str, str]) -> None:
        """Keep only the tensors in ``names``, a dict from the name to ask for to the file's name."""
        self.places = {name: self.places[key] for name, key in names.items()}

    def _place(self, name: str) -> _Place:
        if name not in self.places:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}; it holds {some(sorted(self.places))}. "
                "Check that config.json belongs to these weights"
            )
        return self.places[name]


def decoder_in(folder: str | Path, device: torch.device | str = "cpu") -> Decoder:
    """Open the decoder in a folder with config.json and safetensors, as transformers writes them.

    Args:
        folder: The folder.
        device: Where each tensor goes when it is read.

    Raises:
        CheckpointError: If the folder lacks either file, its model has no rules or is quantised, or it holds other
            weights than those that its config describes.
    """
    folder = Path(folder)
    if (file := gguf_in(folder)) is not None:
        raise no_stream(file)
    stated, architecture = config_in(folder)
    check_plain(stated, architecture, folder)
    expected = expected_by(stated, architecture, folder)
    config = config_of(expected.family, stated, architecture)
    if isinstance(config, str):
        raise CheckpointError(f"{folder} can't be streamed: {config}")
    weights = FolderWeights(folder, device)
    weights.take(match(expected, weights, folder))
    decoder = Decoder(expected.family, config, weights)
    if unread := weights.places.keys() - _all_names(decoder):
        raise CheckpointError(
            f"{folder} can't be streamed: in this version of transformers, its class computes with "
            f"{some(sorted(unread))}, which no rule reads"
        )
    return decoder


def check_folder(folder: Path, config: Any, architecture: str) -> set[torch.dtype]:
    """Check the weights in ``folder`` against the config, and return the dtypes of those that transformers would load.

    Raises:
        CheckpointError: If they are not the weights that the config describes, or not floating-point numbers.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    stored: Stored = FolderWeights(folder) if whole.is_file() or index.is_file() else PickledWeights(folder)
    keys = match(expected_by(config, architecture, folder), stored, folder).values()
    for key in keys:
        if not stored.dtypes[key].is_floating_point:
            raise CheckpointError(
                f"{key!r} in {folder} is {stored.dtypes[key]}; weights must be floating-point numbers"
            )
    return {stored.dtypes[key] for key in keys}


def streamed_layers(decoder: Decoder, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, DecoderLayer]]:
    """Yield layers, each valid until the next is asked for, which is read in the meantime.

    ``numbers``: which layers, in which order, any of them as often as it is named; all of them once by default.
    """
    weights = decoder.weights
    assert isinstance(weights, FolderWeights)
    order = range(decoder.config.layers) if numbers is None else numbers
    names_of = {i: _names_of(decoder, i) for i in set(order)}
    size = max((_slot_bytes(weights, names) for names in names_of.values()), default=0)
    slots = [_aligned_memory(size) for _ in range(min(2, len(order)))]
    with ThreadPoolExecutor(1, thread_name_prefix="scalpel-read-ahead") as reader:
        pending = reader.submit(_fill, weights, names_of[order[0]], slots[0]) if order else None
        for place, i in enumerate(order):
            assert pending is not None
            tensors = {name: tensor.to(weights.device) for name, tensor in pending.result().items()}
            pending = None
            if place + 1 < len(order):
                pending = reader.submit(_fill, weights, names_of[order[place + 1]], slots[(place + 1) % 2])
            yield i, decoder.family.layer(_LayerTensors(tensors, weights), i)


def neurons_of(decoder: Decoder, i: int) -> int:
    """How many neurons the MLP of layer ``i`` has; nothing is read."""
    assert isinstance(decoder.weights, FolderWeights)
    return int(decoder.family.layer(_NameRecorder(decoder.weights), i).down.weight.shape[1])


class _LayerTensors:
    """The tensors of one layer, which have been read."""

    def __init__(self, tensors: dict[str, Tensor], weights: FolderWeights) -> None:
        self._tensors = tensors
        self._weights = weights

    def __call__(self, name: str) -> Tensor:
        return self._tensors[name]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self._weights.rows(name, index)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


class _NameRecorder:
    """Weights without memory that record which tensors a family's functions read."""

    def __init__(self, weights: FolderWeights) -> None:
        self.names: list[str] = []
        self._weights = weights

    def __call__(self, name: str) -> Tensor:
        place = self._weights._place(name)
        self.names.append(name)
        return torch.empty(place.shape, dtype=place.dtype, device="meta")

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self(name)[index]

    def __contains__(self, name: object) -> bool:
        return name in self._weights


def _names_of(decoder: Decoder, i: int) -> list[str]:
    assert isinstance(decoder.weights, FolderWeights)
    recorder = _NameRecorder(decoder.weights)
    decoder.family.layer(recorder, i)
    return recorder.names


def _all_names(decoder: Decoder) -> set[str]:
    """Return the names of all tensors that a forward pass reads."""
    assert isinstance(decoder.weights, FolderWeights)
    recorder, no_ids = _NameRecorder(decoder.weights), torch.zeros(1, 0, dtype=torch.int64, device="meta")
    decoder.family.embed(recorder, no_ids, no_ids)
    decoder.family.final(recorder)
    return {*recorder.names, *(name for i in range(decoder.config.layers) for name in _names_of(decoder, i))}


def _round_up(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _aligned_memory(size: int) -> Tensor:
    memory = torch.empty(size + _ALIGNED, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % _ALIGNED
    return memory[start : start + size]


def _slot_bytes(weights: FolderWeights, names: list[str]) -> int:
    """Return how many bytes :func:`_fill` needs at most."""
    return sum(_round_up(weights.places[name].bytes) + _ALIGNED for name in names)


def _fill(weights: FolderWeights, names: list[str], slot: Tensor) -> dict[str, Tensor]:
    """Read tensors into ``slot``, an aligned piece of memory, and return them by name."""
    tensors, start = {}, 0
    for name in names:
        place = weights.places[name]
        # In memory the tensor begins as many bytes after an aligned address as it does in its file.
        offset = place.begin % _ALIGNED
        room = slot[start : start + _round_up(offset + place.bytes)]
        memory = room[offset : offset + place.bytes]
        if offset % place.dtype.itemsize:  # after a header of odd length, its numbers would not be aligned in memory
            memory = room[: place.bytes]
            _read(place.path, place.begin, memory)
        elif not (weights.past_cache and _read_past_cache(place, room)):
            _read(place.path, place.begin, memory)
        tensors[name] = _widen_float16(memory.view(place.dtype).view(place.shape))
        start += len(room)
    return tensors


def _widen_float16(tensor: Tensor) -> Tensor:
    """Convert float16, in which products overflow, to float32; other dtypes stay."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


# ---- files -------------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [whole]
    if not whole.is_file() and index.is_file():
        paths = [folder / name for name in sorted(set(read_weight_map(index).values()))]
    elif not whole.is_file():
        _check_not_pickled(folder)
    for path in paths:
        check_link(path)
        if path.parent != folder or not path.is_file():  # an index may not point outside its folder
            raise CheckpointError(
                f"{path} is not there: give a folder with model.safetensors, or with an index and all of its shards"
            )
    return paths


def _check_not_pickled(folder: Path) -> None:
    """Check that a folder without safetensors holds no pickles, whose tensors can't be read one by one.

    Raises:
        CheckpointError: If it does.
    """
    name = next((name for name in WEIGHT_FILES if ".bin" in name and (folder / name).is_file()), None)
    if name is not None:
        raise CheckpointError(
            f"{folder} holds {name}, which can't be streamed: load the model with transformers, save it with "
            "save_pretrained, and give that folder"
        )


def _header(path: Path) -> dict[str, _Place]:
    """Read where the tensors of one file are.

    A safetensors file holds the length of its header in 8 bytes, the header as JSON, and then the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{path} is no safetensors file, or it is cut short")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} can't be read as safetensors: {type(error).__name__}: {error}") from error
    places = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _DTYPES:
            if not passed_over(name):
                raise CheckpointError(
                    f"{path}: {name!r} is {dtype}; allowed: {', '.join(_DTYPES)}. Quantised weights must first be "
                    "dequantised by transformers and saved with save_pretrained"
                )
            continue  # a mask, which no rule reads
        place = _Place(path, _DTYPES[dtype], shape, 8 + length + begin)
        if begin < 0 or min(shape, default=0) < 0 or place.bytes != end - begin:
            raise CheckpointError(f"{path}: {name!r} of shape {shape} can't take bytes {begin} to {end}")
        if 8 + length + end > size:
            raise CheckpointError(f"{path} is cut short: {name!r} ends at byte {8 + length + end} of {size}")
        places[name] = place
    return places


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int for number in (begin, end, *shape)):
        raise TypeError(f"offsets {begin!r} and {end!r} and shape {shape!r} must be integers")
    return str(entry["dtype"]), tuple(shape), begin, end


def _memory_size() -> int:
    """Return the bytes of memory of this machine, or a huge number where the system doesn't say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def _read_past_cache(place: _Place, room: Tensor) -> bool:
    """Read the aligned span of the file around a tensor into ``room``; return False if the system can't do that."""
    if not hasattr(os, "O_DIRECT"):
        return False
    view = memoryview(room.numpy())  # type: ignore[arg-type]
    begin = place.begin - place.begin % _ALIGNED
    needed = place.begin + place.bytes - begin
    try:
        file = os.open(place.path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # as on a file system in memory
        return False
    try:
        done = 0
        while done < needed:
            count = os.preadv(file, [view[done : done + _PIECE]], begin + done)
            done += count
            if count % _ALIGNED:  # only at the end of a file may a read return less
                break
        return done >= needed
    except OSError:
        return False
    finally:
        os.close(file)


def _read(path: Path, begin: int, into: Tensor) -> None:
    """Read bytes of a file from ``begin`` on until ``into``, uint8 (n,), is full."""
    view = memoryview(into.numpy())  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + _PIECE]], begin + done)
            if count == 0:
                raise CheckpointError(f"{path} is cut short at byte {begin + done}: it changed while it was read")
            done += count
