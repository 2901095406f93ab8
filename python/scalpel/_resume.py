"""Finished work that is kept in a folder, so that a call that was stopped goes on where it stopped.

Four rules hold wherever this library does that:

- A file in the folder says which work it holds. It is the *key*: plain data with everything that decides the results.
  A folder with another key is refused, and the message names the folder, what differs, and the way out.
- A piece of the work is complete or absent: it takes its name in one move, when all of it is on the disk.
- ``fresh`` begins anew. It removes what such work leaves behind, and nothing else.
- A piece may be noted as begun. A later run that finds the note still there knows that the run that wrote it was ended
  from outside.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._files import flush, replace_text, replacing

__all__ = ["Pieces", "WayOut", "Work", "another_work", "differences"]

_LONG = 40  # characters beyond which a text is not shown in a message
_BEGUN = "begun"


@dataclass(frozen=True)
class WayOut:
    """What a message calls the work, and what it advises, in the words of the command or function that was called.

    Attributes:
        of: What the folder holds, such as "analysis".
        elsewhere: How to choose another folder, such as "give another --out".
        anew: How to begin anew, such as "--fresh to measure anew there".
    """

    of: str
    elsewhere: str
    anew: str

    def __str__(self) -> str:
        return f"{self.elsewhere}, or {self.anew}"


class Pieces:
    """Finished pieces of work in a folder. Each is complete or absent, also after a power cut.

    A piece is named by its path relative to the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """Where the piece ``name`` is, or would be."""
        return self.folder / name

    def read(self, name: str) -> dict[str, Any] | None:
        """The record that :meth:`write` wrote; None where there is none. ValueError if it is damaged."""
        path = self.path(name)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no record")
        return record

    def write(self, name: str, record: dict[str, Any], *, allow_nan: bool = False) -> None:
        """Write a record as JSON. ValueError for numbers that are not finite, unless ``allow_nan``."""
        text = json.dumps(record, allow_nan=allow_nan) + "\n"
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path, to be written by whatever means. It becomes the piece when the block ends without error."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        """The same for a piece that is a folder. The files in it must be on the disk when the block ends."""
        final = self.path(name)
        draft = final.parent / f".{final.name}.part"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(final, ignore_errors=True)  # an earlier one, which was found damaged
        os.rename(draft, final)
        flush(final.parent)


class Work(Pieces):
    """A folder that holds one work, and a file that says which.

    Args:
        folder: It is created if need be.
        file: Name of the file with the key.
        key: Plain data that decides the results.
        way_out: The words for messages.
        pieces: Patterns, relative to the folder, of what must not lie there without ``file``: nobody could say what
            it belongs to.
        leftovers: Patterns of everything that such work leaves there beside ``file``; as ``pieces`` if not given.
        fresh: Remove the leftovers, where ``file`` says that they belong to such work, and begin anew.
        own_names: Whether the leftovers' names are so particular that ``fresh`` may also remove them from a folder
            that has no ``file``.
        notes: Plain data that stands in ``file`` beside the key and changes while the work goes on.
        bare: The file holds nothing but the key, and so no notes.

    Raises:
        ValueError: The folder holds another work, or pieces of an unknown one.
        OSError: The folder can't be written.

    Example:
        >>> import tempfile
        >>> from scalpel._resume import WayOut, Work
        >>> way_out = WayOut("sum", "give another folder", "fresh=True to begin anew there")
        >>> folder = tempfile.TemporaryDirectory()
        >>> Work(folder.name, "sum.json", {"seed": 0}, way_out).write("1.json", {"total": 3})
        >>> Work(folder.name, "sum.json", {"seed": 0}, way_out).read("1.json")
        {'total': 3}
        >>> Work(folder.name, "sum.json", {"seed": 1}, way_out)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ... holds another sum (seed 0 there, 1 here): give another folder, or fresh=True to begin anew there
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        file: str,
        key: dict[str, Any],
        way_out: WayOut,
        *,
        pieces: Iterable[str] = (),
        leftovers: Iterable[str] | None = None,
        fresh: bool = False,
        own_names: bool = False,
        notes: dict[str, Any] | None = None,
        bare: bool = False,
    ) -> None:
        super().__init__(folder)
        self.key: dict[str, Any] = json.loads(json.dumps(key))
        self.notes: dict[str, Any] = dict(notes or {})
        self.way_out = way_out
        self._file, self._bare = self.folder / file, bare
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._before(fresh)
        known = self._file.is_file()
        unknown = [] if known else self._matching(pieces)
        if unknown and not (fresh and own_names):
            anew = way_out.anew if own_names else "remove it"
            raise ValueError(
                f"{self.folder} holds {unknown[0].relative_to(self.folder)}, but no {file} that says of what: "
                f"{way_out.elsewhere}, or {anew}"
            )
        if fresh and (known or own_names):  # without the file, others' files may have such names
            for path in self._matching(pieces if leftovers is None else leftovers):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if fresh or before is None:
            self._write()
            return
        stored = before if bare else before["key"]
        if stored != self.key:
            raise another_work(self.folder, stored, self.key, way_out)
        if not bare:
            self.notes = {name: value for name, value in before.items() if name != "key"}

    def _matching(self, patterns: Iterable[str]) -> list[Path]:
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def _before(self, fresh: bool) -> dict[str, Any] | None:
        """What the file with the key holds; None where there is none, or where ``fresh`` may replace a damaged one.

        ValueError for a file of another program, which is never replaced.
        """
        if not self._file.is_file():
            return None
        try:
            before = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError as error:
            if fresh:
                return None
            raise self._damaged(self._file, error) from error
        if not isinstance(before, dict) or not (self._bare or isinstance(before.get("key"), dict)):
            raise ValueError(
                f"{self._file} belongs to another program, not to this {self.way_out.of}: {self.way_out.elsewhere}"
            )
        return before

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a piece; None where it isn't finished. ValueError, with the way out, if it is damaged."""
        try:
            return super().read(name)
        except ValueError as error:
            raise self._damaged(self.path(name), error) from error

    def _damaged(self, path: Path, error: Exception) -> ValueError:
        return ValueError(f"{path} can't be read ({error}): {self.way_out}")

    # ---- notes -----------------------------------------------------------------------------------

    def note(self, **changes: Any) -> None:
        """Change notes, on the disk at once."""
        self.notes |= changes
        self._write()

    def stored_notes(self) -> dict[str, Any]:
        """The notes as they stand on the disk now, where another process may have changed them."""
        notes: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        return notes

    def begin(self, **piece: Any) -> None:
        """Note that work on ``piece``, described by plain data, begins."""
        self.note(**{_BEGUN: {**piece, "times": self.cut_off(**piece) + 1}})

    def end(self) -> None:
        """The piece that was begun ended with an error that this process saw, or by the user's wish."""
        self.note(**{_BEGUN: None})

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Write the piece that was begun. The note goes with the next change, since a finished piece isn't begun."""
        self.write(name, record)
        self.notes[_BEGUN] = None

    def cut_off(self, **piece: Any) -> int:
        """How many runs were ended from outside while they worked on ``piece``."""
        begun = self.notes.get(_BEGUN)
        return int(begun["times"]) if begun is not None and piece.items() <= begun.items() else 0

    def _write(self) -> None:
        content = self.key if self._bare else {"key": self.key, **self.notes}
        replace_text(self._file, json.dumps(content, indent=2) + "\n")


def another_work(where: Path, before: Any, now: dict[str, Any], way_out: WayOut) -> ValueError:
    """The error for a folder or file whose key, ``before``, is not the one that is wanted, ``now``."""
    return ValueError(f"{where} holds another {way_out.of} ({differences(before, now)}): {way_out}")


def differences(before: Any, now: dict[str, Any]) -> str:
    """Which entries of two keys differ, in words. Entries of nested dicts are named by dotted paths.

    Example:
        >>> from scalpel._resume import differences
        >>> differences({"seed": 0, "model": 50 * "a"}, {"seed": 1, "model": 50 * "b"})
        'seed 0 there, 1 here; another model'
    """
    if not isinstance(before, dict):
        return "of an unknown kind"
    return "; ".join(_differences(before, now, ""))


def _differences(before: dict[str, Any], now: dict[str, Any], path: str) -> Iterator[str]:
    for name in dict.fromkeys((*now, *before)):
        there, here = before.get(name), now.get(name)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{path}{name}.")
        elif len(repr(there)) > _LONG or len(repr(here)) > _LONG:
            yield f"another {path}{name}"
        else:
            yield f"{path}{name} {there!r} there, {here!r} here"
