"""Keep states on disk while a corpus is read: those of finished streams, and two saves of those being filled."""

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

    ``done/`` holds a file for each finished stream, and the digest of the corpus that was read.
    ``at-<group>-<batches>/`` is a generation, which is one save of the group that is being filled: a file for each of
    its streams, and ``position.json``. A generation takes this name only when it is complete on the disk.

    Args:
        folder: The folder, which is created if it does not exist.
        key: Plain data that identifies what is collected.
        fresh: Whether to discard what the folder holds.

    Raises:
        ValueError: If the folder holds another collection, or states without a record of what was collected.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], fresh: bool = False) -> None:
        self._work = Work(
            folder,
            "collect.json",
            key,
            WAY_OUT,
            pieces=("at-*", "done/*"),  # any file in done/ counts, even one that the user put there
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
        """Store the states of a filled group, and remove all generations.

        Args:
            states: The states by stream.
            corpus: The digest of the corpus.
        """
        for name, state in states.items():
            state.save(self._path(self.done, name))
        replace_text(self.done / "corpus.txt", corpus + "\n")
        for old in self._generations():
            shutil.rmtree(old, ignore_errors=True)

    @property
    def corpus(self) -> str:
        """The digest of the corpus that ``finish`` stored, or an empty text if no group is finished."""
        path = self.done / "corpus.txt"
        return path.read_text().strip() if path.is_file() else ""

    def finished(self, names: list[str]) -> bool:
        """Return whether all of these streams are finished and undamaged, and warn of the first that is damaged."""
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
        """Read the state of a finished stream.

        Raises:
            ValueError: If its file is damaged.
        """
        return StreamingCovariance.load(self._path(self.done, name))

    # ---- the group being filled ------------------------------------------------------------------

    def last(self, group: int) -> tuple[States, dict[str, Any]] | None:
        """Read the newest generation of a group that is undamaged.

        A RuntimeWarning is given for each newer generation that is truncated, damaged or not a generation at all.

        Returns:
            Its states and its position, or None if the group has no generation.

        Raises:
            ValueError: If the group has generations and all of them are damaged.
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
        """Write a new generation, and remove all but the last two. It is written completely or not at all."""
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
    """A mapping of states on disk that reads each state when it is asked for.

    Only one state needs to be in memory. Changes to a state are not saved.

    Args:
        saved: The folder that holds the states.
        names: The names of their streams.
        temporary: A folder that is removed when this object is no longer used, or None.

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
