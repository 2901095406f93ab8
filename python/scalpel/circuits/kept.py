"""Folders that finished parts are kept in, so that a call that was stopped goes on."""

import json
from pathlib import Path
from typing import Any

from .._files import replace_text

__all__ = ["keyed_folder"]


def keyed_folder(folder: str | Path | None, file: str, key: dict[str, Any], what: str) -> Path | None:
    """The folder, made if need be, with ``key`` in ``file``; None for None.

    ValueError where it holds parts that were made with another key; ``what`` says in words what differs then.
    """
    if folder is None:
        return None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(key, indent=2, sort_keys=True)
    stored = folder / file
    if stored.exists() and stored.read_text() != text:
        raise ValueError(f"{folder} holds {what}; give another folder, or remove that one to begin anew")
    replace_text(stored, text)
    return folder
