"""The exact state on the CPU, which keeps every direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._native import Memory, cpu_core, empty, memory_of
from .eigen import Leading, Spectrum, by_lapack, by_rows, worth_iterating
from .state import State, Total

BLOCK_ROWS: int = cpu_core.block_rows()
_ROWS = 256
FLOAT32_VARIANCES = 1e-20, 1e30  # the range of variances whose products float32 can hold


class Exact(State):
    """Mean (dim,) and the lower triangle of the scatter (dim, dim), in float64; see csrc/covariance/covariance.h.

    Rows wait here, in the dtype in which they came, until there is a block of them.
    """

    method = None

    def __init__(self, dim: int, center: bool) -> None:
        super().__init__(dim, center)
        self._counts = torch.zeros(
            2, dtype=torch.int64, device="cpu"
        )  # of joined and of waiting rows; the core writes them
        self._mean = torch.zeros(dim, dtype=torch.float64, device="cpu")
        self._scatter = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._waiting = torch.empty(0, dim, dtype=torch.float32, device="cpu")
        self._leading = Leading()
        self._answer: Spectrum | None = None  # the last spectrum, until another row arrives

    def empty(self) -> Exact:
        return Exact(self.dim, self.center)

    # ---- rows ----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def update(self, rows: Tensor) -> int:
        if not len(rows):
            return -1
        joined, waiting = self._counts.tolist()
        if waiting and self._waiting.dtype != rows.dtype:
            bad: int = cpu_core.first_bad_row(memory_of(rows, "x"), torch.get_num_threads())
            if bad >= 0:
                return bad  # refuse before anything has changed
            self.fold()
            joined, waiting = self._counts.tolist()
        limit = BLOCK_ROWS if joined else max(BLOCK_ROWS, self.dim)
        self._make_room(waiting, min(limit, waiting + len(rows)), limit, rows.dtype)
        if waiting + len(rows) >= limit:
            self._need_scatter()
        self._answer = None
        bad = cpu_core.update_moments(*self._memory(), self.center, memory_of(rows, "x"), torch.get_num_threads())
        if self.dim > BLOCK_ROWS and not joined and int(self._counts[0]):
            self._waiting = self._waiting[:BLOCK_ROWS].clone()  # from now on no more than a block will wait
        return bad

    def fold(self) -> None:
        """Make waiting rows join."""
        if int(self._counts[1]):
            self._need_scatter()
            cpu_core.fold_moments(*self._memory(), self.center, torch.get_num_threads())

    def merge(self, other: State) -> None:
        assert isinstance(other, Exact)
        if not int(other._counts[0]) and other._waiting.dtype == self._waiting.dtype and other is not self:
            self.update(other._rows())  # the other state's few waiting rows may go on waiting here
            return
        self._combine(other, cpu_core.merge_moments)

    def subtract(self, other: State) -> None:
        assert isinstance(other, Exact)
        self._combine(other, cpu_core.subtract_moments)

    def _combine(self, other: Exact, op: Any) -> None:
        self._answer = None
        for state in (self, other):
            state.fold()
            state._need_scatter()
        op(*self._memory(), self.center, *other._memory(), torch.get_num_threads())

    # ---- moments -------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        joined, waiting = self._counts.tolist()
        if not waiting:
            return self._mean.clone()
        first = self._rows()[0].double()
        rest = first + (self._rows().double() - first).mean(dim=0)
        return rest if not joined else self._mean + (rest - self._mean) * (waiting / (joined + waiting))

    def covariance(self) -> Tensor:
        self.fold()
        return self._full(torch.float64)

    def total(self) -> Total:
        """Compute Σ λ and Σ λ² without eigenvalues."""
        if self._few_rows():
            rows = self._centered()
            lower = rows @ rows.T  # has the eigenvalues of the scatter
        else:
            self.fold()
            lower = self._scatter
        return total_of(lower, self.count)

    # ---- eigenvectors --------------------------------------------------------------------------

    def spectrum(self, k: int | None) -> Spectrum:
        if self._few_rows():
            return by_rows(self._centered(), self.count, k)
        self.fold()
        if self._answer is not None and k is not None and k <= len(self._answer.values):
            return Spectrum(self._answer.values[:k].clone(), self._answer.vectors[:k].clone())
        spectrum = self._spectrum(k)
        self._answer = spectrum
        return Spectrum(spectrum.values.clone(), spectrum.vectors.clone())

    def _spectrum(self, k: int | None) -> Spectrum:
        largest = float(self._scatter.diagonal().max()) / self.count  # no entry is larger
        if k is not None and worth_iterating(self.dim, k) and FLOAT32_VARIANCES[0] < largest < FLOAT32_VARIANCES[1]:
            leading = self._leading.find(self._full(torch.float32), self._product, k)
            if leading is not None:
                return leading
        spectrum = by_lapack(self.covariance())
        self._leading.start_from(spectrum.vectors)
        return spectrum if k is None else Spectrum(spectrum.values[:k], spectrum.vectors[:k])

    def _product(self, R: Tensor) -> Tensor:
        """Multiply rows R (k, dim) by the covariance; the scatter is zero above its diagonal."""
        lower = self._scatter
        return (R @ lower + R @ lower.T - R * lower.diagonal()) / self.count

    def eigenvalues(self) -> Tensor:
        if self._few_rows():
            values = torch.linalg.svdvals(self._centered()).square() / self.count
            values = torch.cat([values, values.new_zeros(self.dim - len(values))])
        else:
            values = torch.linalg.eigvalsh(self.covariance()).flip(0)
        return above_noise(values)

    def _few_rows(self) -> bool:
        """Whether all rows still wait and are fewer than the columns, so that their Gram matrix is the smaller one."""
        return not int(self._counts[0]) and self.count < self.dim

    def _centered(self) -> Tensor:
        rows = self._rows().double()
        return rows - self.mean if self.center else rows

    # ---- files and copies ----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        self.fold()
        packed = torch.zeros(self.dim * (self.dim + 1) // 2 if self.count else 0, dtype=torch.float64, device="cpu")
        for row, part in triangle(self._scatter, packed):
            part[:] = row
        return {"count": self._counts[:1].clone(), "mean": self._mean, "scatter": packed}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        count = int(tensors["count"])
        self._counts[0] = count
        self._mean.copy_(tensors["mean"])
        if count:
            self._need_scatter()
            for row, part in triangle(self._scatter, tensors["scatter"]):
                row[:] = part

    # ---- inside --------------------------------------------------------------------------------

    def _full(self, dtype: torch.dtype) -> Tensor:
        out = empty((self.dim, self.dim), dtype)
        cpu_core.symmetric_moments(
            *self._memory(), self.center, memory_of(out, "the covariance"), torch.get_num_threads()
        )
        return out

    def _rows(self) -> Tensor:
        return self._waiting[: int(self._counts[1])]

    def _memory(self) -> tuple[Memory, Memory, Memory, Memory]:
        counts, mean = memory_of(self._counts, "the state's counts"), memory_of(self._mean, "the state's mean")
        return counts, mean, memory_of(self._scatter, "the scatter"), memory_of(self._waiting, "the waiting rows")

    def _need_scatter(self) -> None:
        if not len(self._scatter):
            fresh = empty((self.dim, self.dim), torch.float64)
            self._scatter = fresh.zero_()

    def _make_room(self, waiting: int, rows: int, limit: int, dtype: torch.dtype) -> None:
        if rows > len(self._waiting) or dtype != self._waiting.dtype:
            wider = empty((min(limit, max(rows, 2 * len(self._waiting))), self.dim), dtype)
            wider[:waiting] = self._waiting[:waiting]
            self._waiting = wider


def triangle(scatter: Tensor, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each row of the scatter up to the diagonal with its part of ``packed``, which is empty without rows."""
    for i in range(len(scatter) if len(packed) else 0):
        begin = i * (i + 1) // 2
        yield scatter[i, : i + 1], packed[begin : begin + i + 1]


def total_of(lower: Tensor, count: int) -> Total:
    """Compute sums over the spectrum from the lower triangle of a scatter."""
    diagonal = lower.diagonal()
    total = float(diagonal.sum())
    if total <= 0:
        return Total(0.0, 0.0)
    # Square shares of the total, a few rows at a time: the matrix is not copied, and nothing leaves float64's range.
    squares = -float((diagonal / total).square().sum())
    for i in range(0, len(lower), _ROWS):
        squares += 2 * float((lower[i : i + _ROWS].tril(i) / total).square().sum())
    return Total(total / count, squares)


def above_noise(values: Tensor) -> Tensor:
    """Set those of the descending eigenvalues to 0 that are only rounding errors."""
    noise = len(values) * torch.finfo(torch.float64).eps * float(values[0])
    return torch.where(values > noise, values, 0.0)
