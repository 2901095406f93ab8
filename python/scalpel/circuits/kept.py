"""Folders that keep finished parts, so that a call that was stopped continues from there."""

import json
from pathlib import Path
from typing import Any

from .._files import replace_text

__all__ = ["keyed_folder"]


def keyed_folder(folder: str | Path | None, file: str, key: dict[str, Any], what: str) -> Path | None:
    """Prepare a folder whose parts belong to ``key``, which is stored in ``file``; None for None.

    Raises:
        ValueError: If the folder holds parts that were made with another key; ``what`` describes them.
    """
    if folder is None:
        return None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(key, indent=2, sort_keys=True)
    stored = folder / file
    if stored.exists() and stored.read_text() != text:
        raise ValueError(f"{folder} holds {what}; use another folder, or remove this one to start again")
    replace_text(stored, text)
    return folder
