"""The exact state on a GPU, from the core's Gram matrix and torch's operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._native import core_of, memory_of
from .eigen import Leading, Spectrum, by_lapack, worth_iterating
from .exact import FLOAT32_VARIANCES, Exact, above_noise, total_of, triangle
from .state import State, Total

_ENTRIES = 1 << 24  # of rows that are converted to float64 at a time: 128 MiB
_LARGEST = 1e150  # the core's limit: larger squares spoil float64 sums
_FLOAT32 = 1e-12, 1e15  # deviations whose squares float32 can hold, even thousands of them summed

Precision = Literal["accurate", "fast"]


class Moments(NamedTuple):
    """All that is known of the rows, replaced as a whole so that an interrupt leaves the old or the new one.

    Attributes:
        rows: The number of rows.
        mean: Their mean (dim,).
        scatter: (dim, dim), of which only the lower triangle has a meaning; (0, 0) if there are no rows.
    """

    rows: int
    mean: Tensor
    scatter: Tensor


class Look(NamedTuple):
    """What is computed from rows before they join.

    Attributes:
        rows: The rows (rows, dim).
        mean: Their mean, in float64.
        extremes: (3,): the first row that is not finite, the largest magnitude, and the largest distance from the first
            row; see csrc/covariance/covariance_cuda.h.
    """

    rows: Tensor
    mean: Tensor
    extremes: Tensor


class OnDevice(State):
    """Mean (dim,) and scatter (dim, dim) in float64, on the device of the rows.

    No row waits: each update is a block, centered by its own mean and joined by the rule of
    csrc/covariance/covariance.h. Joining reads and writes the whole scatter, so an update should bring a thousand rows
    or more. Whether rows are finite has to be known before they join, so the program waits for the device once per
    update, or once for the updates of many states (:func:`update_all`).

    Float64 rows are multiplied in float64, and so is a block whose deviations have squares outside float32's range.
    Other rows go through tensor cores (csrc/covariance/gram_cuda.cu). With ``precision="accurate"`` three bfloat16
    parts of each deviation are multiplied, with the error of float32; with "fast", deviations are rounded to bfloat16,
    which takes a sixth of the products. Centered bfloat16 rows need three parts, too: the mean is subtracted before
    anything is rounded, and x − mean has more digits than x. Uncentered bfloat16 rows take one part in either case,
    because their products are exact.
    """

    method = None

    def __init__(self, dim: int, center: bool, device: torch.device, precision: Precision = "accurate") -> None:
        super().__init__(dim, center)
        self._device = device
        self._precision = precision
        self._moments = self._none()
        self._leading = Leading()
        self._answer: Spectrum | None = None  # the last spectrum, until another row arrives

    def empty(self) -> OnDevice:
        return OnDevice(self.dim, self.center, self._device, self._precision)

    @property
    def device(self) -> torch.device:
        return self._device

    # ---- rows ----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return self._moments.rows

    def update(self, rows: Tensor) -> int:
        return update_all([self], [rows])[0]

    def look(self, rows: Tensor) -> Look:
        """Compute what has to be known of rows (at least one) before they join, without waiting for the device."""
        core, place = core_of(rows)
        chunks = -(-len(rows) // core.COLUMN_SUMS_ROWS)
        sums = torch.empty(chunks, self.dim, dtype=torch.float64, device=rows.device)
        extremes = sums.new_zeros(3)
        extremes[0].fill_(len(rows))
        limit = min(_LARGEST, torch.finfo(rows.dtype).max)
        on = rows.device
        outputs = memory_of(sums, "the sums", on), memory_of(extremes, "the extremes", on)
        core.column_sums(memory_of(rows, "x", on), limit, *outputs, place)
        return Look(rows, rows[0].double() + sums.sum(dim=0) / len(rows), extremes)

    def join(self, look: Look, bad: float, size: float, farthest: float) -> int:
        """Add the rows of a look, unless one of them is not finite.

        Args:
            look: The rows and their mean.
            bad: The index of the first row that is not finite, or the number of rows.
            size: The largest magnitude.
            farthest: The largest distance of an entry from the first row's.

        Returns:
            -1, or the index of a row that is not finite; then no row was added.
        """
        if bad < len(look.rows):
            return int(bad)
        most = farthest * 2 if self.center else size  # the farthest that an entry can be from its mean
        self._replace(self._with_block(look.rows, look.mean, most == 0 or _FLOAT32[0] < most < _FLOAT32[1]))
        return -1

    def fold(self) -> None:
        """Do nothing, because no row waits."""

    def merge(self, other: State) -> None:
        assert isinstance(other, OnDevice)
        a, b = self._moments, other._moments
        if not a.rows or not b.rows:
            self._replace(b if b.rows else a)
            return
        count, apart = a.rows + b.rows, b.mean - a.mean
        scatter = a.scatter + b.scatter
        if self.center:
            scatter.addr_(apart, apart, alpha=a.rows / count * b.rows)
        self._replace(Moments(count, a.mean + apart * (b.rows / count), scatter))

    def subtract(self, other: State) -> None:
        assert isinstance(other, OnDevice)
        a, b = self._moments, other._moments
        left = a.rows - b.rows
        if not left or not b.rows:
            self._replace(a if left else self._none())
            return
        mean = a.mean - (b.mean - a.mean) * (b.rows / left)
        scatter = a.scatter - b.scatter
        if self.center:
            apart = b.mean - mean
            scatter.addr_(apart, apart, alpha=-(left / a.rows * b.rows))
        scatter.diagonal().clamp_(min=0)  # cancellation may leave a rounding error below 0
        self._replace(Moments(left, mean, scatter))

    def _with_block(self, rows: Tensor, mean: Tensor, narrow: bool) -> Moments:
        """Join a block; ``narrow`` says that float32 can hold the squares of the deviations."""
        old, n = self._moments, len(rows)
        count, apart = old.rows + n, mean - old.mean
        by_core = narrow and rows.dtype != torch.float64
        shift = mean.float() if self.center and by_core else None
        # Chan's d dᵀ n_a n_b / n. The core subtracts a float32 shift s instead of the mean m, so Σ (x−m)(x−m)ᵀ is its
        # sum minus n (m−s)(m−s)ᵀ. Both corrections take one pass over the scatter, into new memory.
        scatter = old.scatter if old.rows else mean.new_zeros(self.dim, self.dim)
        squares = [(apart, old.rows / count * n)] if old.rows and self.center else []
        if shift is not None:
            squares.append((mean - shift, -n))
        if squares:
            weighted = torch.stack([v * weight for v, weight in squares], dim=1)
            scatter = torch.addmm(scatter, weighted, torch.stack([v for v, _ in squares]))
        else:
            scatter = scatter.clone()
        if by_core:
            once = self._precision == "fast" or (rows.dtype == torch.bfloat16 and shift is None)
            core, place = core_of(rows)
            on = rows.device
            subtracted = None if shift is None else memory_of(shift, "the shift", on)
            target = memory_of(scatter, "the scatter", on)
            core.gram_lower(memory_of(rows, "x", on), subtracted, target, 1 if once else 3, place)
        else:
            for part in self._parts(rows):
                deviations = part - mean if self.center else part.double()
                scatter.addmm_(deviations.T, deviations)
        return Moments(count, old.mean + apart * (n / count) if old.rows else mean, scatter)

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        yield from rows.split(max(1, _ENTRIES // self.dim))

    def _replace(self, moments: Moments) -> None:
        self._answer = None
        self._moments = moments

    def _none(self) -> Moments:
        zeros = torch.zeros(self.dim, dtype=torch.float64, device=self._device)
        return Moments(0, zeros, zeros.new_zeros(0, 0))

    # ---- moments -------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        return self._moments.mean.clone()

    def covariance(self) -> Tensor:
        lower = self._moments.scatter.tril()
        return (lower + lower.tril(-1).T) / self.count

    def total(self) -> Total:
        return total_of(self._moments.scatter, self.count)

    # ---- eigenvectors --------------------------------------------------------------------------

    def spectrum(self, k: int | None) -> Spectrum:
        answer = self._answer
        if answer is None or k is None or k > len(answer.values):
            answer = self._answer = self._spectrum(k)
        return Spectrum(answer.values[:k].clone(), answer.vectors[:k].clone())

    def _spectrum(self, k: int | None) -> Spectrum:
        covariance = self.covariance()
        if k is not None and worth_iterating(self.dim, k):
            tiny, huge = FLOAT32_VARIANCES
            if tiny < float(covariance.diagonal().max()) < huge:
                leading = self._leading.find(covariance.float(), lambda R: R @ covariance, k)
                if leading is not None:
                    return leading
        spectrum = by_lapack(covariance)
        self._leading.start_from(spectrum.vectors)
        return spectrum if k is None else Spectrum(spectrum.values[:k], spectrum.vectors[:k])

    def eigenvalues(self) -> Tensor:
        return above_noise(torch.linalg.eigvalsh(self.covariance()).flip(0))

    # ---- files and copies ----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors on the CPU, in the format of an ``Exact`` state."""
        count, mean, scatter = self._moments
        packed = torch.zeros(self.dim * (self.dim + 1) // 2 if count else 0, dtype=torch.float64, device="cpu")
        for row, part in triangle(scatter.cpu(), packed):
            part[:] = row
        return {"count": torch.tensor([count], dtype=torch.int64, device="cpu"), "mean": mean.cpu(), "scatter": packed}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        count = int(tensors["count"])
        scatter = torch.zeros(self.dim if count else 0, self.dim if count else 0, dtype=torch.float64, device="cpu")
        for row, part in triangle(scatter, tensors["scatter"].cpu()):
            row[:] = part
        mean = tensors["mean"].to(self._device, copy=True)
        self._replace(Moments(count, mean, scatter.to(self._device)))


def update_all(states: Sequence[OnDevice], rows: Sequence[Tensor]) -> list[int]:
    """Update several states on one device, each by its own rows, and wait for the device only once.

    Returns:
        For each state what :meth:`OnDevice.update` returns.
    """
    bad_rows = [-1] * len(states)
    looks = {i: states[i].look(batch) for i, batch in enumerate(rows) if len(batch)}
    if looks:
        extremes = torch.stack([look.extremes for look in looks.values()]).tolist()
        for (i, look), numbers in zip(looks.items(), extremes, strict=True):
            bad_rows[i] = states[i].join(look, *numbers)
    return bad_rows


def exact_on(device: torch.device, dim: int, center: bool, precision: Precision = "accurate") -> Exact | OnDevice:
    """Make an exact state without rows, for rows on a device."""
    return OnDevice(dim, center, device, precision) if takes(device) else Exact(dim, center)


def takes(device: torch.device) -> bool:
    """Whether rows on this device belong into an OnDevice state."""
    return device.type == "cuda"


def moved(state: State, device: torch.device, precision: Precision = "accurate") -> State:
    """Return an exact state, or its copy if it is on another device."""
    if state.device == device:
        return state
    copy = exact_on(device, state.dim, state.center, precision)
    copy.restore(state.tensors())
    return copy
