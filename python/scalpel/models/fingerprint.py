"""One number for all weights of a model, and one for the model."""

import hashlib
import json

import torch

from .circuitgpt.core import CircuitCore

__all__ = ["fingerprint", "identity"]


def fingerprint(model: CircuitCore) -> str:
    """SHA-256 over every tensor's name and bytes: equal fingerprints are equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: CircuitCore) -> str:
    """SHA-256 over the weights and the configuration: equal identities compute the same."""
    config = json.dumps(model.config.to_public_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{fingerprint(model)} {config}".encode()).hexdigest()
