"""A decoder in a folder of safetensors, read a layer at a time: no module is built, and one layer is in memory.

While a layer computes, the next is read into a second piece of memory; both are used again and again, so that
a model of any size takes two layers' worth. Files are read, not mapped: a mapped file would count as resident. Those
of a model that the system could not keep in its cache are read past it, which leaves the processor to the products
(on two cores, copying through the cache took nine tenths of one of them).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gguf_files import gguf_in, no_stream
from ..weight_files import WEIGHT_FILES, CheckpointError, PickledWeights, check_link, numbers_equal, read_json, some
from .decoder import Decoder, DecoderLayer
from .families import config_of
from .strict import Stored, check_plain, config_in, expected_by, match, passed_over

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNED = 4096  # where reads past the cache begin and end, in the file and in memory
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
    """The tensors of a folder's safetensors by name, each read when it is asked for, and put on ``device``."""

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
        return _wide(memory.view(place.dtype).view(place.shape)).to(self.device)

    def rows(self, name: str, index: Tensor) -> Tensor:
        place = self._place(name)
        count = place.shape[0] if place.shape else 0
        if index.numel() and int(index.max()) >= count:
            raise CheckpointError(
                f"{name!r} has {count} row{'' if count == 1 else 's'}, and row {int(index.max())} is asked for: "
                "is config.json that of these weights?"
            )
        step = place.bytes // max(1, count)
        wanted, where = index.cpu().unique(return_inverse=True)
        memory = torch.empty(len(wanted), step, dtype=torch.uint8, device="cpu")
        for row, number in zip(memory, wanted.tolist(), strict=True):
            _read(place.path, place.begin + number * step, row)
        return _wide(memory.view(place.dtype))[where].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: place.dtype for name, place in self.places.items()}

    def equal(self, one: str, other: str) -> bool:
        return numbers_equal(self(one), self(other))

    def take(self, names: dict[str, str]) -> None:
        """From now on only the tensors of ``names`` (as it is asked for → as the file calls it) are there."""
        self.places = {name: self.places[key] for name, key in names.items()}

    def _place(self, name: str) -> _Place:
        if name not in self.places:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}; it holds {some(sorted(self.places))}. "
                "Is config.json that of these weights?"
            )
        return self.places[name]


def decoder_in(folder: str | Path, device: torch.device | str = "cpu") -> Decoder:
    """The decoder in a folder with config.json and safetensors, as transformers writes them; its tensors on ``device``.

    Raises CheckpointError where the folder lacks one of these, names a model that has no rules, is quantised, or holds
    other weights than those that its config describes.
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
    if left := weights.places.keys() - _all_names(decoder):
        raise CheckpointError(
            f"{folder} can't be streamed: its class, as this version of transformers has it, computes with "
            f"{some(sorted(left))}, which no rule reads"
        )
    return decoder


def check_folder(folder: Path, config: Any, architecture: str) -> set[torch.dtype]:
    """The dtypes of the weights that transformers would load in ``folder``.

    Raises CheckpointError where they are not those that its config describes, or no floating-point numbers.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    stored: Stored = FolderWeights(folder) if whole.is_file() or index.is_file() else PickledWeights(folder)
    keys = match(expected_by(config, architecture, folder), stored, folder).values()
    if odd := [key for key in keys if not stored.dtypes[key].is_floating_point]:
        raise CheckpointError(f"{odd[0]!r} in {folder} is {stored.dtypes[odd[0]]}; weights are floating point")
    return {stored.dtypes[key] for key in keys}


def streamed_layers(decoder: Decoder) -> Iterator[tuple[int, DecoderLayer]]:
    """All layers in order, each valid until the next is asked for; the next is read meanwhile."""
    weights = decoder.weights
    assert isinstance(weights, FolderWeights)
    wanted = [_names_of(decoder, i) for i in range(decoder.config.layers)]
    size = max((_room(weights, names) for names in wanted), default=0)
    slots = [_aligned_memory(size) for _ in range(min(2, len(wanted)))]
    with ThreadPoolExecutor(1, thread_name_prefix="scalpel-read-ahead") as reader:
        coming = reader.submit(_fill, weights, wanted[0], slots[0]) if wanted else None
        for i in range(len(wanted)):
            assert coming is not None
            tensors = {name: tensor.to(weights.device) for name, tensor in coming.result().items()}
            coming = None
            if i + 1 < len(wanted):
                coming = reader.submit(_fill, weights, wanted[i + 1], slots[(i + 1) % 2])
            yield i, decoder.family.layer(_Held(tensors, weights), i)


class _Held:
    """One layer's tensors, already read."""

    def __init__(self, tensors: dict[str, Tensor], weights: FolderWeights) -> None:
        self._tensors = tensors
        self._weights = weights

    def __call__(self, name: str) -> Tensor:
        return self._tensors[name]

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self._weights.rows(name, index)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


class _Asked:
    """Notes which tensors a family reads for a layer."""

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
    asked = _Asked(decoder.weights)
    decoder.family.layer(asked, i)
    return asked.names


def _all_names(decoder: Decoder) -> set[str]:
    """All tensors that a forward pass reads."""
    assert isinstance(decoder.weights, FolderWeights)
    asked, nothing = _Asked(decoder.weights), torch.zeros(1, 0, dtype=torch.int64, device="meta")
    decoder.family.embed(asked, nothing, nothing)
    decoder.family.final(asked)
    return {*asked.names, *(name for i in range(decoder.config.layers) for name in _names_of(decoder, i))}


def _aligned(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _aligned_memory(size: int) -> Tensor:
    memory = torch.empty(size + _ALIGNED, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % _ALIGNED
    return memory[start : start + size]


def _room(weights: FolderWeights, names: list[str]) -> int:
    return sum(_aligned(weights.places[name].bytes) + _ALIGNED for name in names)


def _fill(weights: FolderWeights, names: list[str], slot: Tensor) -> dict[str, Tensor]:
    found, at = {}, 0
    for name in names:
        place = weights.places[name]
        # The tensor lies in memory as in its file, so many bytes after a multiple of what reads are aligned to.
        late = place.begin % _ALIGNED
        room = slot[at : at + _aligned(late + place.bytes)]
        memory = room[late : late + place.bytes]
        if late % place.dtype.itemsize:
            memory = room[: place.bytes]  # an odd header: aligned for its dtype instead
            _read(place.path, place.begin, memory)
        elif not (weights.past_cache and _read_past_cache(place, room)):
            _read(place.path, place.begin, memory)
        found[name] = _wide(memory.view(place.dtype).view(place.shape))
        at += len(room)
    return found


def _wide(tensor: Tensor) -> Tensor:
    """float16, in which products overflow, as float32."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


# ---- files -------------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [whole]
    if not whole.is_file() and index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise CheckpointError(f"{index} has no 'weight_map' of key to file name")
        paths = [folder / name for name in sorted(set(where.values()))]
    elif not whole.is_file():
        _check_not_pickled(folder)
    for path in paths:
        check_link(path)
        if path.parent != folder or not path.is_file():  # a map may not point outside its folder
            raise CheckpointError(f"{path} is not there: a folder of safetensors is read, whole or in shards")
    return paths


def _check_not_pickled(folder: Path) -> None:
    """CheckpointError where a folder without safetensors has pickles, whose tensors can't be read one by one."""
    name = next((name for name in WEIGHT_FILES if ".bin" in name and (folder / name).is_file()), None)
    if name is not None:
        raise CheckpointError(
            f"{folder} holds {name}, which can't be streamed: load the model with transformers, save it with "
            "save_pretrained, and give that folder"
        )


def _header(path: Path) -> dict[str, _Place]:
    """Where the tensors of one file are (the format of safetensors: 8 bytes of length, JSON, the tensors)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{path} is no safetensors file, or it is cut short")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {name: _entry(each) for name, each in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} can't be read as safetensors: {type(error).__name__}: {error}") from error
    found = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _DTYPES:
            if not passed_over(name):
                raise CheckpointError(
                    f"{path}: {name!r} is {dtype}; allowed: {', '.join(_DTYPES)}. Quantised weights are read once "
                    "transformers has dequantised them and save_pretrained has written the result"
                )
            continue  # masks, which are read by nothing
        place = _Place(path, _DTYPES[dtype], shape, 8 + length + begin)
        if begin < 0 or min(shape, default=0) < 0 or place.bytes != end - begin:
            raise CheckpointError(f"{path}: {name!r} of shape {shape} lies at bytes {begin} to {end}, which don't fit")
        if 8 + length + end > size:
            raise CheckpointError(f"{path} is cut short: {name!r} ends at byte {8 + length + end} of {size}")
        found[name] = place
    return found


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int for number in (begin, end, *shape)):
        raise TypeError(f"numbers that are no integers: {begin!r}, {end!r}, {shape!r}")
    return str(entry["dtype"]), tuple(shape), begin, end


def _memory_size() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def _read_past_cache(place: _Place, room: Tensor) -> bool:
    """The aligned span of the file around a tensor, into memory as large; False where the system won't do that."""
    if not hasattr(os, "O_DIRECT"):
        return False
    view = memoryview(room.numpy())  # type: ignore[arg-type]
    begin = place.begin - place.begin % _ALIGNED
    needed = place.begin + place.bytes - begin
    try:
        file = os.open(place.path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system in memory, say
        return False
    try:
        done = 0
        while done < needed:
            count = os.preadv(file, [view[done : done + _PIECE]], begin + done)
            done += count
            if count % _ALIGNED:  # only the end of a file may be cut
                break
        return done >= needed
    except OSError:
        return False
    finally:
        os.close(file)


def _read(path: Path, begin: int, into: Tensor) -> None:
    """Bytes from ``begin`` on; ``into`` (n,) uint8."""
    view = memoryview(into.numpy())  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + _PIECE]], begin + done)
            if count == 0:
                raise CheckpointError(f"{path} is cut short at byte {begin + done}: it changed while it was read")
            done += count
