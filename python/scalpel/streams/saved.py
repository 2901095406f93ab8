"""States on disk while a corpus is read: those of finished streams, and the last two saves of those being filled."""

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
WAY_OUT = WayOut("collection", "give another folder", "fresh=True to collect anew there")

States = dict[str, StreamingCovariance]


class Saved:
    """The folder of one collection.

    ``done/`` holds a file for each finished stream, and the digest of the corpus that they were made of.
    ``at-<group>-<batches>/`` is a generation: a file for each stream of the group that is being filled, and
    ``position.json``. It takes its name when all of it is on the disk.

    Args:
        folder: It is created if need be.
        key: Plain data that says what is collected.
        fresh: Discard what the folder holds.

    Raises:
        ValueError: The folder holds another collection, or states of an unknown one.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], fresh: bool = False) -> None:
        self._work = Work(
            folder,
            "collect.json",
            key,
            WAY_OUT,
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
            raise another_work(self.folder, {"version": version}, {"version": _VERSION}, WAY_OUT)

    # ---- finished streams ------------------------------------------------------------------------

    def finish(self, states: Mapping[str, StreamingCovariance], corpus: str) -> None:
        """Store the states of a filled group and remove its generations. ``corpus`` is the digest of the corpus."""
        for name, state in states.items():
            state.save(self._path(self.done, name))
        replace_text(self.done / "corpus.txt", corpus + "\n")
        for old in self._generations():
            shutil.rmtree(old, ignore_errors=True)

    @property
    def corpus(self) -> str:
        """The digest that ``finish`` stored; empty before."""
        path = self.done / "corpus.txt"
        return path.read_text().strip() if path.is_file() else ""

    def finished(self, names: list[str]) -> bool:
        """Whether all of these streams are finished and undamaged. A damaged one gives a RuntimeWarning."""
        if not self.corpus or not all(self._path(self.done, name).is_file() for name in names):
            return False
        for name in names:
            try:
                self.load(name)
            except (OSError, ValueError) as error:
                warnings.warn(f"a finished state is damaged and is made again: {error}", RuntimeWarning, stacklevel=4)
                return False
        return True

    def load(self, name: str) -> StreamingCovariance:
        """The state of a finished stream; ValueError if its file is damaged."""
        return StreamingCovariance.load(self._path(self.done, name))

    # ---- the group being filled ------------------------------------------------------------------

    def last(self, group: int) -> tuple[States, dict[str, Any]] | None:
        """The newest undamaged generation of a group: its states and its position; None if there is no generation.

        A generation that is truncated, damaged or foreign gives a RuntimeWarning, and the one before it is used. If
        all are, ValueError.
        """
        generations = self._generations(group)
        for folder in reversed(generations):
            try:
                position = json.loads((folder / "position.json").read_text())
                names = position["streams"]
                return {name: StreamingCovariance.load(self._path(folder, name)) for name in names}, position
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                warnings.warn(f"{folder} is damaged and not used: {error}", RuntimeWarning, stacklevel=4)
        if generations:
            raise ValueError(f"all states in {self.folder} are damaged: {WAY_OUT}")
        return None

    def save(self, states: States, group: int, batches: int, digest: str) -> None:
        """Write a new generation, whole or not at all."""
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
    """States on disk, each of which is read when it is asked for, so that only one is in memory.

    Changes to a state are not saved.

    Args:
        saved: Their folder.
        names: Their streams.
        temporary: A folder that is removed together with this object.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> batches = [torch.arange(64).reshape(2, 32)]
        >>> hooks = ["0.resid_in", "final_resid"]
        >>> states = scalpel.collect(model, batches, hooks, memory="1MiB", progress=False)
        >>> type(states).__name__, states["final_resid"].count
        ('Stored', 64)
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
