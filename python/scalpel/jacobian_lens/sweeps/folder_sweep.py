"""The matrices of a Jacobian lens for many prompts, of a model too large for memory, read layer by layer from a folder.

Reading a large model takes longer than a prompt's forward pass, so prompts share the readings: a group of them goes
forward together, and as many of their cotangents go back together as ``memory`` holds. What doesn't fit goes back in
another pass, for which the layers are read again; :mod:`scalpel.jacobians.streamed_sweep` says why. The matrices have
the bits of those that :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices` gives of the same model in memory,
whatever ``memory`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...jacobians.precision import plain_tensors
from ...jacobians.rows.primal import Text
from ...jacobians.stream import inputs_for
from ...jacobians.streamed_sweep import Share, StreamedSweep
from ...models.decoders.decoder import Decoder
from ...models.decoders.folder import decoder_in
from .cotangents import check_options, ones_at, signs_of
from .estimators import check_activation
from .positions import text_alone, valid_tokens

__all__ = ["layers_in_folder", "lens_matrices_of_folder", "lens_rows_of_folder"]

Rows = Callable[[int, int, int, Tensor], None]

MEMORY = 1 << 31


def layers_in_folder(folder: str | Path) -> int:
    """Count the layers of the model in a folder.

    Raises:
        CheckpointError: (a ValueError) For a folder that can't be read or has no rules.
    """
    return decoder_in(folder).config.layers


def lens_matrices_of_folder(
    folder: str | Path,
    prompts: Iterable[Any],
    *,
    layers: Iterable[int],
    target: int | None = None,
    skip_first: int = 16,
    targets: str = "after",
    groups: int | None = 1,
    seed: int = 0,
    precision: str | None = None,
    estimator: str = "jacobian",
    memory: int = MEMORY,
) -> Iterator[dict[int, Tensor]]:
    """Compute the matrices of each prompt, in order, one layer of the model in memory at a time.

    Args:
        folder: As :func:`scalpel.jacobians.stream.stream_layers` takes it.
        prompts: Each as :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices` takes it; all on one device, where the
            layers compute. They are taken from the iterable group by group.
        layers: Numbers of layers, from 0, whose outputs are the sources.
        target: The layer whose output is the target, before the final norm; by default the last one.
        skip_first: As :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices` takes it, like the options that follow.
        targets: As there.
        groups: As there.
        seed: As there.
        precision: As there; a bfloat16 folder needs none.
        estimator: As there.
        memory: About how many bytes all values may take that are held from one layer to the next: cotangents, residual
            streams and matrices. Beside them two layers are in memory, and at least one prompt's matrices. 2 GiB by
            default.

    Returns:
        An iterator over {layer: (width, width)}.

    Raises:
        CheckpointError: (a ValueError) For a folder that can't be read or has no rules.
        ValueError: As for :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices`.
    """
    job = _Job.of(folder, layers, target, (skip_first, targets, groups, seed, precision, estimator), memory)
    of_one = len(job.layers) * job.decoder.config.width**2 * 4
    found: dict[int, dict[int, Tensor]] = {}

    def see(prompt: int, layer: int, first: int, rows: Tensor) -> None:
        wide = rows.shape[1]
        matrices = found.setdefault(prompt, {})
        if layer not in matrices:
            matrices[layer] = torch.zeros(wide, wide, dtype=rows.dtype, device=rows.device)
        matrices[layer][first : first + len(rows)] += rows

    for finished in job.run(prompts, see, max(1, memory // 4 // max(1, of_one)), None):
        for prompt in finished:
            matrices = found.pop(prompt)
            yield {layer: matrices[layer] for layer in job.layers}


def lens_rows_of_folder(
    folder: str | Path,
    prompts: Iterable[Any],
    see: Rows,
    *,
    layers: Iterable[int],
    target: int | None = None,
    skip_first: int = 16,
    targets: str = "after",
    groups: int | None = 1,
    seed: int = 0,
    precision: str | None = None,
    estimator: str = "jacobian",
    memory: int = MEMORY,
    dimensions: slice | None = None,
) -> Iterator[list[int]]:
    """Compute the matrices as :func:`lens_matrices_of_folder` does, and keep none: their rows are given to ``see``.

    Args:
        folder: As there.
        prompts: As there.
        see: Called with a prompt's number, a layer, the number of the first row, and some rows of the prompt's matrix,
            (rows, width), which hold until it returns. With several ``groups`` the same rows come several times, and
            their sum is what the matrix has.
        layers: As there, like the options that follow.
        target: As there.
        skip_first: As there.
        targets: As there.
        groups: As there.
        seed: As there.
        precision: As there.
        estimator: As there.
        memory: As there, without the matrices.
        dimensions: The target's dimensions whose rows are computed; all by default.

    Returns:
        An iterator over lists of the prompts that are complete, which computes as it goes.

    Raises:
        CheckpointError: (a ValueError) For a folder that can't be read or has no rules.
        ValueError: As for :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices`.
    """
    job = _Job.of(folder, layers, target, (skip_first, targets, groups, seed, precision, estimator), memory)
    return job.run(prompts, see, None, dimensions)


@dataclass
class _Prompt:
    """A prompt, read and checked."""

    number: int
    batch: Any
    text: Text
    tokens: slice


@dataclass
class _Job:
    """What is computed of every prompt."""

    decoder: Decoder
    layers: list[int]
    target: int
    skip_first: int
    targets: str
    groups: int | None
    seed: int
    precision: str | None
    relevance: bool
    memory: int

    @classmethod
    def of(cls, folder: str | Path, layers: Iterable[int], target: int | None, options: Any, memory: int) -> _Job:
        """Check the options and open the folder."""
        skip_first, targets, groups, seed, precision, estimator = options
        check_options(targets, precision, skip_first, groups, estimator)
        if memory < 1:
            raise ValueError(f"memory is {memory}; it is a number of bytes, and at least 1")
        decoder = decoder_in(folder)
        if estimator == "relevance":
            check_activation(decoder)
        chosen, last = _numbers(decoder, layers, target)
        return cls(
            decoder, chosen, last, skip_first, targets, groups, seed, precision, estimator == "relevance", memory
        )

    def run(
        self, prompts: Iterable[Any], see: Rows, at_once: int | None, dimensions: slice | None
    ) -> Iterator[list[int]]:
        """Give the rows of all prompts to ``see``; yields the numbers of prompts that are complete."""
        group: list[_Prompt] = []
        held = 0
        for number, given in enumerate(prompts):
            with plain_tensors():
                prompt = self._read(number, given)
            needs = prompt.text.ids.shape[1] * self.decoder.config.width * 4 * (self.target - self.layers[0])
            if group and held + needs > self.memory // 4:
                yield from self._of_group(group, see, at_once, dimensions)
                group, held = [], 0
            group.append(prompt)
            held += needs
        if group:
            yield from self._of_group(group, see, at_once, dimensions)

    def _read(self, number: int, given: Any) -> _Prompt:
        batch = text_alone(given)
        inputs = inputs_for(self.decoder, batch)
        if len(inputs.ids) != 1:
            raise ValueError(f"prompt {number} holds {len(inputs.ids)} prompts: give them one by one")
        device = inputs.ids.device
        weights: Any = self.decoder.weights
        if number == 0:
            weights.device = device
        elif torch.device(weights.device) != device:
            raise ValueError(f"prompt {number} is on {device}, and the first on {weights.device}: move them to one")
        return _Prompt(number, batch, Text.of(inputs), valid_tokens(inputs.ids.shape[1], self.skip_first))

    def _of_group(
        self, group: list[_Prompt], see: Rows, at_once: int | None, dimensions: slice | None
    ) -> Iterator[list[int]]:
        wide = self.decoder.config.width
        first, stop, _ = (dimensions or slice(None)).indices(wide)
        texts, tokens = [prompt.text for prompt in group], [prompt.tokens for prompt in group]
        narrow = self.precision == "bfloat16"
        sweep = StreamedSweep(self.decoder, texts, tokens, self.layers[0], self.target, self.relevance, narrow)
        passes: list[list[Share]] = [[]]
        done: list[list[int]] = [[]]  # the prompts that are complete after each pass
        room, present = self.memory // 2, 0
        for place, prompt in enumerate(group):
            count = prompt.tokens.stop - prompt.tokens.start
            signs = signs_of(prompt.batch, count, self.targets, self.groups, self.seed, sweep.dtype, sweep.device)
            of_one, piece = count * wide * sweep.dtype.itemsize, sweep.sizes(place).piece
            present += 1
            if at_once is not None and present > at_once and passes[-1]:
                passes.append([])
                done.append([])
                room, present = self.memory // 2, 1
            for factors in signs:
                start = first
                while start < stop:
                    size = room // of_one // piece * piece
                    if size < 1 and passes[-1]:
                        passes.append([])
                        done.append([])
                        room, present = self.memory // 2, 1
                        continue
                    part = slice(start, min(stop, start + max(size, piece)))
                    passes[-1].append(self._share(place, prompt.number, part, factors, see))
                    room -= (part.stop - start) * of_one
                    start = part.stop
            done[-1].append(prompt.number)
        for number in sweep.run(passes):
            yield done[number]

    def _share(self, place: int, number: int, part: slice, factors: Tensor, see: Rows) -> Share:
        wide, chosen = self.decoder.config.width, set(self.layers)

        def see_rows(layer: int, pulled: Tensor, of: int) -> None:
            if layer in chosen:
                see(number, layer, part.start + of, (factors @ pulled[:, 0]).div_(len(factors)))

        return Share(place, lambda: ones_at(part, factors, wide), see_rows)


def _numbers(decoder: Decoder, layers: Iterable[int], target: int | None) -> tuple[list[int], int]:
    """The sources in order and the target, checked."""
    chosen, count = list(dict.fromkeys(layers)), decoder.config.layers
    if not chosen:
        raise ValueError("layers is empty: give the number of at least one layer")
    last = count - 1 if target is None else target
    for layer in (last, *chosen):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"{layer!r} stands among layers and target; in a folder these are all ints, from 0")
        if not 0 <= layer < count:
            raise ValueError(f"there is no layer {layer}; the folder's model has layers 0 to {count - 1}")
    late = next((layer for layer in chosen if layer > last), None)
    if late is not None:
        raise ValueError(f"layer {late} comes after the target, layer {last}, and doesn't move it: choose another")
    return sorted(chosen), last
