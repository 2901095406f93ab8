"""A state that leaves its place: for a file, for other processes, for another device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import torch

from .._integers import integer
from .._native import device_named
from . import file
from .distributed import all_reduce
from .on_device import moved
from .state import State


class Transport:
    """The methods of a StreamingCovariance that save, load, share and move it."""

    if TYPE_CHECKING:
        dim: Any
        rank: Any
        count: Any
        center: Any
        method: Any
        _state: State
        _dtype: Any
        _lock: Any
        _precision: Any
        _like: Any
        _of: Any

        def __init__(self, dim: Any, rank: Any, *, method: Any, center: Any, dtype: Any) -> None: ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, in one step that leaves either the old file or the new one.

        The format is safetensors with a versioned JSON header. The file holds sums over rows and no rows, so it can be
        shared without the text they came from; but the sums of very few rows (see `count`) reveal the rows. Saving
        makes waiting rows join.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.

        Example:
            >>> state = scalpel.StreamingCovariance(dim=2).update(torch.eye(2))
            >>> state.save("state.safetensors")
            >>> scalpel.StreamingCovariance.load("state.safetensors").count
            2
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
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a state that `save` wrote, bit for bit.

        The state is on the CPU, wherever it was before; `to` moves it.

        Args:
            path: The file to read.

        Returns:
            The state.

        Raises:
            ValueError: If the file is truncated, damaged or not a covariance state.
            FileNotFoundError: If the file does not exist.

        Example:
            >>> scalpel.StreamingCovariance(dim=2).update(torch.eye(2)).save("state.safetensors")
            >>> scalpel.StreamingCovariance.load("state.safetensors")
            StreamingCovariance(dim=2, count=2, center=True)
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
            file.check_tensors(tensors, state._state.tensors(), integer(header["count"], "count"), state.dim)
            state._state.restore(tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a valid covariance state: {error}") from error
        return state

    def all_reduce(self, group: Any = None) -> Self:
        """Merge the states of all processes of a torch.distributed group, in the order of their ranks.

        Every process has to call it, and every process ends with the same bits. The bits depend on the number of
        processes; they are within 1e-10 of those of one process that saw all rows (exact states, float64 rows).

        Args:
            group: The process group; None means the default one.

        Returns:
            This state, which now holds the rows of all processes.

        Raises:
            RuntimeError: If torch.distributed is not initialized.
            ValueError: If the processes' states differ in dim, center, rank or method.

        Example:
            >>> import os, tempfile, torch.distributed as dist
            >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
            >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> scalpel.StreamingCovariance(dim=2).update(torch.eye(2)).all_reduce().count
            2
            >>> dist.destroy_process_group()
        """
        with self._lock:
            self._state = all_reduce(self._state, group)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Copy an exact state to another device, where further rows will be.

        The values are copied bit for bit. Waiting rows join first.

        Args:
            device: The device, as a torch.device or a name such as "cuda".

        Returns:
            The copy, or this state if it is on that device already.

        Raises:
            ValueError: If the state is a sketch, or the device does not exist or has no ops.

        Example:
            >>> state = scalpel.StreamingCovariance(dim=2)
            >>> state.to("cpu") is state
            True
        """
        place = device_named(device)
        with self._lock:
            if place == self._state.device:
                return self
            if self.rank is not None:
                raise ValueError(f"a sketch can only be on the CPU; an exact state (rank=None) can be on {device}")
            copy = self._of(*self._like())
            copy._state = moved(self._state, place, self._precision)
        return copy
