"""Streaming covariance: a state that can be updated, merged, subtracted, saved, resumed and read at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from .._integers import integer
from .comparisons import Comparisons
from .eigen import Eigen, fix_signs
from .on_device import Precision, exact_on, moved
from .rows import rows_of
from .scikit_names import ScikitNames
from .sketches.frequent_directions import FrequentDirections
from .sketches.sketch import Sketch
from .sketches.tracker import Tracker
from .state import State
from .summaries import Summaries
from .transport import Transport

__all__ = ["Eigen", "StreamingCovariance"]

Method = Literal["tracker", "frequent_directions"]
_SKETCHES = {"tracker": Tracker, "frequent_directions": FrequentDirections}


class StreamingCovariance(Summaries, Comparisons, Transport, ScikitNames):
    """Accumulate the mean and covariance of rows that arrive in batches.

    **The exact state.** Rows wait until 1024 have arrived (before the first block: as many as there are columns) and
    then join as a block. Each block is centered by its own mean and joined by the pairwise rule of Chan, Golub &
    LeVeque 1979 and Pébay 2008 (SAND2008-6212), so means that are large compared with the deviations cost no accuracy.
    Products of float64 rows are computed in float64. Products of narrower rows are computed in float32 and accumulated
    in float64 every 128 rows; their error is a few 1e-7 of the largest entry, and falls with the number of rows. The
    bits depend neither on the number of threads nor on how rows of one dtype were divided into updates. They do depend
    on the CPU target, and on when the state was read, merged or saved, because that makes waiting rows join; such
    differences are at the level of rounding (1e-12 relative for float64 rows with means up to a thousand deviations).
    Merging is associative to the same precision. The bits of a sketch do depend on how rows were divided into updates.

    **On a GPU.** An exact state lives where its first rows are. If they are on a CUDA device, the state and its results
    stay there; a numpy array is on the CPU. No rows wait there, each update is a block, and the bits depend on how rows
    were divided into updates. Products of narrower rows are computed on tensor cores from three bfloat16 parts,
    accumulated in float32, with no larger error than above. With precision="fast" only one part is used, which takes a
    sixth of the products: each deviation is rounded to 8 bits, which changes an entry Σᵢⱼ by at most 2⁻⁸ √(Σᵢᵢ Σⱼⱼ),
    and by far less over many different rows.

    Calls from several threads are safe; they run one after the other.

    Args:
        dim: The width of a row.
        rank: None keeps every direction exactly, in dim² float64 numbers. An integer makes a sketch of that many
            directions in 4·rank·dim numbers; the mean, the total variance and the count stay exact.
        method: How a sketch is computed. "tracker" follows the leading directions by block power iteration and has the
            smaller error in practice: use it for activations and gradients. "frequent_directions" has an error bound
            that holds for any rows in any order: use it where rows may be adversarial or the error itself is a result.
            It needs about twice the rank to capture the same variance. The classes Tracker and FrequentDirections give
            algorithm, source and bound.
        center: True for the covariance E[(x - E x)(x - E x)ᵀ], False for the second moment E[x xᵀ].
        dtype: The dtype of results, float64 or float32. The state itself is always float64.
        precision: The precision of products on a GPU, "accurate" or "fast". On the CPU all products are accurate.

    Raises:
        ValueError: If dim, rank, method or precision is out of range.
        TypeError: If dim or rank is not an integer, or dtype is neither float32 nor float64.

    Example:
        >>> state = scalpel.StreamingCovariance(dim=2)
        >>> for batch in torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 2.0], [3.0, 2.0]]]):
        ...     state = state.update(batch)
        >>> state
        StreamingCovariance(dim=2, count=4, center=True)
        >>> state.covariance()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
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
        dim = integer(dim, "dim")
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
            rank = integer(rank, "rank")
            if not 1 <= rank <= dim:
                raise ValueError(f"rank is {rank}, but dim is {dim}; allowed: 1 <= rank <= dim, or None for all")
            self._state = _SKETCHES[method](dim, bool(center), rank)
        self._lock = threading.RLock()

    # ---- rows in and out -----------------------------------------------------------------------

    def update(self, x: torch.Tensor | np.ndarray) -> StreamingCovariance:
        """Add rows to the state.

        An interrupt (Ctrl-C) leaves the state with either all of the rows or none; `count` says which.

        Args:
            x: Rows of shape (..., dim) in float16, bfloat16, float32 or float64, as a tensor or a numpy array on the
                CPU. Rows of an exact state may be on one CUDA device instead.

        Returns:
            This state.

        Raises:
            ValueError: If the width differs from dim, the rows are on another device than earlier rows, or a row holds
                a NaN, an infinity or a value beyond 1e150; the message gives its index among the flattened rows. The
                state is then unchanged.
            TypeError: If the dtype is not allowed. The state is then unchanged.

        Example:
            >>> state = scalpel.StreamingCovariance(dim=2).update(np.array([[1.0, 0.0], [3.0, 4.0]]))
            >>> state.count, state.mean
            (2, tensor([2., 2.], dtype=torch.float64))
        """
        rows = rows_of(x, self.dim, cuda=self.rank is None)
        with self._lock:
            self._be_on(rows.device)
            bad = self._state.update(rows)
            if bad >= 0:
                column = int((~(rows[bad].double().abs() <= 1e150)).nonzero()[0])
                raise ValueError(
                    f"row {bad} of x has {rows[bad, column].item()} in column {column}; rows must be finite "
                    "and at most 1e150 in size. The state is unchanged: remove such rows and update again"
                )
        return self

    def merge(self, other: StreamingCovariance) -> StreamingCovariance:
        """Add the rows that another state has seen, in place.

        The two states may be on different devices. This one stays where it is, unless it has no rows.

        Args:
            other: A state of the same dim, center, rank and method.

        Returns:
            This state.

        Raises:
            ValueError: If dim, center, rank or method differ.
            TypeError: If other is not a StreamingCovariance.

        Example:
            >>> first = scalpel.StreamingCovariance(dim=1).update(torch.tensor([[0.0]]))
            >>> second = scalpel.StreamingCovariance(dim=1).update(torch.tensor([[2.0]]))
            >>> first.merge(second).covariance()
            tensor([[1.]], dtype=torch.float64)
        """
        with self._both(other, "merge"):
            if other.count and not self.count:
                self._be_on(other._state.device)
            self._state.merge(moved(other._state, self._state.device))
        return self

    def subtract(self, other: StreamingCovariance) -> StreamingCovariance:
        """Remove the rows that another state has seen, in place.

        These rows must be among the rows of this state, but only their number can be checked. Rounding errors are
        relative to the larger state, so little precision is left after almost all rows have been removed.

        Args:
            other: A state of the same dim and center, whose rows this state has seen.

        Returns:
            This state.

        Raises:
            ValueError: If dim or center differ, if other has more rows than this state, or if the state is a sketch.
            TypeError: If other is not a StreamingCovariance.

        Example:
            >>> first = scalpel.StreamingCovariance(dim=1).update(torch.tensor([[0.0], [2.0]]))
            >>> both = scalpel.StreamingCovariance(dim=1).update(torch.tensor([[9.0]])).merge(first)
            >>> both.subtract(first).mean
            tensor([9.], dtype=torch.float64)
        """
        with self._both(other, "subtract"):
            if other.count > self.count:
                raise ValueError(
                    f"other holds {other.count} rows, this state only {self.count}; only rows that were added can be "
                    "subtracted"
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
        """The number of directions that a sketch gives; None for an exact state."""
        return self._state.rank if isinstance(self._state, Sketch) else None

    @property
    def method(self) -> str | None:
        """How the sketch is computed; None for an exact state."""
        return self._state.method

    @property
    def center(self) -> bool:
        """Whether the mean is subtracted."""
        return self._state.center

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results."""
        return self._dtype

    @property
    def count(self) -> int:
        """The number of rows seen so far."""
        return self._state.count

    @property
    def mean(self) -> torch.Tensor:
        """The mean of the rows, (dim,), which uncentered states know too.

        Raises:
            ValueError: If the state has no rows.
        """
        with self._reading() as state:
            return state.mean.to(self._dtype)

    def covariance(self) -> torch.Tensor:
        """Compute the covariance matrix, or the second moment E[x xᵀ] if the state is not centered.

        Returns:
            A tensor of shape (dim, dim): the sums divided by the count. A sketch gives its estimate.

        Raises:
            ValueError: If the state has no rows.

        Example:
            >>> rows = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
            >>> scalpel.StreamingCovariance(dim=2).update(rows).covariance()
            tensor([[1., 2.],
                    [2., 4.]], dtype=torch.float64)
        """
        with self._reading() as state:
            return state.covariance().to(self._dtype)

    # ---- spectrum ------------------------------------------------------------------------------

    def eigh(self, k: int | None = None) -> Eigen:
        """Compute the k largest eigenvalues of the covariance and their eigenvectors.

        All eigenvalues together come from LAPACK in float64. A few of many come from block iteration, which starts from
        the previous answer: each pair satisfies ‖Cv - λv‖ <= 1e-5·λ₁ and <= 1e-2·λ, computed in float64 from what is
        returned. LAPACK takes over where that is not reached, for example for values that are zero up to rounding. The
        error of a value is about the square of its residual divided by the distance to the next value; vectors depend,
        within that residual, on what was computed before. While there are fewer rows than dimensions (and at most
        max(1024, dim) rows), the eigenvectors are computed from the rows themselves.

        Args:
            k: How many pairs to return. None returns all dim of them, or `rank` of a sketch.

        Returns:
            The values (k,) in descending order and the vectors (k, dim), which are orthonormal rows. Values are at
            least 0: negative ones, which only rounding causes, are set to 0. The sign of a vector is chosen so that its
            entry of largest magnitude (the first among equals) is positive.

        Raises:
            ValueError: If k is not in 1 <= k <= dim (k <= rank for a sketch), or the state has no rows.
            TypeError: If k is not an integer.

        Example:
            >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> values, vectors = scalpel.StreamingCovariance(dim=2).update(rows).eigh()
            >>> values
            tensor([4.5000, 0.5000], dtype=torch.float64)
            >>> vectors.abs()
            tensor([[1., 0.],
                    [0., 1.]], dtype=torch.float64)
        """
        k = None if k is None else self._directions(k)
        with self._reading() as state:
            values, vectors = state.spectrum(k)
        return Eigen(values.to(self._dtype), fix_signs(vectors.to(self._dtype)))

    # ---- internals -----------------------------------------------------------------------------

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
        """Put a state without rows on a device, and refuse rows for a state that is elsewhere."""
        if self._state.device == device:
            return
        if self._state.count:
            raise ValueError(
                f"x is on {device}, and the rows so far were on {self._state.device}: one state takes rows from one "
                "device; move x there, or keep a state for each device and merge them"
            )
        self._state = exact_on(device, self.dim, self.center, self._precision)

    def _check_other(self, other: StreamingCovariance, verb: str, same_kind: bool = True) -> None:
        if not isinstance(other, StreamingCovariance):
            raise TypeError(f"cannot {verb} a {type(other).__name__}; pass a StreamingCovariance")
        if other.dim != self.dim:
            raise ValueError(f"other has dim {other.dim}, this state has dim {self.dim}; they must be equal")
        if not same_kind:
            return
        if other.center != self.center:
            raise ValueError(
                f"other has center={other.center}, this state has center={self.center}; centered and "
                "uncentered moments cannot be mixed"
            )
        if (other.rank, other.method) != (self.rank, self.method):
            raise ValueError(f"cannot {verb} {other!r} and {self!r}: rank and method must be equal")

    @contextmanager
    def _both(self, other: StreamingCovariance, verb: str) -> Iterator[None]:
        self._check_other(other, verb)
        # Locks are taken in one order, so that a.merge(b) and b.merge(a) at the same time do not deadlock.
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
