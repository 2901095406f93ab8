"""Writing so that a reader never meets half a file, not after a power cut either."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_folder", "flush", "replace_text", "replacing"]


def check_folder(folder: Path) -> None:
    """Make sure that files can be written to ``folder``, creating it if need be.

    Raises OSError, which names the folder, the reason and the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "there is a file of that name" if folder.is_file() else error.strerror or str(error)
        raise OSError(f"can't write to the folder {str(folder)!r}: {reason}; choose another") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written by whatever means; it takes ``path``'s name when the block ends.

    In one move, and on the disk before that: whoever opens ``path`` finds the old file or the new one. Should the
    block raise, the old one stays as it was. OSError where the folder can't be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; results are meant to be read
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the new name, too, must survive


def replace_text(path: Path, text: str) -> None:
    """Write ``path`` as :func:`replacing` does, in UTF-8. OSError; the old file is then as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
