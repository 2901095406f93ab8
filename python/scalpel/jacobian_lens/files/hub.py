"""Finding the file of a lens on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from .file import BESIDE

__all__ = ["fetched"]

_PATTERN = "*_jacobian_lens*.pt"


def fetched(repo: str, filename: str | None, revision: str | None, **options: Any) -> tuple[Path, Path | None, str]:
    """Download a lens from the hub, or take it from the cache.

    Args:
        repo: The hub id.
        filename: The file in it; by default the only one of the published form.
        revision: A branch, tag or commit.
        **options: Those of ``huggingface_hub.hf_hub_download``.

    Returns:
        The file, what stands beside it or None, and the name of the file in the repository.

    Raises:
        ValueError: No file was named, and there is none or more than one.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if filename is None:
        access = {name: options[name] for name in ("token", "repo_type") if name in options}
        names = huggingface_hub.list_repo_files(repo, revision=revision, **access)
        found = fnmatch.filter(names, _PATTERN)
        if len(found) != 1:
            listed = ", ".join(found[:40]) + (", and others" if len(found) > 40 else "")
            raise ValueError(
                f"{repo} has {len(found)} files {_PATTERN}; give filename="
                + (f", one of {listed}" if found else ", a path in the repository")
            )
        (filename,) = found
    path = Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision, **options))
    try:
        beside = Path(huggingface_hub.hf_hub_download(repo, filename + BESIDE, revision=revision, **options))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return path, None, filename
    return path, beside, filename
