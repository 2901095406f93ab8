"""One number for all weights of a model."""

import hashlib

import torch

from .circuitgpt import CircuitGPT

__all__ = ["fingerprint"]


def fingerprint(model: CircuitGPT) -> str:
    """SHA-256 over every tensor's name and bytes: equal fingerprints are equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()
