"""The results of an analysis on disk, with one JSON file for each chunk that is completely measured.

A key, kept beside them, says which analysis they belong to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._resume import WayOut, Work

_WAY_OUT = WayOut("analysis", "give another --out", "--fresh to measure anew there")
_RESULTS = ("analysis.json", "report.html", "chunks/[0-9]*.json")
_SPECTRA = ("spectra-*.json", "blocks-*", "states")  # each says by itself which measurement it belongs to


class Store(Work):
    """The folder of one analysis.

    A chunk is begun, and then saved. If a chunk was begun but neither saved nor given up, its run was ended from
    outside, for instance by a system that ran out of memory. :meth:`times_cut_off` tells a later run about it.

    Args:
        folder: The folder, which is created where it doesn't exist.
        key: Plain data that says what is analysed, and how.
        length: Tokens of a chunk, as long as memory suffices.
        fresh: Whether to remove the files of an earlier analysis, and no other files, and to start again.

    Raises:
        ValueError: The folder holds a different analysis, or the files of one without a key.
        OSError: The folder can't be written.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any], length: int, fresh: bool) -> None:
        super().__init__(
            folder,
            "state.json",
            key,
            _WAY_OUT,
            pieces=_RESULTS,
            leftovers=(*_RESULTS, *_SPECTRA),
            fresh=fresh,
            notes={"length": length, "shrunk": [], "begun": None},
        )

    @property
    def length(self) -> int:
        """The number of tokens of the chunks that are still to be measured."""
        return int(self.notes["length"])

    @property
    def shrunk(self) -> list[dict[str, int]]:
        """The times that chunks were made shorter: at which chunk, from how many tokens, and to how many."""
        return list(self.notes["shrunk"])

    def shrink(self, chunk: int, length: int) -> None:
        """Reduce the length of ``chunk`` and of all later chunks to ``length`` tokens."""
        step = {"chunk": chunk, "from": self.length, "to": length}
        self.note(length=length, shrunk=[*self.shrunk, step], begun=None)

    def begin_chunk(self, chunk: int) -> None:
        """Note on disk that ``chunk`` is being measured at the present length."""
        self.begin(chunk=chunk, length=self.length)

    def times_cut_off(self, chunk: int) -> int:
        """Count the runs that were ended from outside while they measured ``chunk`` at the present length."""
        return self.cut_off(chunk=chunk, length=self.length)

    def load(self, chunk: int) -> dict[str, Any] | None:
        """Return the record of a chunk; None where it is not measured yet."""
        return self.read(_name(chunk))

    def save(self, chunk: int, record: dict[str, Any]) -> None:
        """Keep the record of the chunk that was begun."""
        self.finish(_name(chunk), record)


def _name(chunk: int) -> str:
    """The path of a chunk's file inside the folder."""
    return f"chunks/{chunk:05d}.json"
