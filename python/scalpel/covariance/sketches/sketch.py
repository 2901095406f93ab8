"""What the two sketches share: centering and joining rows, and the directions that are kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..._native import cpu_core, empty, memory_of
from ..eigen import Spectrum, complete, fix_signs
from ..state import State, Total

_KEPT = 2  # directions kept, and rows that may wait, for each direction requested
_BLOCK = 1024  # rows that join at a time
_TINY, _HUGE = 1e-25, 1e25  # the range of mean squares of rows that are multiplied in float32


class Kept(NamedTuple):
    """All that a sketch knows of the rows that joined, replaced as a whole so that an interrupt leaves old or new ones.

    Attributes:
        rows: The number of rows.
        mean: Their mean (dim,).
        directions: B (m, dim), orthogonal rows, longest first, with BᵀB ≈ Σ (x − mean)(x − mean)ᵀ.
        energy: Σ ‖x − mean‖², exact.
        shrunk: Σ δ of Frequent Directions; 0 for the tracker.
    """

    rows: int
    mean: Tensor
    directions: Tensor
    energy: float
    shrunk: float


class Sketch(State):
    """At most 2·rank directions and fewer than 2·rank waiting rows, which takes memory for 4·rank·dim numbers."""

    always_wide: ClassVar[bool] = False  # whether rows of float32 and narrower are converted to float64 first

    def __init__(self, dim: int, center: bool, rank: int) -> None:
        super().__init__(dim, center)
        self.rank = rank
        zeros = torch.zeros(dim, dtype=torch.float64, device="cpu")
        self._kept = Kept(0, zeros, torch.zeros(0, dim, dtype=torch.float64, device="cpu"), 0.0, 0.0)
        self._waiting: tuple[Tensor, ...] = ()

    def empty(self) -> Self:
        return type(self)(self.dim, self.center, self.rank)

    def kind(self) -> tuple[Any, ...]:
        return *super().kind(), self.rank

    @property
    def most(self) -> int:
        """The largest number of directions that are kept."""
        return min(self.dim, _KEPT * self.rank)

    # ---- rows ----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return self._kept.rows + sum(map(len, self._waiting))

    def update(self, rows: Tensor) -> int:
        bad: int = cpu_core.first_bad_row(memory_of(rows, "x"), torch.get_num_threads())
        if bad >= 0 or not len(rows):
            return bad
        waiting = (*self._waiting, rows)
        if sum(map(len, waiting)) < _KEPT * self.rank:
            self._waiting = (*self._waiting, rows.clone())
        else:
            self._kept, self._waiting = self._joined(waiting), ()
        return -1

    def fold(self) -> None:
        """Make waiting rows join."""
        if self._waiting:
            self._kept, self._waiting = self._joined(self._waiting), ()

    def merge(self, other: State) -> None:
        assert isinstance(other, Sketch)
        self.fold()
        other.fold()
        self._kept = self._together(self._kept, other._kept)

    def subtract(self, other: State) -> None:
        raise ValueError(
            f"a sketch ({self.method}) cannot subtract rows, because what it dropped is not known; use rank=None, "
            "or keep a state for each block and merge those that should stay"
        )

    def _joined(self, waiting: tuple[Tensor, ...]) -> Kept:
        kept = self._kept
        rows = waiting[0] if len(waiting) == 1 else torch.cat([batch.double() for batch in waiting])
        for block in rows.split(self._block_rows()):
            kept = self._with_block(kept, block)
        return kept

    def _block_rows(self) -> int:
        return _BLOCK

    def _with_block(self, kept: Kept, rows: Tensor) -> Kept:
        """Join a block centered by its own mean; the distance between the means is one more row (Chan et al. 1979)."""
        mean = torch.empty(self.dim, dtype=torch.float64, device="cpu")
        dtype = torch.float64 if rows.dtype == torch.float64 or self.always_wide else torch.float32
        rows = rows.double() if dtype == torch.float64 else rows
        first = len(kept.directions)  # leave room before and after the block, so that joining copies nothing
        stack = empty((first + len(rows) + 1, self.dim), dtype)
        centered = stack[first:-1]
        outputs = memory_of(mean, "the block's mean"), memory_of(centered, "the centered block")
        energy: float = cpu_core.center_rows(memory_of(rows, "x"), self.center, *outputs, torch.get_num_threads())
        stack[:first] = kept.directions
        square = max(energy / rows.numel(), kept.energy / max(1, kept.rows * self.dim))  # the mean square of an entry
        if dtype == torch.float32 and square > 0 and not _TINY < square < _HUGE:
            return self._with_block(kept, rows.double())  # float32 products would overflow or underflow
        return self._together(kept, Kept(len(rows), mean, centered, energy, 0.0), stack)

    def _together(self, a: Kept, b: Kept, stack: Tensor | None = None) -> Kept:
        """Combine two sets of directions; ``stack`` holds both, one after the other, and room for one more row."""
        if not b.rows:
            return a
        if stack is None:
            if not a.rows:
                return b
            stack = torch.cat([a.directions, b.directions, b.mean[None]])
        rows, apart = a.rows + b.rows, b.mean - a.mean
        joint = apart * ((a.rows / rows * b.rows) ** 0.5 if self.center else 0.0)
        stack[-1] = joint
        directions, dropped = self._compressed(stack, len(a.directions), rows)
        return Kept(
            rows,
            a.mean + apart * (b.rows / rows),
            directions,
            a.energy + b.energy + float(joint.square().sum()),
            a.shrunk + b.shrunk + dropped,
        )

    @abstractmethod
    def _compressed(self, rows: Tensor, known: int, seed: int) -> tuple[Tensor, float]:
        """Replace the rows by at most ``most`` directions in float64; the first ``known`` rows were directions already.

        Returns:
            The directions, and δ.
        """

    # ---- moments -------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        self.fold()
        return self._kept.mean.clone()

    @property
    def added(self) -> float:
        """What is added to Σ (x·v)² in every direction v."""
        return 0.0

    def covariance(self) -> Tensor:
        self.fold()
        B = self._kept.directions
        scatter = B.T @ B
        scatter.diagonal().add_(self.added)
        return scatter / self.count

    def total(self) -> Total:
        self.fold()
        return Total(self._kept.energy / self.count, None)

    def spectrum(self, k: int | None) -> Spectrum:
        self.fold()
        k = self.rank if k is None else k
        B = self._kept.directions[:k]
        sizes = torch.linalg.vector_norm(B, dim=1)
        known = sizes > 0
        vectors = torch.linalg.qr((B[known] / sizes[known, None]).T).Q.T if bool(known.any()) else B[:0]
        values = sizes.square()
        values = torch.cat([values, values.new_zeros(k - len(values))]) + self.added
        values, order = values.sort(
            descending=True, stable=True
        )  # lengths that differ by rounding only may be out of order
        return Spectrum(values / self.count, fix_signs(complete(vectors, k)[order]))

    # ---- files and copies ----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        self.fold()
        kept = self._kept
        return {
            "count": torch.tensor([kept.rows], dtype=torch.int64, device="cpu"),
            "mean": kept.mean,
            "directions": kept.directions,
            "energy": torch.tensor([kept.energy, kept.shrunk], dtype=torch.float64, device="cpu"),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        energy, shrunk = tensors["energy"].tolist()
        self._kept = Kept(int(tensors["count"]), tensors["mean"], tensors["directions"], energy, shrunk)


def by_gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute, from the Gram matrix of the rows (n, dim) in float64, what makes the rows orthogonal.

    Returns:
        Σ² of the rows in descending order, and the rotation (n, n) that makes them orthogonal.
    """
    wide = rows.double()
    values, turn = torch.linalg.eigh(wide @ wide.T)
    return values.flip(0).clamp_min(0), turn.T.flip(0)
