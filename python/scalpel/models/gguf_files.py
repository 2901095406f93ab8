"""Finding GGUF files, and saying why one can't be used where another kind of weights is needed."""

from __future__ import annotations

from pathlib import Path

from .weight_files import WEIGHT_FILES, CheckpointError, check_link, some

__all__ = ["HOW_TO_JOIN", "MAGIC", "gguf_in", "no_circuitgpt", "no_stream"]

MAGIC = b"GGUF"  # the first bytes of every such file
HOW_TO_JOIN = "Parts of one model are joined with llama.cpp's llama-gguf-split --merge"
_HOW_TO_READ = "from scalpel.models.gguf import plain_model"


def gguf_in(path: str | Path) -> Path | None:
    """Find the GGUF file that a path stands for.

    Args:
        path: A file, or a folder.

    Returns:
        The file itself, or the only GGUF file of a folder without other weights; None if the path stands for something
        else.

    Raises:
        CheckpointError: If a folder holds several GGUF files, or there is no file behind a name or link that ends in
            .gguf.

    Example:
        >>> from scalpel.models.gguf import gguf_in
        >>> gguf_in(".").name  # the current folder holds model.gguf
        'model.gguf'
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in WEIGHT_FILES):
            return None
        named = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
        found = [each for each in named if each.is_file() or not each.exists()]  # a link that leads nowhere counts
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds {len(found)} GGUF files, {some(file.name for file in found)}: give one of them. "
                f"{HOW_TO_JOIN}"
            )
        if not found:
            return None
        check_link(found[0])
        return found[0]
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _begins_as_gguf(path) else None
    if path.suffix.lower() == ".gguf":
        check_link(path)
        raise CheckpointError(f"there is no file {path}")
    return None


def no_stream(file: Path) -> CheckpointError:
    """Explain why a GGUF file cannot be streamed, and what to do instead."""
    return CheckpointError(
        f"{file} is a GGUF, which can't be streamed: transformers dequantises it, and reads it whole. Analyse it in "
        f"memory (scalpel analyze without --stream), or save it as safetensors first: {_HOW_TO_READ}, then "
        "plain_model(FILE).save_pretrained(FOLDER), and give FOLDER"
    )


def no_circuitgpt(file: Path) -> CheckpointError:
    """Explain why a GGUF file cannot be read as a CircuitGPT, and what to do instead."""
    return CheckpointError(
        f"{file} is a GGUF, which holds a dense transformer and no CircuitGPT: give it to scalpel analyze, or read it "
        f"({_HOW_TO_READ}) and give plain_model(FILE) to scalpel.jacobian, scalpel.collect or scalpel.lyapunov"
    )


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False
