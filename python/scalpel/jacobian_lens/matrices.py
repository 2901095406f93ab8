"""Matrices by layer that are computed when they are asked for, and what functions need to know of a lens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .attached.model import AttachedModel

__all__ = ["Layer", "Lens", "Made", "check_width", "chosen_layers", "matrix_of", "target_layer", "widened"]

Layer = int | str  # the number of a block, or the path of a module


class Lens(Protocol):
    """What reading, steering and evaluating need of a :class:`scalpel.JacobianLens`."""

    @property
    def J(self) -> Mapping[Any, Tensor]:
        """The matrices, float32."""

    @property
    def error(self) -> Mapping[Any, float]:
        """The relative error of each, NaN where unknown."""

    @property
    def source_layers(self) -> list[Any]:
        """The layers, in order."""

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """How the lens was made."""

    @property
    def attached(self) -> AttachedModel:
        """The model; an error that says what to do where there is none."""


class Made(Mapping[Any, Tensor]):
    """Matrices by layer, each made anew when it is asked for, so that they don't all have to be in memory.

    A pickle or a deep copy holds the matrices themselves.

    Args:
        layers: The layers, in order.
        make: Gives the matrix of one of them.
    """

    def __init__(self, layers: Iterable[Any], make: Callable[[Any], Tensor]) -> None:
        self._layers = tuple(layers)
        self._make = make

    def __getitem__(self, layer: Any) -> Tensor:
        if layer not in self._layers:
            raise KeyError(layer)
        return self._make(layer)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def widened(stored: Mapping[Any, Tensor]) -> Mapping[Any, Tensor]:
    """Matrices in the dtype of a file, given as float32; float32 ones as they are."""
    if all(matrix.dtype == torch.float32 for matrix in stored.values()):
        return dict(stored)
    return Made(stored, lambda layer: stored[layer].float())


def chosen_layers(lens: Lens, layers: Any, *, end: bool = False) -> list[Any]:
    """Read which layers a user means.

    Args:
        lens: The lens.
        layers: A layer, several, a range or a slice of numbers, or None for all that the lens has.
        end: Whether the target, whose matrix is the identity, may be named too.

    Raises:
        ValueError: For a layer that the lens lacks.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return list(lens.source_layers)
    if isinstance(layers, slice):
        chosen = lens.source_layers[layers]
    elif isinstance(layers, int | str | np.integer):
        chosen = [layers]
    else:
        chosen = list(dict.fromkeys(layers))
    chosen = [int(layer) if isinstance(layer, np.integer) else layer for layer in chosen]
    if not chosen:
        raise ValueError(f"layers={layers!r} names no layer; the lens has {_listed(lens.source_layers)}")
    for layer in chosen:
        if layer not in lens.source_layers and not (end and layer == target_layer(lens)):
            also = f", and {target_layer(lens)!r}, its target" if end and target_layer(lens) is not None else ""
            raise ValueError(f"the lens has no layer {layer!r}; it has {_listed(lens.source_layers)}{also}")
    return chosen


def target_layer(lens: Lens) -> Any:
    """The layer that the matrices lead to; None where neither the lens nor its model says which it is."""
    target = lens.about.get("target", lens.about.get("identity_slot"))
    if target is not None or not all(isinstance(layer, int) for layer in lens.source_layers):
        return target
    layers = lens.attached.layers
    return None if layers is None else layers - 1


def matrix_of(lens: Lens, layer: Any) -> Tensor | None:
    """The matrix of a layer; None for the target, whose matrix is the identity."""
    return lens.J[layer] if layer in lens.source_layers else None


def check_width(lens: Lens, states: Mapping[Any, Tensor]) -> None:
    """Check that what layers left has the lens's width.

    Raises:
        ValueError: It hasn't.
    """
    for layer, state in states.items():
        if state.shape[-1] != lens.d_model:
            raise ValueError(
                f"layer {layer!r} leaves states of width {state.shape[-1]}, and the lens is one of width "
                f"{lens.d_model}: attach the model that it was fitted on"
            )


def _listed(layers: list[Any]) -> str:
    whole = all(isinstance(layer, int) for layer in layers) and layers == list(range(layers[0], layers[-1] + 1))
    return f"the layers {layers[0]} to {layers[-1]}" if whole and len(layers) > 2 else ", ".join(map(repr, layers))
