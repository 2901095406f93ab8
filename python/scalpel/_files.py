"""Writing files so that no reader ever sees half a file, even after a power failure."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_folder", "flush", "replace_text", "replacing"]


def check_folder(folder: Path) -> None:
    """Make sure that files can be written to a folder, and create it if necessary.

    Raises:
        OSError: If they cannot; the message names the folder and the reason, and says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "a file has that name" if folder.is_file() else error.strerror or str(error)
        raise OSError(f"cannot write to the folder {str(folder)!r}: {reason}; choose another folder") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its name when the block ends.

    The file is flushed to the disk and then renamed in one step, so whoever opens ``path`` sees either the old file or
    the new one. If the block raises, the old file stays as it was.

    Raises:
        OSError: If the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files, but results are meant to be read by others
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the new name must survive a power failure, too


def replace_text(path: Path, text: str) -> None:
    """Write text to ``path`` in UTF-8, in one step as `replacing` does.

    Raises:
        OSError: If the folder cannot be written to; the old file then stays as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
