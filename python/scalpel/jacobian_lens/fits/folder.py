"""The folder of a fit: which files it has, and the sums that it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..._resume import WayOut, Work
from .sums import FILES, Sums

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FILE", "PIECES", "alone_in", "stored_width", "sums_in"]

FILE = "lens.json"
_LOCK = ".lens.lock"
PIECES = FILES

_WAY_OUT = WayOut("lens", "give another folder", "fit it anew")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make sure that no other fit writes to a folder meanwhile; the system ends that with the process, however it ends.

    Raises:
        RuntimeError: Another fit does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another fit is adding to {folder} at this moment, and two would spoil its sums: wait for it, or give "
                "another folder"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield


def stored_width(work: Work) -> int | None:
    """The width of the matrices that a folder holds; None where it holds none yet."""
    width = work.notes.get("width")
    return None if width is None else int(width)


def sums_in(folder: str | Path) -> tuple[Sums, dict[str, Any]]:
    """Read the sums that a fit left in a folder, whether it ended or was stopped, and what they are of.

    The sums stay on the disk, mapped into memory. The folders of processes that shared the prompts are merged.

    Raises:
        ValueError: The folder holds no lens, or not yet a prompt, or several fits, or a file of it was cut short.
    """
    folder = Path(folder).expanduser()
    parts = sorted(path.parent for path in folder.glob(f"rank-*-of-*/{FILE}"))
    fits = sorted({f"rank-*-of-{part.name.rpartition('-')[2]}" for part in parts})
    fits += [FILE] if parts and (folder / FILE).is_file() else []
    if len(fits) > 1:
        raise ValueError(
            f"{folder} holds several fits, {' and '.join(fits)}, by other numbers of processes, and their prompts may "
            "be the same: move all but one of them to another folder"
        )
    found = [_read(part) for part in parts or [folder]]
    known = [sums for sums, _ in found if sums is not None]
    if not known:
        raise ValueError(f"{folder} holds a fit that has not finished a prompt yet: let it go on")
    about = next((about for sums, about in found if sums is not None and "corpus_sha256" in about), found[0][1])
    return known[0].merged(known[1:], shared=True) if len(known) > 1 else known[0], about


def _read(folder: Path) -> tuple[Sums | None, dict[str, Any]]:
    """The sums in a folder, None where there is no prompt in them, and what they are of."""
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds no {FILE}, and so no lens: give the folder= of a fit")
    try:
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        key = dict(stored["key"])
        work = Work(folder, FILE, key, _WAY_OUT)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} can't be read ({error}): {_WAY_OUT}") from error
    width, about = stored_width(work), work.notes.get("about")
    if width is None or not work.notes.get("n"):
        return None, key
    sums = Sums(key["layers"], width, work, int(work.notes.get("probes", 0)), reading=True)
    return sums, dict(about) if about else {name: key[name] for name in key if name not in ("layers", "share")}
