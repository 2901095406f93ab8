"""States on disk while a corpus is read: finished streams, and the last two generations of those being filled."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .._files import replace_text
from .._resume import WayOut, Work, another_work
from ..covariance import StreamingCovariance

_KEEP = 2
_VERSION = 1
_WAY_OUT = WayOut("collection", "give another folder", "fresh=True to collect anew there")

States = dict[str, StreamingCovariance]


class Saved:
    """The folder of one collection.

    ``done/``: a file a finished stream, and what they were made of. ``at-<group>-<batches>/``: a generation, with a
    file a stream of the group being filled and ``position.json``; it takes its name when all of it is on the disk.

    ``key``: plain data that says what is collected. ValueError for a folder of another key.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], fresh: bool = False) -> None:
        self._work = Work(
            folder,
            "collect.json",
            key,
            _WAY_OUT,
            pieces=("at-*", "done/*"),  # in done/ even a file of the user's makes the folder a doubtful one
            leftovers=("at-*", ".at-*.part", "done/*.safetensors", "done/corpus.txt"),
            fresh=fresh,
            own_names=True,
            notes={"version": _VERSION},
        )
        self.folder = self._work.folder
        self.done = self.folder / "done"
        self.done.mkdir(exist_ok=True)
        version = self._work.notes.get("version")
        if version != _VERSION:
            raise another_work(self.folder, {"version": version}, {"version": _VERSION}, _WAY_OUT)

    # ---- finished streams ------------------------------------------------------------------------

    def finish(self, states: Mapping[str, StreamingCovariance], corpus: str) -> None:
        """A group is filled; generations of it are of no more use. ``corpus``: what tells this corpus from another."""
        for name, state in states.items():
            state.save(self._path(self.done, name))
        replace_text(self.done / "corpus.txt", corpus + "\n")
        for old in self._generations():
            shutil.rmtree(old, ignore_errors=True)

    @property
    def corpus(self) -> str:
        """What ``finish`` was told; empty before."""
        path = self.done / "corpus.txt"
        return path.read_text().strip() if path.is_file() else ""

    def finished(self, names: list[str]) -> bool:
        """Whether all of these are, and sound; RuntimeWarning for one that isn't sound, and is to be made again."""
        if not self.corpus or not all(self._path(self.done, name).is_file() for name in names):
            return False
        for name in names:
            try:
                self.load(name)
            except (OSError, ValueError) as error:
                warnings.warn(f"a finished state is not sound and is made again: {error}", RuntimeWarning, stacklevel=4)
                return False
        return True

    def load(self, name: str) -> StreamingCovariance:
        """A finished stream; ValueError if its file isn't sound."""
        return StreamingCovariance.load(self._path(self.done, name))

    # ---- the group being filled ------------------------------------------------------------------

    def last(self, group: int) -> tuple[States, dict[str, Any]] | None:
        """The newest sound generation of a group: its states, and what ``save`` was told. None where there is none.

        RuntimeWarning for one that is truncated, damaged or foreign; the one before it is used. ValueError where all
        are.
        """
        generations = self._generations(group)
        for folder in reversed(generations):
            try:
                position = json.loads((folder / "position.json").read_text())
                names = position["streams"]
                return {name: StreamingCovariance.load(self._path(folder, name)) for name in names}, position
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                warnings.warn(f"{folder} is not sound and not used: {error}", RuntimeWarning, stacklevel=4)
        if generations:
            raise ValueError(f"no state in {self.folder} is sound: {_WAY_OUT}")
        return None

    def save(self, states: States, group: int, batches: int, digest: str) -> None:
        """A new generation, whole or not at all."""
        with self._work.writing_folder(f"at-{group:04d}-{batches:09d}") as draft:
            for name, state in states.items():
                state.save(self._path(draft, name))
            position = {"batches": batches, "digest": digest, "streams": list(states)}
            replace_text(draft / "position.json", json.dumps(position) + "\n")
        for old in self._generations()[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{quote(name, safe='')}.safetensors"

    def _generations(self, group: int | None = None) -> list[Path]:
        return sorted(self.folder.glob("at-*" if group is None else f"at-{group:04d}-*"))


class Stored(Mapping[str, StreamingCovariance]):
    """States that lie on disk: each is read when it is asked for, so that one at a time is in memory; what is done to
    it then does not reach the disk.

    ``temporary``: a folder that goes when this does.
    """

    def __init__(self, saved: Saved, names: list[str], temporary: str | None = None) -> None:
        self._saved, self._names = saved, names
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, True)

    def __getitem__(self, name: str) -> StreamingCovariance:
        if name not in self._names:
            raise KeyError(name)
        return self._saved.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
