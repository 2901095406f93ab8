"""What is already measured, on disk: one JSON file a chunk, complete or absent, and the key of what they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .._files import replace_text

_STATE = "state.json"
_RESULTS = ("analysis.json", "report.html")  # of the same analysis: they go when it does
_SPECTRA = ("spectra-*.json", "blocks-*", "states")


class Store:
    """The folder of one analysis.

    ``key``: plain data that says what is analysed, and how. A folder with chunks of another key is refused with
    ValueError, unless ``fresh``, which removes what an analysis left there, and nothing else. OSError where the
    folder can't be written.

    A chunk is begun, and then saved: one that was begun and neither saved nor given up was cut off from outside, as
    by a system that has run out of memory, and a later run is told by ``cut_off``.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], length: int, fresh: bool) -> None:
        self.folder = Path(folder)
        self.chunks = self.folder / "chunks"
        self._state: dict[str, Any] = {
            "key": json.loads(json.dumps(key)),
            "length": length,
            "shrunk": [],
            "begun": None,
        }
        self.chunks.mkdir(parents=True, exist_ok=True)
        path = self.folder / _STATE
        if fresh and path.is_file():
            self._clear()
        if not path.is_file():
            self._check_empty()
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
        self._state |= {"length": length, "begun": None}
        self._write()

    def begin(self, chunk: int) -> None:
        """Note on disk that ``chunk`` is being measured at the present length."""
        times = self.cut_off(chunk) + 1
        self._state["begun"] = {"chunk": chunk, "length": self.length, "times": times}
        self._write()

    def give_up(self) -> None:
        """The chunk that was begun ended with an error that was seen, or by the user's wish: it was not cut off."""
        self._state["begun"] = None
        self._write()

    def cut_off(self, chunk: int) -> int:
        """How many runs were cut off while they measured ``chunk`` at the present length."""
        begun = self._state.get("begun")
        here = {"chunk": chunk, "length": self.length}
        return int(begun["times"]) if begun is not None and here.items() <= begun.items() else 0

    def load(self, chunk: int) -> dict[str, Any] | None:
        """The record of a chunk; None where it is not measured yet."""
        path = self._path(chunk)
        return _read(path) if path.is_file() else None

    def save(self, chunk: int, record: dict[str, Any]) -> None:
        replace_text(self._path(chunk), json.dumps(record, allow_nan=False) + "\n")
        self._state["begun"] = None  # on disk with the next change: a saved chunk is not begun again

    def _path(self, chunk: int) -> Path:
        return self.chunks / f"{chunk:05d}.json"

    def _write(self) -> None:
        replace_text(self.folder / _STATE, json.dumps(self._state, indent=2) + "\n")

    def _check_empty(self) -> None:
        """A folder without a state must not hold what this analysis would adopt or overwrite."""
        found = [path for path in (*(self.folder / name for name in _RESULTS), *self._chunk_files()) if path.exists()]
        if found:
            raise ValueError(
                f"{self.folder} holds {found[0].relative_to(self.folder)}, but no {_STATE} that says of what: give "
                "another --out, or remove it"
            )

    def _chunk_files(self) -> list[Path]:
        return sorted(self.chunks.glob("[0-9]*.json"))

    def _clear(self) -> None:
        for path in (*(self.folder / name for name in _RESULTS), *self._chunk_files()):
            path.unlink(missing_ok=True)
        for path in (each for pattern in _SPECTRA for each in self.folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
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
