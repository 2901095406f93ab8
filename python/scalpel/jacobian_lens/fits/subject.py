"""What a lens is fitted to: a model, the layers that are its sources, and how their matrices are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...hooks.standing import as_analysed
from ..sweeps.cotangents import check_options
from ..sweeps.folder_sweep import layers_in_folder, lens_rows_of_folder
from ..sweeps.hooks import Layer, all_layers, ends_of, layers_of
from ..sweeps.sweep import lens_rows

__all__ = ["Subject"]


class Subject:
    """A model and the options that decide a prompt's matrices.

    Args:
        model: The model, or the path of a folder whose layers are read one at a time.
        layers: As for :func:`.fitting.fit`, and so are the others.

    Attributes:
        model: The model, or the folder.
        folder: The folder; None for a model in memory.
        layers: The source layers, in the model's order.
        target: The number or path of the target layer.
        options: The other options.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        layers: Iterable[Layer] | Layer,
        *,
        target: Layer | None,
        skip_first: int,
        targets: str,
        estimator: str,
        precision: str | None,
    ) -> None:
        check_options(targets, precision, skip_first, 1, estimator)
        if isinstance(layers, str) and layers != "all":
            raise ValueError(f"layers is {layers!r}; allowed: 'all', or a list of numbers or of paths of modules")
        given: Any = _plain(layers)
        given = [given] if isinstance(given, int) else given
        layers = given if isinstance(given, str) else [_plain(layer) for layer in given]
        target = None if target is None else _plain(target)
        self.options: dict[str, Any] = {
            "skip_first": skip_first,
            "targets": targets,
            "estimator": estimator,
            "precision": precision,
        }
        self.folder = Path(model).expanduser() if isinstance(model, str | Path) else None
        self.model: Any = model if self.folder is None else self.folder
        if self.folder is not None:
            self.target: Layer = _counted(-1 if target is None else target, layers_in_folder(self.folder))
            chosen = list(range(int(self.target))) if isinstance(layers, str) else list(layers)
            self.layers: tuple[Layer, ...] = tuple(sorted(dict.fromkeys(chosen), key=int))
            return
        known: Any = self.model
        by_path = target is None and not isinstance(layers, str) and any(isinstance(layer, str) for layer in layers)
        if target is None and not by_path:
            target = -1
        if isinstance(target, int) and target < 0:
            target = _counted(target, layers_of(known))
        chosen = list(all_layers(known, target)) if isinstance(layers, str) else list(layers)
        self.layers = tuple(ends_of(known, chosen, target)[0])
        assert target is not None  # else the line above has raised an error
        self.target = target

    def rows(
        self, prompts: Iterable[tuple[int, Any]], see: Callable[[int, Any, int, Tensor], None]
    ) -> Iterator[list[int]]:
        """Compute the prompts' matrices, and give their rows to ``see``, each once.

        Args:
            prompts: Pairs of a number and token ids (1, S). A model in memory takes each when the one before it is
                done; of a folder, prompts that are read ahead share the readings of layers.
            see: Called with a prompt's number, a layer, the number of the first row, and rows (rows, width).

        Yields:
            The numbers of prompts that are complete.
        """
        if self.folder is not None:
            yield from self._streamed(prompts, see)
            return
        place = next((weight.device for weight in as_analysed(self.model).parameters()), torch.device("cpu"))
        for number, prompt in prompts:

            def see_rows(layer: Any, first: int, rows: Tensor, number: int = number) -> None:
                see(number, layer, first, rows)

            given = prompt if place.type == "meta" else prompt.to(place)  # what accelerate offloads moves by itself
            lens_rows(self.model, given, see_rows, layers=self.layers, target=self.target, **self.options)
            yield [number]

    def _streamed(
        self, prompts: Iterable[tuple[int, Any]], see: Callable[[int, Any, int, Tensor], None]
    ) -> Iterator[list[int]]:
        assert self.folder is not None
        numbers: list[int] = []

        def given() -> Iterator[Any]:
            for number, prompt in prompts:
                numbers.append(number)
                yield prompt

        def see_rows(place: int, layer: Any, first: int, rows: Tensor) -> None:
            see(numbers[place], layer, first, rows)

        layers, target = [int(layer) for layer in self.layers], int(self.target)
        options: dict[str, Any] = {"layers": layers, "target": target, **self.options}
        for finished in lens_rows_of_folder(self.folder, given(), see_rows, **options):
            yield [numbers[place] for place in finished]


def _plain(number: Any) -> Any:
    """A number of numpy as an int; anything else as it is."""
    return int(number) if isinstance(number, np.integer) else number


def _counted(layer: Any, count: int) -> Any:
    """A layer's number from 0; a negative one counts from the last, as the published code allows for the target."""
    if not isinstance(layer, int) or layer >= 0:
        return layer
    if layer < -count:
        raise ValueError(f"target is {layer}; the model has {count} layers, so the least is {-count}")
    return count + layer
