"""The version of the source tree that a model was trained by."""

import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str | None:
    """Return the commit of the source tree that tracks this file, with "+dirty" if the package differs from it.

    Returns None for an installed package, even if it lies inside somebody else's repository.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]))
    return f"{git('rev-parse', 'HEAD')}{'+dirty' if changed else ''}"
