"""A digest of a model in a folder that takes little reading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..weight_files import read_json
from .folder import FolderWeights

__all__ = ["sampled_mark"]

_SAMPLES, _SAMPLE = 4, 1 << 13  # pieces of each tensor that are hashed, and bytes of a piece


def sampled_mark(weights: FolderWeights, folder: Path) -> str:
    """Return the SHA-256 of the config, and of each tensor's name, shape, dtype and evenly spaced pieces.

    Hashing all weights would require reading a model that is too large for memory before anything is measured.
    """
    digest = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    for name, place in sorted(weights.places.items()):
        digest.update(f"{name} {place.shape} {place.dtype}".encode())
        with place.path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(place.begin + max(0, place.bytes - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(file.read(min(_SAMPLE, place.bytes)))
    return digest.hexdigest()
