"""Streaming covariance: a state that is updated, merged, taken apart, saved, resumed, asked at any time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from . import _core, _covariance_file
from ._memory import Memory, memory_of
from .ops import _integer

__all__ = ["Eigen", "StreamingCovariance"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Eigen(NamedTuple):
    """Eigenvalues (k,), descending, and their eigenvectors (k, dim), one a row."""

    values: torch.Tensor
    vectors: torch.Tensor


class StreamingCovariance:
    """Mean and covariance of rows that come in batches.

    dim: the width of a row.
    rank: None, every direction, exactly, in dim² float64. (Sketches of fewer directions aren't in this
    version.)
    method: how a sketch would be made; without meaning when rank is None.
    center: True for the covariance E[(x - E x)(x - E x)ᵀ], False for the second moment E[x xᵀ].
    dtype: of what is returned, float64 or float32. The state itself is always float64.

    Batches join by the pairwise rule of Chan, Golub & LeVeque 1979 and Pébay 2008 (SAND2008-6212); see
    csrc/covariance/covariance.h. A batch is centred by its own mean, so means that are large against the
    deviations cost no accuracy. The bits of the state don't depend on the number of threads; they depend on
    how the rows were cut into batches, and on the CPU target, to rounding (1e-12 relative).

    Calls from several threads at once are safe, one after the other.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        method: Literal["tracker", "frequent_directions"] = "tracker",
        center: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._dim = _integer_named("dim", dim)
        if self._dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1")
        if method not in ("tracker", "frequent_directions"):
            raise ValueError(f"method is {method!r}; allowed: 'tracker', 'frequent_directions'")
        if rank is not None:
            _integer_named("rank", rank)
            raise NotImplementedError(
                f"rank is {rank}, but sketches aren't in this version; use rank=None, which is exact and "
                f"takes {self._dim**2 * 8 / 2**20:.1f} MiB at dim {self._dim}, and eigh({rank}) for the "
                "leading directions"
            )
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; allowed: torch.float32, torch.float64")
        self._method = method
        self._center = bool(center)
        self._dtype = dtype
        self._count = torch.zeros(1, dtype=torch.int64)  # the core's to write: see init_covariance.cpp
        self._mean = torch.zeros(self._dim, dtype=torch.float64)
        self._scatter = torch.zeros(self._dim, self._dim, dtype=torch.float64)  # lower triangle only
        self._lock = threading.RLock()

    # ---- rows in and out -----------------------------------------------------------------------

    def update(self, x: torch.Tensor | np.ndarray) -> StreamingCovariance:
        """Adds rows. x: (..., dim), float16, bfloat16, float32 or float64; a CPU tensor or a numpy array.

        Returns self. An interrupt (Ctrl-C) leaves a state with all of the rows or none; count says which. Raises
        ValueError for another width, and for a row with a NaN, an infinity or a value
        beyond 1e150 (its index among the flattened rows is named); TypeError for another dtype. The state is
        unchanged then.
        """
        rows = self._rows(x)
        with self._lock:
            bad = _core.update_moments(*self._state(), self._center, memory_of(rows), torch.get_num_threads())
            if bad >= 0:
                column = int((~(rows[bad].double().abs() <= 1e150)).nonzero()[0])
                raise ValueError(
                    f"row {bad} of x has {rows[bad, column].item()} in column {column}; rows must be finite "
                    "and at most 1e150 in size. The state is unchanged: drop such rows and update again"
                )
        return self

    def merge(self, other: StreamingCovariance) -> StreamingCovariance:
        """Adds the rows behind `other`, in place; returns self.

        Raises ValueError for another dim or centering.
        """
        with self._both(other, "merge"):
            _core.merge_moments(*self._state(), self._center, *other._state(), torch.get_num_threads())
        return self

    def subtract(self, other: StreamingCovariance) -> StreamingCovariance:
        """Takes the rows behind `other` out again, in place; returns self.

        They must be among the rows of this state; only their number can be checked. Rounding is relative to
        the larger state, so what is left of almost all rows has fewer digits.

        Raises ValueError for another dim or centering, or when other has more rows.
        """
        with self._both(other, "subtract"):
            _core.subtract_moments(*self._state(), self._center, *other._state(), torch.get_num_threads())
        return self

    # ---- moments -------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._dim

    @property
    def center(self) -> bool:
        """Whether the mean is taken off."""
        return self._center

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is returned."""
        return self._dtype

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return int(self._count)

    @property
    def mean(self) -> torch.Tensor:
        """The mean of the rows, (dim,); known for uncentered states too.

        Raises ValueError when there are none.
        """
        with self._lock:
            self._need_rows()
            return self._mean.to(self._dtype, copy=True)

    def covariance(self) -> torch.Tensor:
        """(dim, dim), divided by the count: the covariance, or E[x xᵀ] if not center.

        ValueError without rows.
        """
        return self._covariance().to(self._dtype)

    # ---- spectrum ------------------------------------------------------------------------------

    def eigh(self, k: int | None = None) -> Eigen:
        """The k largest eigenvalues of `covariance()` and their eigenvectors; all of them when k is None.

        Returns (values (k,) descending, vectors (k, dim), orthonormal rows). Values are at least 0: rounding
        below it is cut off. Of the two signs of a vector, the one is taken that makes its entry of largest
        magnitude positive (the lowest index among equals). Through LAPACK, in float64.

        Raises ValueError unless 1 <= k <= dim, and without rows.
        """
        k = self._dim if k is None else self._directions(k)
        values, columns = torch.linalg.eigh(self._covariance())
        vectors = columns.T.flip(0)[:k].numpy().copy()
        peaks = np.abs(vectors).argmax(axis=1)
        vectors[vectors[np.arange(k), peaks] < 0] *= -1
        return Eigen(
            values.flip(0)[:k].clamp_min(0).to(self._dtype, copy=True),
            torch.from_numpy(vectors).to(self._dtype),
        )

    def explained_variance_ratio(self, k: int) -> torch.Tensor:
        """(k,): λ_i / Σ_j λ_j of the k largest eigenvalues, each in [0, 1]; zeros if nothing varies.

        Its sum is what the best projection on k directions keeps (Eckart–Young). Raises as `eigh`.
        """
        values = self._eigenvalues()
        total = values.sum()
        ratios = values / total if total > 0 else values
        return ratios[: self._directions(k)].to(self._dtype, copy=True)

    def effective_rank(self, of: Literal["eigen", "singular"] = "eigen") -> float:
        """exp(-Σ p_i ln p_i), in [1, dim]; 0 if nothing varies.

        of="eigen": p_i = λ_i / Σ_j λ_j, the eigenvalues of the covariance.
        of="singular": p_i = √λ_i / Σ_j √λ_j, the singular values of the data matrix, as Roy & Vetterli 2007
        ("The effective rank: a measure of effective dimensionality") define it.
        """
        if of not in ("eigen", "singular"):
            raise ValueError(f"of is {of!r}; allowed: 'eigen', 'singular'")
        values = self._eigenvalues()
        weights = values.sqrt() if of == "singular" else values
        total = weights.sum()
        if total <= 0:
            return 0.0
        p = weights / total
        return math.exp(float(torch.special.entr(p).sum()))

    def participation_ratio(self) -> float:
        """(Σ λ_i)² / Σ λ_i², in [1, dim]; 0 if nothing varies (Gao et al. 2017, "A theory of multineuronal
        dimensionality, dynamics and measurement", eq. 5). Needs no eigenvalues: tr(C)² / ‖C‖²."""
        covariance = self._covariance()
        squares = float(covariance.square().sum())
        return float(covariance.trace()) ** 2 / squares if squares > 0 else 0.0

    def stable_rank(self) -> float:
        """Σ λ_i / λ_1, in [1, dim]; 0 if nothing varies. It is ‖X‖_F² / ‖X‖₂² of the data matrix (Rudelson &
        Vershynin 2007, "Sampling from large matrices", section 1)."""
        values = self._eigenvalues()
        return float(values.sum() / values[0]) if values[0] > 0 else 0.0

    # ---- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all: what was there stays until the new one is on the
        disk.

        The format is safetensors with a versioned JSON header; the rows can't be got back from it.
        """
        with self._lock:
            header = {
                "dim": self._dim,
                "count": self.count,
                "center": self._center,
                "method": self._method,
                "dtype": str(self._dtype).removeprefix("torch."),
            }
            _covariance_file.write(path, header, {"mean": self._mean, "scatter": self._scatter})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamingCovariance:
        """Reads what `save` wrote, to the bit.

        Raises ValueError when the file is truncated, damaged or foreign.
        """
        header, tensors = _covariance_file.read(path)
        try:
            state = cls(
                header["dim"],
                method=header["method"],
                center=header["center"],
                dtype=getattr(torch, header["dtype"]),
            )
            count = _integer_named("count", header["count"])
            if count < 0:
                raise ValueError(f"count is {count}")
            for name, own in (("mean", state._mean), ("scatter", state._scatter)):
                if tensors[name].shape != own.shape or tensors[name].dtype != own.dtype:
                    raise ValueError(f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}")
                if not tensors[name].isfinite().all():
                    raise ValueError(f"{name} isn't finite")
                own.copy_(tensors[name])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is no sound covariance state: {error}") from error
        state._count[0] = count
        return state

    # ---- inside --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"StreamingCovariance(dim={self._dim}, count={self.count}, center={self._center})"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            # copies: copy.copy must not share the tensors, nor another thread write while they are pickled
            return {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in self.__dict__.items()
                if name != "_lock"
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def _rows(self, x: Any) -> torch.Tensor:
        if isinstance(x, np.ndarray):
            if x.dtype.type not in (np.float16, np.float32, np.float64):
                raise TypeError(f"x is {x.dtype}; allowed: float16, float32, float64 (bfloat16 as a tensor)")
            x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), copy=_copy_needed(x)))
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is a {type(x).__name__}; allowed: a torch tensor or a numpy array")
        if x.layout != torch.strided:
            raise TypeError(f"x has layout {x.layout}; allowed: torch.strided (call .to_dense())")
        if x.dtype not in _FLOATS:
            raise TypeError(f"x is {str(x.dtype).removeprefix('torch.')}; allowed: float16, bfloat16, float32, float64")
        if x.device.type != "cpu":
            raise ValueError(f"x is on {x.device}, but this build runs on the CPU only; move it with x.cpu()")
        if x.dim() < 1 or x.shape[-1] != self._dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., {self._dim}), as dim is {self._dim}")
        x = x.detach().resolve_neg().reshape(-1, self._dim)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _state(self) -> tuple[Memory, Memory, Memory]:
        return memory_of(self._count), memory_of(self._mean), memory_of(self._scatter)

    @contextmanager
    def _both(self, other: StreamingCovariance, verb: str) -> Iterator[None]:
        if not isinstance(other, StreamingCovariance):
            raise TypeError(f"can't {verb} a {type(other).__name__}; give a StreamingCovariance")
        if other._dim != self._dim:
            raise ValueError(f"other has dim {other._dim}, this state has dim {self._dim}; they must be equal")
        if other._center != self._center:
            raise ValueError(
                f"other has center={other._center}, this state has center={self._center}; centered and "
                "uncentered moments can't be mixed"
            )
        # In one order for all, so that a.merge(b) and b.merge(a) at once don't wait for each other for ever.
        first, second = sorted((self, other), key=id)
        with first._lock, second._lock:
            yield

    def _need_rows(self) -> None:
        if self.count == 0:
            raise ValueError("this state has no rows yet; update it first")

    def _covariance(self) -> torch.Tensor:
        with self._lock:
            self._need_rows()
            lower = self._scatter / self.count
        return lower.tril() + lower.tril(-1).T

    def _eigenvalues(self) -> torch.Tensor:
        return torch.linalg.eigvalsh(self._covariance()).flip(0).clamp_min(0)

    def _directions(self, k: Any) -> int:
        k = _integer(k)
        if not 1 <= k <= self._dim:
            raise ValueError(f"k is {k}, but dim is {self._dim}; allowed: 1 <= k <= dim")
        return k


def _integer_named(name: str, value: Any) -> int:
    try:
        return _integer(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; it must be an integer") from None


def _copy_needed(x: np.ndarray) -> bool | None:
    """True for arrays that torch can't or won't share; None: only if numpy must."""
    return True if not x.flags.writeable or any(s < 0 or s % x.itemsize for s in x.strides) else None
