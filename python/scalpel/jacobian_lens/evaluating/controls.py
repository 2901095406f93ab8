"""Lenses that should read less than a real one: what a readout owes to chance, to a layer's scale, or to its depth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..matrices import Made

__all__ = ["deranged", "derangement", "permuted", "random"]


def permuted(J: Mapping[Any, Tensor], seed: int) -> Mapping[Any, Tensor]:
    """The matrices with their rows in a random order, another one for each layer."""

    def make(layer: Any) -> Tensor:
        matrix = J[layer]
        return matrix[torch.randperm(len(matrix), generator=_generator("permuted", layer, seed), device="cpu")]

    return Made(J, make)


def random(J: Mapping[Any, Tensor], seed: int) -> Mapping[Any, Tensor]:
    """Independent Gaussian entries, with each layer's Frobenius norm."""

    def make(layer: Any) -> Tensor:
        matrix = J[layer]
        drawn = torch.randn(
            matrix.shape, generator=_generator("random", layer, seed), device="cpu", dtype=torch.float32
        )
        return drawn * (matrix.double().norm() / drawn.double().norm()).float().cpu()

    return Made(J, make)


def deranged(J: Mapping[Any, Tensor], seed: int) -> Mapping[Any, Tensor]:
    """The matrices exchanged among the layers, so that each layer has that of another one."""
    layers = list(J)
    order = derangement(len(layers), seed)
    taken = {layer: layers[place] for layer, place in zip(layers, order, strict=True)}
    return Made(J, lambda layer: J[taken[layer]])


def derangement(count: int, seed: int) -> list[int]:
    """Draw a permutation of 0 … count - 1 that leaves none in its place, each with the same probability.

    Raises:
        ValueError: There are fewer than two.
    """
    if count < 2:
        raise ValueError(f"the lens has {count} layer, and a derangement exchanges the matrices of two or more")
    generator = _generator("deranged", count, seed)
    while True:  # a share of about 1/e of all permutations is one
        order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
        if all(place != number for number, place in enumerate(order)):
            return order


def _generator(kind: str, layer: Any, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{kind} {layer!r} {seed}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
