"""What is already measured, on disk: one JSON file a chunk, complete or absent, and the key of what they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._resume import WayOut, Work

_WAY_OUT = WayOut("analysis", "give another --out", "--fresh to measure anew there")
_RESULTS = ("analysis.json", "report.html", "chunks/[0-9]*.json")
_SPECTRA = ("spectra-*.json", "blocks-*", "states")  # their names say what they are of


class Store(Work):
    """The folder of one analysis.

    A chunk is begun, and then saved. If it was begun and neither saved nor given up, its run was ended from outside, as
    by a system that has run out of memory, and :meth:`times_cut_off` says so to a later run.

    Args:
        folder: It is created if need be.
        key: Plain data that says what is analysed, and how.
        length: Tokens of a chunk, as long as memory suffices.
        fresh: Remove what an analysis left there, and nothing else, and begin anew.

    Raises:
        ValueError: The folder holds another analysis, or files of an unknown one.
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
        """Tokens of the chunks that are still to be measured."""
        return int(self.notes["length"])

    @property
    def shrunk(self) -> list[dict[str, int]]:
        """Each time that memory ran out: at which chunk, and from how many tokens to how many."""
        return list(self.notes["shrunk"])

    def shrink(self, chunk: int, length: int) -> None:
        """Measure ``chunk`` and all later ones at a smaller length."""
        step = {"chunk": chunk, "from": self.length, "to": length}
        self.note(length=length, shrunk=[*self.shrunk, step], begun=None)

    def begin_chunk(self, chunk: int) -> None:
        """Note on disk that ``chunk`` is being measured at the present length."""
        self.begin(chunk=chunk, length=self.length)

    def times_cut_off(self, chunk: int) -> int:
        """How many runs were ended from outside while they measured ``chunk`` at the present length."""
        return self.cut_off(chunk=chunk, length=self.length)

    def load(self, chunk: int) -> dict[str, Any] | None:
        """The record of a chunk; None where it is not measured yet."""
        return self.read(_name(chunk))

    def save(self, chunk: int, record: dict[str, Any]) -> None:
        """Keep the record of the chunk that was begun."""
        self.finish(_name(chunk), record)


def _name(chunk: int) -> str:
    return f"chunks/{chunk:05d}.json"
