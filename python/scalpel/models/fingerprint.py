"""Hashes that tell whether two models have equal weights, or are equal altogether."""

import hashlib
import json

import torch

from .circuitgpt.core import CircuitCore

__all__ = ["fingerprint", "identity"]


def fingerprint(model: CircuitCore) -> str:
    """Return the SHA-256 of every tensor's name and bytes; models with equal fingerprints have equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: CircuitCore) -> str:
    """Return the SHA-256 of the weights and the configuration; models with equal identities compute the same."""
    config = json.dumps(model.config.to_public_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{fingerprint(model)} {config}".encode()).hexdigest()
