"""Finding GGUF files, and the errors raised where another kind of weights is needed."""

from __future__ import annotations

from pathlib import Path

from .weight_files import WEIGHT_FILES, CheckpointError, check_link, some

__all__ = ["HOW_TO_JOIN", "MAGIC", "gguf_in", "no_circuitgpt", "no_stream"]

MAGIC = b"GGUF"  # the first bytes of every such file
HOW_TO_JOIN = "Parts of one model are joined with llama.cpp's llama-gguf-split --merge"
_HOW_TO_READ = "from scalpel.models.gguf import plain_model"


def gguf_in(path: str | Path) -> Path | None:
    """Find the GGUF file at ``path``.

    Args:
        path: A file, or a folder with one GGUF file and no other weights.

    Returns:
        The GGUF file, or None if there is something else at ``path``, or nothing.

    Raises:
        CheckpointError: If the folder holds several GGUF files, or ``path`` ends in .gguf and there is no such file.
            A broken link counts as a file that doesn't exist.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from scalpel.models.gguf import gguf_in
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.gguf")
        ...     _ = file.write_bytes(b"GGUF")
        ...     gguf_in(folder) == file
        True
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in WEIGHT_FILES):
            return None
        entries = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".gguf")
        files = [entry for entry in entries if entry.is_file() or not entry.exists()]  # broken links are refused below
        if len(files) > 1:
            raise CheckpointError(
                f"{path} holds {len(files)} GGUF files, {some(file.name for file in files)}: give one of them. "
                f"{HOW_TO_JOIN}"
            )
        if not files:
            return None
        check_link(files[0])
        return files[0]
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _begins_as_gguf(path) else None
    if path.suffix.lower() == ".gguf":
        check_link(path)
        raise CheckpointError(f"there is no file {path}")
    return None


def no_stream(file: Path) -> CheckpointError:
    """Make the error which says why a GGUF file can't be streamed, and what to do instead."""
    return CheckpointError(
        f"{file} is a GGUF file, which can't be streamed, because transformers reads it whole and dequantises it. "
        f"Analyse it in memory (scalpel analyze without --stream), or save it as safetensors first: {_HOW_TO_READ}, "
        "then plain_model(FILE).save_pretrained(FOLDER), and give FOLDER"
    )


def no_circuitgpt(file: Path) -> CheckpointError:
    """Make the error which says why a GGUF file can't be read as a CircuitGPT, and what to do instead."""
    return CheckpointError(
        f"{file} is a GGUF file, which holds a dense transformer and not a CircuitGPT: give it to scalpel analyze, or "
        f"read it ({_HOW_TO_READ}) and give plain_model(FILE) to scalpel.jacobian, scalpel.collect or scalpel.lyapunov"
    )


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False
