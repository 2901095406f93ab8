"""What a lens is fitted to: a model, the layers that are its sources, and how their matrices are computed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .hooks import Layer, ends_of, layers_of
from .sweep import lens_matrices

__all__ = ["Subject"]


class Subject:
    """A model and the options that decide a prompt's matrices.

    Args:
        model: The model, or the path of a folder whose layers are read one at a time.
        layers: As for :func:`.fitting.fit`, and so are the others.

    Attributes:
        layers: The source layers, in the model's order.
        target: The number or path of the target layer.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        layers: Iterable[Layer] | str,
        *,
        target: Layer | None,
        skip_first: int,
        targets: str,
        estimator: str,
        precision: str | None,
    ) -> None:
        if isinstance(layers, str) and layers != "all":
            raise ValueError(f"layers is {layers!r}; allowed: 'all', or a list of numbers or of paths of modules")
        self.model = model
        count = layers_of(model)
        self.target = count - 1 if target is None and count is not None else target
        chosen = list(range(self.target)) if isinstance(layers, str) else list(layers)
        self.layers: tuple[Layer, ...] = tuple(ends_of(model, chosen, self.target)[0])
        self.skip_first, self.targets, self.estimator, self.precision = skip_first, targets, estimator, precision

    def matrices(self, prompt: Any) -> dict[Any, Tensor]:
        """The matrices of a prompt, by layer, each (width, width)."""
        return lens_matrices(
            self.model,
            prompt,
            layers=self.layers,
            target=self.target,
            skip_first=self.skip_first,
            targets=self.targets,
            precision=self.precision,
        )
