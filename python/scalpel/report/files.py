"""Writing so that a reader never meets half a file."""

import os
import tempfile
from pathlib import Path

__all__ = ["check_folder", "replace_text"]


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


def replace_text(path: Path, text: str) -> None:
    """Write ``path`` in one move: whoever opens it sees the old text or the new one, never a part.

    Raises OSError; the old file is then as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; a report is meant to be read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
