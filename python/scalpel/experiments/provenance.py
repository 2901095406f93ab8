"""What a figure was computed from."""

import hashlib
from typing import Any

from ..models.circuitgpt import CircuitGPT


def model_provenance(model: CircuitGPT, **options: Any) -> dict[str, Any]:
    """Name, fingerprint of the weights, dtype, training seed and commit of a model, and the run's options."""
    return {
        "model": model.card.get("name", "unnamed"),
        "weights_sha256": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "training_seed": model.card.get("recipe", {}).get("seed"),
        "training_commit": model.card.get("commit"),
        "options": options,
    }


def at_least(least: int, **options: int) -> None:
    """ValueError for an option below ``least``, naming it."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"option {name!r} is {value}; it must be {least} or more")


def fingerprint(model: CircuitGPT) -> str:
    """SHA-256 over every tensor's name and bytes: equal fingerprints are equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(dtype=_bytes()).numpy().tobytes())
    return digest.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8
