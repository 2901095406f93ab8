"""The header of a GGUF file: its metadata, and the name, shape, storage kind and place of each tensor.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. This module needs no other package, so a
file can be recognised, and refused, without any.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..gguf_files import MAGIC
from ..weight_files import CheckpointError

__all__ = ["Header", "StoredTensor", "read_header"]

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 4


class StoredTensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        shape: Its shape in torch's order, the slowest dimension first.
        kind: ggml's number for how it is stored.
        begin: Its offset from the start of the tensors.
    """

    shape: tuple[int, ...]
    kind: int
    begin: int


@dataclass(frozen=True)
class Header:
    """What precedes the tensors in a GGUF file.

    Attributes:
        path: The file.
        facts: The metadata; a list of texts is represented by its length.
        tensors: The tensors, by name.
        begin: Where the tensors start.
    """

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, StoredTensor]
    begin: int

    @property
    def architecture(self) -> str:
        """The name of the architecture."""
        return str(self.facts["general.architecture"])

    def of_architecture(self) -> dict[str, Any]:
        """Return the metadata that describes the architecture, without the architecture's name in front."""
        front = f"{self.architecture}."
        return {key.removeprefix(front): value for key, value in self.facts.items() if key.startswith(front)}

    def kinds(self) -> Counter[int]:
        """Count how many tensors are stored in each way."""
        return Counter(tensor.kind for tensor in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: If it is not a GGUF file, is cut short, or has another version.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
        try:
            return _read(path, file, path.stat().st_size)
        except (struct.error, UnicodeDecodeError, _CutShort) as error:
            raise CheckpointError(f"{path} is cut short or damaged: its header can't be read ({error})") from error


class _CutShort(Exception):
    pass


def _read(path: Path, file: BinaryIO, size: int) -> Header:
    (version,) = _numbers(file, "<I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF of version {version if version < 1 << 16 else 'a big-endian machine'}; versions 2 and 3, "
            "little-endian, are read. Convert it anew with the present llama.cpp"
        )
    count, pairs = _numbers(file, "<QQ")
    facts = {}
    for _ in range(pairs):
        key = _text(file, size)
        (kind,) = _numbers(file, "<I")
        facts[key] = _value(file, kind, size)
    if not isinstance(facts.get("general.architecture"), str):
        raise CheckpointError(f"{path} has no text 'general.architecture', which says what model it holds")
    tensors = {}
    for _ in range(count):
        name = _text(file, size)
        (dimensions,) = _numbers(file, "<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _CutShort(f"{name!r} has {dimensions} dimensions")
        shape = _numbers(file, f"<{dimensions}Q")
        tensors[name] = StoredTensor(tuple(reversed(shape)), *_numbers(file, "<IQ"))
    aligned = facts.get("general.alignment", 32)
    if not isinstance(aligned, int) or aligned < 1:
        raise _CutShort(f"its alignment is {aligned!r}")
    return Header(path, facts, tensors, -(-file.tell() // aligned) * aligned)


def _numbers(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO, size: int) -> str:
    (length,) = _numbers(file, "<Q")
    if length > size:
        raise _CutShort(f"a text of {length} bytes in a file of {size}")
    raw = file.read(length)
    if len(raw) < length:
        raise _CutShort("it ends in a text")
    return raw.decode()


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind in _NUMBERS:
        return _numbers(file, _NUMBERS[kind])[0]
    if kind == _TEXT:
        return _text(file, size)
    if kind != _LIST:
        raise _CutShort(f"metadata of kind {kind}")
    inner, length = _numbers(file, "<IQ")
    if length > size:
        raise _CutShort(f"a list of {length} in a file of {size} bytes")
    if inner in _NUMBERS:
        return list(_numbers(file, f"<{length}{_NUMBERS[inner][1]}"))
    if inner != _TEXT:
        raise _CutShort(f"a list of kind {inner}")
    for _ in range(length):
        _text(file, size)
    return length
