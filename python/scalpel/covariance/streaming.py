"""Streaming covariance: a state that is updated, merged, taken apart, saved, resumed, asked at any time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .._native import device_named
from . import file, measures
from .distributed import all_reduce
from .eigen import fix_signs
from .frequent_directions import FrequentDirections
from .on_device import Precision, exact_on, moved
from .rows import integer, integer_named, rows_of
from .scikit_names import ScikitNames
from .sketch import Sketch
from .state import State
from .summaries import Summaries
from .tracker import Tracker

__all__ = ["Eigen", "StreamingCovariance"]

Method = Literal["tracker", "frequent_directions"]
_SKETCHES = {"tracker": Tracker, "frequent_directions": FrequentDirections}


class Eigen(NamedTuple):
    """Eigenvalues (k,), descending, and their eigenvectors (k, dim), one a row."""

    values: torch.Tensor
    vectors: torch.Tensor


class StreamingCovariance(Summaries, ScikitNames):
    """Mean and covariance of rows that come in batches.

    dim: the width of a row.
    rank: None, every direction, exactly, in dim² float64. An int: a sketch of so many directions in 4·rank·dim
    numbers; the mean, the total variance and the count stay exact.
    method: of a sketch. "tracker" follows the leading directions by block power iteration: the smaller error in
    practice, take it for activations and gradients. "frequent_directions" has a bound that holds for any rows in any
    order: take it where rows may be chosen against it, or where the error itself is a result; it needs about twice
    the rank for the variance that the tracker captures. See their classes for algorithm, source and bound.
    center: True for the covariance E[(x - E x)(x - E x)ᵀ], False for the second moment E[x xᵀ].
    dtype: of what is returned, float64 or float32. The state itself is always float64.
    precision: of products on a GPU, "accurate" or "fast"; see there. On the CPU all are accurate.

    The exact state. Rows wait until 1024 are there (at first, until there are as many as columns), and join as blocks,
    each centered by its own mean, by the pairwise rule of Chan, Golub & LeVeque 1979 and Pébay 2008 (SAND2008-6212), so
    that means that are large against the deviations cost no accuracy. Products are of float64 rows float64, of narrower
    rows float32, gathered in float64 every 128 rows: an error of a few 1e-7 of the largest entry, less the more rows
    there are. The bits depend neither on the number of threads nor on how rows of one dtype were cut into updates;
    they depend on the CPU target, and on when the state was read, merged or saved, which makes the waiting rows join:
    to rounding (1e-12 relative for float64 rows with means up to a thousand deviations). Merging is associative to
    rounding, too. A sketch's bits depend on how rows were cut into updates.

    On a GPU. An exact state is where its first rows are: of rows on a CUDA device it stays there, and so does what it
    returns; a numpy array is on the CPU. Nothing waits there, each update is a block, so bits depend on how rows were
    cut into updates. Products of narrower rows are then of three bfloat16 parts, in float32, on tensor cores, with no
    larger an error than above; with precision="fast" of one, a sixth of the products: each deviation is rounded to 8
    bits, which moves an entry Σᵢⱼ by at most 2⁻⁸ √(Σᵢᵢ Σⱼⱼ), and by far less over many different rows.

    Calls from several threads at once are safe, one after the other.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        method: Method = "tracker",
        center: bool = True,
        dtype: torch.dtype = torch.float64,
        precision: Precision = "accurate",
    ) -> None:
        dim = integer_named("dim", dim)
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        if method not in _SKETCHES:
            raise ValueError(f"method is {method!r}; allowed: 'tracker', 'frequent_directions'")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; allowed: torch.float32, torch.float64")
        if precision not in ("accurate", "fast"):
            raise ValueError(f"precision is {precision!r}; allowed: 'accurate', 'fast'")
        self._dtype, self._precision = dtype, precision
        self._state: State
        if rank is None:
            self._state = exact_on(torch.device("cpu"), dim, bool(center), precision)
        else:
            rank = integer_named("rank", rank)
            if not 1 <= rank <= dim:
                raise ValueError(f"rank is {rank}, but dim is {dim}; allowed: 1 <= rank <= dim, or None for all")
            self._state = _SKETCHES[method](dim, bool(center), rank)
        self._lock = threading.RLock()

    # ---- rows in and out -----------------------------------------------------------------------

    def update(self, x: torch.Tensor | np.ndarray) -> StreamingCovariance:
        """Adds rows. x: (..., dim), float16, bfloat16, float32 or float64; a tensor or a numpy array. Rows are on the
        CPU; those of an exact state may be on one CUDA device instead.

        Returns self. An interrupt (Ctrl-C) leaves a state with all of the rows or none; count says which. Raises
        ValueError for another width, for rows on another device than those before, and for a row with a NaN, an
        infinity or a value beyond 1e150 (its index among the flattened rows is named); TypeError for another dtype.
        The state is unchanged then.
        """
        rows = rows_of(x, self.dim, cuda=self.rank is None)
        with self._lock:
            self._be_on(rows.device)
            bad = self._state.update(rows)
            if bad >= 0:
                column = int((~(rows[bad].double().abs() <= 1e150)).nonzero()[0])
                raise ValueError(
                    f"row {bad} of x has {rows[bad, column].item()} in column {column}; rows must be finite "
                    "and at most 1e150 in size. The state is unchanged: drop such rows and update again"
                )
        return self

    def merge(self, other: StreamingCovariance) -> StreamingCovariance:
        """Adds the rows behind `other`, in place; returns self. States may be on two devices: this one stays where it
        is, unless it has no rows.

        Raises ValueError for another dim, centering or kind of state.
        """
        with self._both(other, "merge"):
            if other.count and not self.count:
                self._be_on(other._state.device)
            self._state.merge(moved(other._state, self._state.device))
        return self

    def subtract(self, other: StreamingCovariance) -> StreamingCovariance:
        """Takes the rows behind `other` out again, in place; returns self.

        They must be among the rows of this state; only their number can be checked. Rounding is relative to
        the larger state, so what is left of almost all rows has fewer digits.

        Raises ValueError for another dim or centering, when other has more rows, and for a sketch.
        """
        with self._both(other, "subtract"):
            if other.count > self.count:
                raise ValueError(
                    f"other holds {other.count} rows, this state only {self.count}; only rows that were added can be "
                    "taken out"
                )
            self._state.subtract(moved(other._state, self._state.device))
        return self

    # ---- moments -------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._state.dim

    @property
    def rank(self) -> int | None:
        """How many directions a sketch gives; None of an exact state."""
        return self._state.rank if isinstance(self._state, Sketch) else None

    @property
    def method(self) -> str | None:
        """The sketch's; None of an exact state."""
        return self._state.method

    @property
    def center(self) -> bool:
        """Whether the mean is taken off."""
        return self._state.center

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is returned."""
        return self._dtype

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return self._state.count

    @property
    def mean(self) -> torch.Tensor:
        """The mean of the rows, (dim,); known for uncentered states too.

        Raises ValueError when there are none.
        """
        with self._reading() as state:
            return state.mean.to(self._dtype)

    def covariance(self) -> torch.Tensor:
        """(dim, dim), divided by the count: the covariance, or E[x xᵀ] if not center. Of a sketch: its estimate.

        ValueError without rows.
        """
        with self._reading() as state:
            return state.covariance().to(self._dtype)

    # ---- spectrum ------------------------------------------------------------------------------

    def eigh(self, k: int | None = None) -> Eigen:
        """The k largest eigenvalues of `covariance()` and their eigenvectors; None: all of them, of a sketch `rank`.

        Returns (values (k,) descending, vectors (k, dim), orthonormal rows). Values are at least 0: rounding
        below it is cut off. Of the two signs of a vector, the one is taken that makes its entry of largest
        magnitude positive (the lowest index among equals).

        All of them go through LAPACK in float64. Few of many come from block iteration that begins with the answer
        before: each has ‖Cv - λv‖ <= 1e-5·λ₁ and <= 1e-2·λ, computed in float64 from what is returned, and LAPACK
        takes over where that isn't met (values that are zero to rounding among them). The error of a value is about
        the square of its residual over its distance to the next; vectors depend, within that residual, on what was
        asked before. While there are fewer rows than dimensions (and at most max(1024, dim) of them), from the rows.

        Raises ValueError unless 1 <= k <= dim (k <= rank), and without rows.
        """
        k = None if k is None else self._directions(k)
        with self._reading() as state:
            values, vectors = state.spectrum(k)
        return Eigen(values.to(self._dtype), fix_signs(vectors.to(self._dtype)))

    # ---- two states ----------------------------------------------------------------------------

    def principal_angles(self, other: StreamingCovariance, k: int) -> torch.Tensor:
        """(k,) angles in radians, ascending, between the spans of the k leading eigenvectors of either state (Björck &
        Golub 1973). Two spans of k directions drawn at random in dim >> k have angles near π/2.

        Raises as `eigh`, and ValueError for another dim.
        """
        self._check_other(other, "compare with", same_kind=False)
        k = self._directions(k)
        with self._reading() as mine, other._reading() as theirs:
            found = theirs.spectrum(k).vectors.to(mine.device)
            return measures.principal_angles(mine.spectrum(k).vectors, found).to(self._dtype)

    def contrast(self, other: StreamingCovariance, k: int, ridge: float = 1e-6) -> Eigen:
        """The k directions in which this state varies most against `other`: A v = λ (B + ε·I) v, with A and B the two
        covariances and ε = ridge · tr(B) / dim, which keeps directions that `other` lacks finite.

        values (k,): descending, how many times as much variance this state has there. vectors (k, dim): v, of length 1,
        signs as `eigh`'s; they are not orthogonal. (Fukunaga 1990, "Introduction to statistical pattern recognition",
        section 2.3; with centered states the contrastive relative of PCA.)

        ValueError for another dim or centering, a ridge that isn't positive, or without rows; memory of dim².
        """
        self._check_other(other, "contrast with", same_kind=False)
        if self.center != other.center:
            raise ValueError(f"other has center={other.center}, this state has center={self.center}")
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}; it must be above 0")
        k = self._directions(k)
        with self._reading() as mine, other._reading() as theirs:
            against = theirs.covariance().to(mine.device)
            values, vectors = measures.contrast(mine.covariance(), against, k, ridge)
        return Eigen(values.to(self._dtype), fix_signs(vectors.to(self._dtype)))

    # ---- files and other processes -------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all: what was there stays until the new one is on the
        disk.

        The format is safetensors with a versioned JSON header. No row is in it, only sums over rows, so it can be
        shared without the text that they came from. Of very few rows (`count` says how many) the sums tell the rows.
        Saving lets waiting rows join.
        """
        with self._lock:
            header = {
                "dim": self.dim,
                "rank": self.rank,
                "count": self.count,
                "center": self.center,
                "method": self.method,
                "dtype": str(self._dtype).removeprefix("torch."),
            }
            file.write(path, header, self._state.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamingCovariance:
        """Reads what `save` wrote, to the bit. The state is on the CPU, wherever it was before; `to` moves it.

        Raises ValueError when the file is truncated, damaged or foreign.
        """
        header, tensors = file.read(path)
        try:
            file.check_header(header, tensors)
            state = cls(
                header["dim"],
                rank=header["rank"],
                method=header["method"] or "tracker",
                center=header["center"],
                dtype=getattr(torch, header["dtype"]),
            )
            file.check_tensors(tensors, state._state.tensors(), integer_named("count", header["count"]), state.dim)
            state._state.restore(tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is no sound covariance state: {error}") from error
        return state

    def all_reduce(self, group: Any = None) -> StreamingCovariance:
        """Merges the states of all processes of a torch.distributed group, in the order of their ranks, in place;
        every process ends with the same bits. Returns self.

        group: None for the default one. Every process has to call it, with a state of equal dim, centering and kind.
        The same bits every time for one number of processes; within 1e-10 of one process that saw all rows (exact
        states, float64 rows). RuntimeError where torch.distributed isn't set up, ValueError where the states differ.
        """
        with self._lock:
            self._state = all_reduce(self._state, group)
        return self

    def to(self, device: torch.device | str) -> StreamingCovariance:
        """A copy of an exact state on another device, to go on with rows of that; the state itself where it is there.

        The same bits; waiting rows join. Raises ValueError for a sketch, and for a device that isn't there or that no
        op runs on.
        """
        place = device_named(device)
        with self._lock:
            if place == self._state.device:
                return self
            if self.rank is not None:
                raise ValueError(f"a sketch is on the CPU only; only exact states (rank=None) can be on {device}")
            copy = self._of(*self._like())
            copy._state = moved(self._state, place, self._precision)
        return copy

    # ---- inside --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        kind = "" if self.rank is None else f", rank={self.rank}, method={self.method!r}"
        return f"StreamingCovariance(dim={self.dim}{kind}, count={self.count}, center={self.center})"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._state.fold()
            tensors = {k: v.clone() for k, v in self._state.tensors().items()}
            return {"like": self._like(), "tensors": tensors, "device": self._state.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(self._of(*state["like"]).__dict__)
        self._be_on(state.get("device", self._state.device))
        self._state.restore(state["tensors"])

    def _like(self) -> tuple[int, int | None, Any, bool, torch.dtype, Precision]:
        return self.dim, self.rank, self.method or "tracker", self.center, self._dtype, self._precision

    @staticmethod
    def _of(*like: Any) -> StreamingCovariance:
        return StreamingCovariance(*like)

    def _be_on(self, device: torch.device) -> None:
        """Where a state without rows goes, and others have to be."""
        if self._state.device == device:
            return
        if self._state.count:
            raise ValueError(
                f"x is on {device}, and the rows so far were on {self._state.device}: one state takes rows of one "
                "device; move x there, or keep a state for each device and merge them"
            )
        self._state = exact_on(device, self.dim, self.center, self._precision)

    def _check_other(self, other: StreamingCovariance, verb: str, same_kind: bool = True) -> None:
        if not isinstance(other, StreamingCovariance):
            raise TypeError(f"can't {verb} a {type(other).__name__}; give a StreamingCovariance")
        if other.dim != self.dim:
            raise ValueError(f"other has dim {other.dim}, this state has dim {self.dim}; they must be equal")
        if not same_kind:
            return
        if other.center != self.center:
            raise ValueError(
                f"other has center={other.center}, this state has center={self.center}; centered and "
                "uncentered moments can't be mixed"
            )
        if (other.rank, other.method) != (self.rank, self.method):
            raise ValueError(f"can't {verb} {other!r} and {self!r}: rank and method must be equal")

    @contextmanager
    def _both(self, other: StreamingCovariance, verb: str) -> Iterator[None]:
        self._check_other(other, verb)
        # In one order for all, so that a.merge(b) and b.merge(a) at once don't wait for each other for ever.
        first, second = sorted((self, other), key=id)
        with first._lock, second._lock:
            yield

    @contextmanager
    def _reading(self) -> Iterator[State]:
        with self._lock:
            if self.count == 0:
                raise ValueError("this state has no rows yet; update it first")
            yield self._state

    def _directions(self, k: Any) -> int:
        k = integer(k)
        most, name = (self.dim, "dim") if self.rank is None else (self.rank, "rank")
        if not 1 <= k <= most:
            raise ValueError(f"k is {k}, but {name} is {most}; allowed: 1 <= k <= {name}")
        return k
