"""What a lens is of: the facts that stand beside its matrices, and decide whether two lenses may be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._info import __version__
from ..hooks.standing import as_analysed
from ..models.decoders.folder import FolderWeights, decoder_in
from ..models.decoders.marks import sampled_mark
from ..models.marks import model_mark
from ..models.weight_files import read_json
from .fits.subject import Subject

__all__ = ["SAME", "about_of", "key_of"]

# lenses that differ in one of these are of different things, and their mean would be of neither
SAME = ("model_sha256", "target", "targets", "estimator", "skip_first", "max_tokens", "dtype", "precision")


def about_of(subject: Subject, max_tokens: int) -> dict[str, Any]:
    """The facts about the lens of a model, as plain data."""
    return {
        **(_of_model(subject.model) if subject.folder is None else _of_folder(subject.folder)),
        "target": subject.target,
        **subject.options,
        "max_tokens": max_tokens,
        "positions": "counted from the first real token; the last one is left out",
        "scalpel": __version__,
        "torch": torch.__version__,
    }


def key_of(about: dict[str, Any]) -> dict[str, Any]:
    """The facts without which a folder's sums would be of something else."""
    return {name: about[name] for name in (*SAME, "scalpel", "torch")}


def _of_model(model: Any) -> dict[str, Any]:
    analysed = as_analysed(model)
    config = getattr(analysed, "config", None)
    name = str(getattr(config, "_name_or_path", "") or getattr(analysed, "card", {}).get("name", "") or "")
    dtype = next((p.dtype for p in analysed.parameters() if p.dtype.is_floating_point), torch.float32)
    return {
        "model": type(analysed).__name__,
        "model_name": Path(name).name if Path(name).is_absolute() else name,  # where it lay is nobody's business
        "model_revision": getattr(config, "_commit_hash", None),
        "model_sha256": model_mark(analysed),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _of_folder(folder: Path) -> dict[str, Any]:
    weights = decoder_in(folder).weights
    assert isinstance(weights, FolderWeights)
    return {
        "model": read_json(folder / "config.json")["architectures"][0],
        "model_name": folder.resolve().name,
        "model_revision": None,
        "model_sha256": f"sampled {sampled_mark(weights, folder)}",
        "dtype": ", ".join(sorted({str(place.dtype).removeprefix("torch.") for place in weights.places.values()})),
    }
