"""States on disk while a corpus is read: finished streams, and the last two generations of those being filled."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .._files import flush, replace_text
from ..covariance import StreamingCovariance

_KEEP = 2
_VERSION = 1

States = dict[str, StreamingCovariance]


class Saved:
    """The folder of one collection.

    ``done/``: a file a finished stream, and what they were made of. ``at-<group>-<batches>/``: a generation, with a
    file a stream of the group being filled and ``position.json``; it takes its name when all of it is on the disk.

    ``key``: plain data that says what is collected. ValueError for a folder of another key.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], fresh: bool = False) -> None:
        self.folder = Path(folder)
        self.done = self.folder / "done"
        self.done.mkdir(parents=True, exist_ok=True)
        path = self.folder / "collect.json"
        told = {"version": _VERSION, "key": json.loads(json.dumps(key))}
        before = self._told(path, fresh)
        if before is None:
            if not fresh and (self._generations() or any(self.done.iterdir())):
                raise ValueError(
                    f"{self.folder} holds states, but no collect.json that says of what: give another folder, or "
                    "fresh=True to collect anew there"
                )
        elif not fresh and before != told:
            was = before.get("key", {})
            names = [name for name in told["key"] | was if was.get(name) != told["key"].get(name)]
            raise ValueError(
                f"{self.folder} holds another collection ({', '.join(names) or 'version'} differ): give another "
                "folder, or fresh=True to collect anew there"
            )
        if fresh:
            self._clear()
        if fresh or before is None:
            replace_text(path, json.dumps(told, indent=2) + "\n")

    def _told(self, path: Path, fresh: bool) -> dict[str, Any] | None:
        """What collect.json says; None where there is none. ValueError for another program's, which stays."""
        if not path.is_file():
            return None
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            if fresh:
                return None
            raise ValueError(f"{path} can't be read ({error}): fresh=True collects anew") from error
        if not isinstance(before, dict) or not isinstance(before.get("key"), dict) or "version" not in before:
            raise ValueError(f"{path} is not of scalpel.collect: give another folder")
        return before

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
            raise ValueError(f"no state in {self.folder} is sound: fresh=True collects anew")
        return None

    def save(self, states: States, group: int, batches: int, digest: str) -> None:
        """A new generation, whole or not at all."""
        final = self.folder / f"at-{group:04d}-{batches:09d}"
        draft = self.folder / f".{final.name}.part"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name, state in states.items():
            state.save(self._path(draft, name))
        position = {"batches": batches, "digest": digest, "streams": list(states)}
        replace_text(draft / "position.json", json.dumps(position) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # one that was not sound
        os.rename(draft, final)
        flush(self.folder)
        for old in self._generations()[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{quote(name, safe='')}.safetensors"

    def _generations(self, group: int | None = None) -> list[Path]:
        return sorted(self.folder.glob("at-*" if group is None else f"at-{group:04d}-*"))

    def _clear(self) -> None:
        """Away with what this class writes, and with nothing else."""
        for path in (*self._generations(), *self.folder.glob(".at-*.part")):
            shutil.rmtree(path)
        for path in (*self.done.glob("*.safetensors"), self.done / "corpus.txt"):
            path.unlink(missing_ok=True)


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
