"""The sums that a Jacobian lens is made of: of the matrices of all prompts, and of their squared norms.

A lens is a mean over prompts, so its state is a sum, in float64, and the number of prompts. Beside it there is one
number for each prompt and layer, the squared Frobenius norm of the prompt's matrix, from which the error of the mean
follows: with n independent prompts
    error² = (mean ‖J_p‖² - ‖J̄‖²) / ((n - 1) ‖J̄‖²),
which estimates E‖J̄ - E J̄‖² / ‖J̄‖².

Each entry is rounded to a multiple of 2⁻³⁶ before it is added. A float64 holds such numbers up to 2¹⁷ exactly, so sums
within that range don't depend on the order of prompts, nor on how they were shared among runs that were merged.

In a folder the sums lie in two files that are mapped into memory, and used in turn: a prompt is added to what one of
them holds, the result is written to the other, and only when it is on the disk does the folder say that the other one
counts. A run that is killed at any moment leaves one of them whole. A run that goes on from a folder writes to files
of its own from the start: lenses that were made of the sums before keep theirs, which no longer have a name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._files import flush
from ..._resume import Work

__all__ = ["FILES", "Adding", "Means", "Sums", "relative_errors"]

_GRID = 2.0**36  # one over the unit of the sums
_FILES = ("sums-a.f64", "sums-b.f64")
_NORMS = "norms.f64"
_PROBED = "probed.f32"
FILES = (*_FILES, _NORMS, _PROBED)


class Sums:
    """The sums over prompts, in memory or in a folder.

    Args:
        layers: The layers, in order.
        width: The width of the residual stream.
        work: The folder; None keeps everything in memory.
        probes: How many vectors are followed through each prompt's matrices.
        reading: Whether the folder is only read, while another process may be adding to it.

    Attributes:
        n: The number of prompts that count.
        read: How many prompts of the corpus have been read, those that don't count included.
        digest: The digest of these.
        numbers: (n,), int64: which prompts of the corpus count, from 0.
        norms: (n, layers), float64: ‖J_p‖² of each prompt and layer, in the order of the prompts.
        probed: (n, layers, probes, width), float32: J_p times each probe.

    Example:
        >>> import torch
        >>> from scalpel.jacobian_lens.fits.sums import Sums
        >>> sums = Sums([0], 2)
        >>> for scale in (1.0, 3.0):
        ...     with sums.adding() as prompt:
        ...         prompt.add(0, 0, torch.eye(2) * scale)
        >>> sums.mean(0), sums.errors()[0]
        (tensor([[2., 0.],
                [0., 2.]]), 0.5)
    """

    def __init__(
        self, layers: Sequence[Any], width: int, work: Work | None = None, probes: int = 0, *, reading: bool = False
    ) -> None:
        self.layers, self.width = tuple(layers), width
        self.n, self.read, self.digest = 0, 0, ""
        self.probes = probes
        self._work = work
        shape = (len(self.layers), width, width)
        self.numbers = np.zeros(0, dtype=np.int64)
        self.norms = np.zeros((0, len(self.layers)))
        self.probed = np.zeros((0, len(self.layers), probes, width), dtype=np.float32)
        self._files: list[np.ndarray]
        self._current = 0
        self._reading = reading
        self._own: set[int] = set()  # the files that no earlier lens has mapped
        if work is None:
            self._files = [np.zeros(shape)]
        else:
            if work.notes.get("n"):
                self._current = _FILES.index(work.notes["current"])
                _check_whole(work.path(_FILES[self._current]), 8 * math.prod(shape), work)
            self._files = [_mapped(work.path(name), shape, reading) for name in _FILES]
            self._restore(work)
            self._inode = work.path(_FILES[self._current]).stat().st_ino
        self._squares = self._squared()

    # ---- adding prompts --------------------------------------------------------------------------

    @contextmanager
    def adding(self, number: int | None = None, digest: str = "") -> Iterator[Adding]:
        """Add the matrices of one prompt, all or nothing.

        Args:
            number: Which prompt of the corpus it is; by default the next one.
            digest: The digest of all prompts up to it.
        """
        adding = self.begin(self.read if number is None else number)
        yield adding
        self.commit(adding, digest)

    def begin(self, number: int = 0) -> Adding:
        """Begin to add prompts, which count when :meth:`commit` ends; ``number`` is the one that rows are of at first.

        In a folder nothing is lost if they never are committed. In memory the sums are then of no use any more.
        """
        if self._work is None:
            into = self._files[0]
        else:
            other = 1 - self._current
            if other not in self._own:
                path = self._work.path(_FILES[other])
                path.unlink(missing_ok=True)
                self._files[other] = _mapped(path, self._files[other].shape)
                flush(path.parent)
                self._own.add(other)
            into = self._files[other]
            np.copyto(into, self._files[self._current])
        return Adding(self, into, number)

    def commit(self, adding: Adding, digest: str) -> None:
        """Count the prompts that were added, on the disk where there is a folder.

        Args:
            adding: What :meth:`begin` gave.
            digest: The digest of all prompts of the corpus up to the last of them.

        Raises:
            ValueError: A matrix holds NaN or an infinity. In a folder nothing is lost then.
        """
        numbers = sorted(adding.norms)
        norms = np.stack([adding.norms[number].sum(1) for number in numbers])
        if not np.isfinite(norms).all():
            row, place = np.argwhere(~np.isfinite(norms))[0]
            raise ValueError(
                f"the matrix of prompt {numbers[row]} (counted from 0) at layer {self.layers[place]!r} holds NaN or an "
                "infinity, which would be in the mean for good: leave that prompt out, or give the model in float32 if "
                "it is in float16, which overflows"
            )
        probed = np.stack([adding.probed[number] for number in numbers])
        read = max(self.read, numbers[-1] + 1)
        if self._work is not None:
            other = 1 - self._current
            file = self._files[other]
            assert isinstance(file, np.memmap)
            file.flush()
            records = np.concatenate([np.array(numbers, dtype=np.float64)[:, None], norms], axis=1)
            _append(self._work.path(_NORMS), self.n * records[0].nbytes, records)
            if self.probes:
                _append(self._work.path(_PROBED), self.probed.nbytes, probed)
            n = self.n + len(numbers)
            self._work.note(current=_FILES[other], n=n, read=read, digest=digest, probes=self.probes)
            self._current = other
        self.n, self.read, self.digest = self.n + len(numbers), read, digest
        self.numbers = np.concatenate([self.numbers, np.array(numbers, dtype=np.int64)])
        self.norms = np.concatenate([self.norms, norms])
        self.probed = np.concatenate([self.probed, probed])
        self._squares = self._squared()

    def pass_over(self, read: int, digest: str) -> None:
        """Note that prompts were read that don't count."""
        self.read, self.digest = read, digest
        if self._work is not None and self.n:
            self._work.note(read=read, digest=digest)

    def _restore(self, work: Work) -> None:
        if not work.notes.get("n"):
            return
        self.n, self.read, self.digest = (work.notes[name] for name in ("n", "read", "digest"))
        records = _stored(work, _NORMS, np.float64, (self.n, 1 + len(self.layers)))
        self.numbers, self.norms = records[:, 0].astype(np.int64), records[:, 1:]
        shape = (self.n, len(self.layers), self.probes, self.width)
        self.probed = _stored(work, _PROBED, np.float32, shape) if self.probes else np.zeros(shape, np.float32)

    # ---- what they say ---------------------------------------------------------------------------

    def total(self, layer: Any) -> np.ndarray:
        """The sum of a layer's matrices, (width, width), float64."""
        found: np.ndarray = self._files[self._current][self.layers.index(layer)]
        return found

    def mean(self, layer: Any) -> Tensor:
        """The mean of a layer's matrices, (width, width), float32.

        Raises:
            RuntimeError: Another process has added prompts since the folder was read.
        """
        mean = torch.from_numpy((self.total(layer) / self.n).astype(np.float32))
        self._check_kept()
        return mean

    def _check_kept(self) -> None:
        """Check that a file that is only read is still the one that counts, so that nobody has written to it."""
        if self._work is None or not self._reading:
            return
        work = self._work
        path, file = work.path(_FILES[self._current]), self._files[self._current]
        if not path.is_file() or path.stat().st_ino != self._inode:
            return  # nobody writes to a file that has lost its name
        assert isinstance(file, np.memmap)
        now = work.stored_notes().get("n")
        if now != self.n:
            raise RuntimeError(
                f"a fit has gone on in {work.folder} since this lens was read from it ({self.n} prompts then, {now} "
                "now), and writes where these sums were: read the folder again, or copy it first"
            )

    def errors(self) -> dict[Any, float]:
        """The relative error of each layer's mean; NaN for fewer than two prompts, 0 where all matrices are zero."""
        return dict(zip(self.layers, relative_errors(self.n, self.norms.sum(0), self._squares), strict=True))

    def squares(self) -> np.ndarray:
        """‖Σ J_p‖² of each layer, (layers,), float64."""
        return self._squares

    def _squared(self) -> np.ndarray:
        totals = self._files[self._current]
        return np.array([float(np.vdot(total, total)) for total in totals]) if self.n else np.zeros(len(self.layers))

    # ---- merging ---------------------------------------------------------------------------------

    def merged(self, others: Iterable[Sums], shared: bool = False) -> Sums:
        """Return the sums over the prompts of all, in memory. Neither the order nor the grouping changes a bit.

        Args:
            others: The others.
            shared: Whether all are of one corpus, so that prompts keep their numbers.

        Raises:
            ValueError: The layers, the width or the number of probes differ.
        """
        all_of = [self, *others]
        for other in all_of[1:]:
            if (other.layers, other.width, other.probes) != (self.layers, self.width, self.probes):
                raise ValueError("the lenses have other layers, another width or other probes, so they have no sum")
        totals = np.array(self._files[self._current])
        for each in all_of[1:]:
            totals += each._files[each._current]
        for each in all_of:
            each._check_kept()
        # prompts are counted on from one lens to the next
        offsets = np.cumsum([0, *(0 if shared else each.read for each in all_of)])
        result = Sums(self.layers, self.width, probes=self.probes)
        result.take(
            totals,
            np.concatenate([each.numbers + offset for each, offset in zip(all_of, offsets, strict=False)]),
            np.concatenate([each.norms for each in all_of]),
            np.concatenate([each.probed for each in all_of]),
        )
        result.read = max([result.read, int(offsets[-1])])
        return result

    def take(self, totals: np.ndarray, numbers: np.ndarray, norms: np.ndarray, probed: np.ndarray) -> None:
        """Become the sums ``totals`` (layers, width, width) of prompts whose facts may be in any order; in memory."""
        order = np.argsort(numbers, kind="stable")
        self._files, self._current = [totals], 0
        self.n = len(order)
        self.read = int(numbers.max()) + 1 if self.n else 0
        self.numbers, self.norms, self.probed = numbers[order], norms[order], probed[order]
        self._squares = self._squared()


class Adding:
    """The prompts that are being added.

    Attributes:
        norms: {number of a prompt: (layers, width)}, the squared norm of each row of J_p.
        probed: {number of a prompt: (layers, probes, width)}.
    """

    def __init__(self, sums: Sums, into: np.ndarray, number: int) -> None:
        self.norms: dict[int, np.ndarray] = {}
        self.probed: dict[int, np.ndarray] = {}
        self._number, self._into = number, into
        self._shapes = (len(sums.layers), sums.width), (len(sums.layers), sums.probes, sums.width)
        self._places = {layer: place for place, layer in enumerate(sums.layers)}

    def add(
        self, layer: Any, first: int, rows: Tensor, *, prompt: int | None = None, probes: Tensor | None = None
    ) -> None:
        """Add rows ``first`` and following of a prompt's matrix of ``layer``, each row once.

        Args:
            layer: The layer.
            first: The number of the first row.
            rows: (rows, width).
            prompt: The prompt's number; by default the one that :meth:`Sums.begin` was given.
            probes: (probes, width), the vectors that are followed.
        """
        number = self._number if prompt is None else prompt
        if number not in self.norms:
            of_norms, of_probes = self._shapes
            self.norms[number] = np.zeros(of_norms)
            self.probed[number] = np.zeros(of_probes, dtype=np.float32)
        place = self._places[layer]
        values = rows.detach().to("cpu", torch.float64).numpy()
        self._into[place, first : first + len(values)] += np.rint(values * _GRID) / _GRID
        # a number for each row, so that it doesn't matter how many rows come at a time
        self.norms[number][place, first : first + len(values)] = np.square(values).sum(1)
        if probes is not None and len(probes):
            found = probes.to(rows.device, rows.dtype) @ rows.T
            self.probed[number][place, :, first : first + len(values)] = found.float().cpu().numpy()


class Means(Mapping[Any, Tensor]):
    """The matrices of a lens, each computed from the sums when it is asked for."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums

    def __getitem__(self, layer: Any) -> Tensor:
        if layer not in self._sums.layers:
            raise KeyError(layer)
        return self._sums.mean(layer)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sums.layers)

    def __len__(self) -> int:
        return len(self._sums.layers)


def relative_errors(n: int, squared_norms: np.ndarray, squares: np.ndarray) -> list[float]:
    """The relative error of each layer's mean.

    Args:
        n: The number of prompts.
        squared_norms: (layers,), Σ ‖J_p‖².
        squares: (layers,), ‖Σ J_p‖².
    """
    if n < 2:
        return [math.nan] * len(squares)
    found = []
    for norms, square in zip(squared_norms / n, squares / n**2, strict=True):
        spread = max(0.0, norms - square) / (n - 1)
        found.append(math.sqrt(spread / square) if square > 0 else (0.0 if norms == 0 else math.inf))
    return found


def _mapped(path: Path, shape: tuple[int, ...], reading: bool = False) -> np.ndarray:
    """A file of float64 mapped into memory, of zeros where it is new or was cut short; without a file if it isn't."""
    size = 8 * math.prod(shape)
    whole = path.is_file() and path.stat().st_size == size
    if reading:
        return np.memmap(path, np.float64, "r", shape=shape) if whole else np.zeros(0)
    if not whole:
        with path.open("wb") as file:
            file.truncate(size)
    return np.memmap(path, np.float64, "r+", shape=shape)


def _append(path: Path, at: int, values: np.ndarray) -> None:
    """Write ``values`` at byte ``at`` of a file, over whatever a run that was killed left there, and onto the disk."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(at)
        file.write(values.tobytes())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _stored(work: Work, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The values that :func:`_append` wrote."""
    path = work.path(name)
    _check_whole(path, np.dtype(dtype).itemsize * math.prod(shape), work, longer=True)
    return np.fromfile(path, dtype, math.prod(shape)).reshape(shape)


def _check_whole(path: Path, size: int, work: Work, longer: bool = False) -> None:
    """Check that a file that counts is there, as long as it was when it was written.

    Raises:
        ValueError: It isn't.
    """
    found = path.stat().st_size if path.is_file() else 0
    if found < size or (found > size and not longer):
        raise ValueError(
            f"{path} has {found} bytes, and the {work.notes['n']} prompts of this folder's lens need {size}: it was "
            f"cut short, or not copied as a whole; {work.way_out}"
        )
