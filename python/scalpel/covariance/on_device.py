"""The exact state on a GPU: the core's Gram matrix, and torch's operations for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._native import core_of, memory_of
from .eigen import Leading, Spectrum, by_lapack, worth_iterating
from .exact import FLOAT32_VARIANCES, Exact, above_noise, total_of, triangle
from .state import State, Total

_ENTRIES = 1 << 24  # of rows that are made float64 at a time: 128 MiB
_LARGEST = 1e150  # as the core's: squares beyond it spoil float64 sums
_FLOAT32 = 1e-12, 1e15  # deviations whose squares, thousands of them summed, float32 holds

Precision = Literal["accurate", "fast"]


class Moments(NamedTuple):
    """All that is known of the rows; replaced as a whole, so that an interrupt leaves the old or the new.

    ``scatter``: (dim, dim), its lower triangle; what is above the diagonal means nothing. (0, 0) without rows.
    """

    rows: int
    mean: Tensor
    scatter: Tensor


class Look(NamedTuple):
    """Rows (rows, dim), their mean in float64, and ``told`` (3,): see csrc/covariance/covariance_cuda.h."""

    rows: Tensor
    mean: Tensor
    told: Tensor


class OnDevice(State):
    """Mean (dim,) and scatter (dim, dim) in float64 where the rows are.

    No row waits: each update is a block, centered by its own mean and joined by the rule of
    csrc/covariance/covariance.h. That reads and writes the scatter, so updates should bring a thousand rows or more.
    One wait for the device an update, or for many states' updates (:func:`update_all`): whether rows are finite has to
    be known.

    Float64 rows are multiplied in float64, and so is a block whose deviations float32 can't square. Others go through
    tensor cores (csrc/covariance/gram_cuda.cu). ``precision``: "accurate" multiplies the three bfloat16 parts of each
    deviation, at float32's error; "fast" rounds deviations to bfloat16 once, a sixth of the products. Centered bfloat16
    rows take three parts, too: the mean is taken off before anything is rounded, and x − mean has more digits than x.
    Uncentered ones take one part in either case, since their products are exact.
    """

    method = None

    def __init__(self, dim: int, center: bool, device: torch.device, precision: Precision = "accurate") -> None:
        super().__init__(dim, center)
        self._device = device
        self._precision = precision
        self._moments = self._none()
        self._leading = Leading()
        self._answer: Spectrum | None = None  # to the last question, while no row has come since

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
        """What has to be known of rows (one or more) before they join. Waits for nothing."""
        core, place = core_of(rows)
        chunks = -(-len(rows) // core.COLUMN_SUMS_ROWS)
        sums = torch.empty(chunks, self.dim, dtype=torch.float64, device=rows.device)
        told = sums.new_zeros(3)
        told[0].fill_(len(rows))
        limit = min(_LARGEST, torch.finfo(rows.dtype).max)
        on = rows.device
        to = memory_of(sums, "the sums", on), memory_of(told, "what is told", on)
        core.column_sums(memory_of(rows, "x", on), limit, *to, place)
        return Look(rows, rows[0].double() + sums.sum(dim=0) / len(rows), told)

    def join(self, look: Look, bad: float, size: float, farthest: float) -> int:
        """Adds the rows; given what ``look.told`` said. -1, or the number of a row that isn't finite: then none."""
        if bad < len(look.rows):
            return int(bad)
        most = farthest * 2 if self.center else size  # as far as a row can be from its mean
        self._replace(self._with_block(look.rows, look.mean, most == 0 or _FLOAT32[0] < most < _FLOAT32[1]))
        return -1

    def fold(self) -> None:
        """No row waits."""

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
        scatter.diagonal().clamp_(min=0)  # what cancels may leave a rounding error below
        self._replace(Moments(left, mean, scatter))

    def _with_block(self, rows: Tensor, mean: Tensor, narrow: bool) -> Moments:
        """``narrow``: float32 holds the squares of what the rows are from their mean."""
        old, n = self._moments, len(rows)
        count, apart = old.rows + n, mean - old.mean
        by_core = narrow and rows.dtype != torch.float64
        shift = mean.float() if self.center and by_core else None
        # Chan's d dᵀ n_a n_b / n; and the core takes a float32 shift off, so Σ (x−m)(x−m)ᵀ is less than its sum by
        # n (m−s)(m−s)ᵀ. Both in one pass over the scatter, into memory of its own.
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
            taken_off = None if shift is None else memory_of(shift, "the shift", on)
            to = memory_of(scatter, "the scatter", on)
            core.gram_lower(memory_of(rows, "x", on), taken_off, to, 1 if once else 3, place)
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
                found = self._leading.find(covariance.float(), lambda R: R @ covariance, k)
                if found is not None:
                    return found
        found = by_lapack(covariance)
        self._leading.start_from(found.vectors)
        return found if k is None else Spectrum(found.values[:k], found.vectors[:k])

    def eigenvalues(self) -> Tensor:
        return above_noise(torch.linalg.eigvalsh(self.covariance()).flip(0))

    # ---- files and copies ----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """On the CPU, and as an ``Exact`` state has them."""
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
    """Updates states that are on one device, each by its rows, and waits for the device once for all. What each
    :meth:`OnDevice.update` says."""
    found = [-1] * len(states)
    looks = {i: states[i].look(each) for i, each in enumerate(rows) if len(each)}
    if looks:
        told = torch.stack([look.told for look in looks.values()]).tolist()
        for (i, look), each in zip(looks.items(), told, strict=True):
            found[i] = states[i].join(look, *each)
    return found


def exact_on(device: torch.device, dim: int, center: bool, precision: Precision = "accurate") -> Exact | OnDevice:
    """An exact state without rows, for those of a device."""
    return OnDevice(dim, center, device, precision) if takes(device) else Exact(dim, center)


def takes(device: torch.device) -> bool:
    """Whether rows of this device are OnDevice's."""
    return device.type == "cuda"


def moved(state: State, device: torch.device, precision: Precision = "accurate") -> State:
    """An exact state, or its copy on another device."""
    if state.device == device:
        return state
    copy = exact_on(device, state.dim, state.center, precision)
    copy.restore(state.tensors())
    return copy
