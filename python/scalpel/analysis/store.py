"""What is already measured, on disk: one JSON file a chunk, complete or absent, and the key of what they belong to."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

_STATE = "state.json"
_RESULTS = ("analysis.json", "report.html")  # of the same analysis: they go when it does


class Store:
    """The folder of one analysis.

    ``key``: plain data that says what is analysed, and how. A folder with chunks of another key is refused with
    ValueError, unless ``fresh``, which removes what an analysis left there, and nothing else. OSError where the
    folder can't be written.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], length: int, fresh: bool) -> None:
        self.folder = Path(folder)
        self.chunks = self.folder / "chunks"
        self._state: dict[str, Any] = {"key": json.loads(json.dumps(key)), "length": length, "shrunk": []}
        self.chunks.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._clear()
        path = self.folder / _STATE
        if not path.is_file():
            self._write()
            return
        before = _read(path)
        if before.get("key") != self._state["key"]:
            raise ValueError(
                f"{self.folder} holds another analysis ({_difference(before.get('key'), self._state['key'])}): give "
                "another --out, or --fresh to measure anew there"
            )
        self._state = before

    @property
    def length(self) -> int:
        """Tokens of the chunks that are still to be measured."""
        return int(self._state["length"])

    @property
    def shrunk(self) -> list[dict[str, int]]:
        """Each time that memory ran out: at which chunk, and from how many tokens to how many."""
        return list(self._state["shrunk"])

    def shrink(self, chunk: int, length: int) -> None:
        self._state["shrunk"].append({"chunk": chunk, "from": self.length, "to": length})
        self._state["length"] = length
        self._write()

    def load(self, chunk: int) -> dict[str, Any] | None:
        """The record of a chunk; None where it is not measured yet."""
        path = self._path(chunk)
        return _read(path) if path.is_file() else None

    def save(self, chunk: int, record: dict[str, Any]) -> None:
        _replace(self._path(chunk), json.dumps(record, allow_nan=False))

    def _path(self, chunk: int) -> Path:
        return self.chunks / f"{chunk:05d}.json"

    def _write(self) -> None:
        _replace(self.folder / _STATE, json.dumps(self._state, indent=2))

    def _clear(self) -> None:
        for path in (*(self.folder / name for name in _RESULTS), *self.chunks.glob("[0-9]*.json")):
            path.unlink(missing_ok=True)
        (self.folder / _STATE).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}): --fresh measures anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of an analysis: --fresh measures anew")
    return found


def _difference(before: Any, now: dict[str, Any]) -> str:
    """Which entries of the key differ, in words."""
    if not isinstance(before, dict):
        return "of an unknown kind"
    names = [name for name in now | before if now.get(name) != before.get(name)]
    shown = []
    for name in names:
        one, other = before.get(name), now.get(name)
        short = all(not isinstance(each, str) or len(each) < 40 for each in (one, other))
        shown.append(f"{name} {one!r} there, {other!r} here" if short else f"another {name}")
    return "; ".join(shown)


def _replace(path: Path, text: str) -> None:
    """In one move: whoever reads it, after a power cut too, finds the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
