"""The processes that share an analysis, as torchrun starts them; one by default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_PATIENCE = timedelta(days=7)  # for a process that is still at work; one that is gone is noticed at once


@dataclass(frozen=True)
class Job:
    """``rank`` of ``world`` processes."""

    rank: int = 0
    world: int = 1

    @property
    def alone(self) -> bool:
        return self.world == 1

    def folder(self, folder: Path) -> Path:
        """The folder of what only this process writes."""
        return folder if self.alone else folder / f"rank-{self.rank}-of-{self.world}"

    def mine(self, number: int) -> bool:
        """Whether task ``number`` falls to this process."""
        return number % self.world == self.rank

    def gathered(self, results: list[Any]) -> list[Any]:
        """The results of all processes, those of the first rank first; every process gets the same list.

        RuntimeError names the ranks that are gone.
        """
        if self.alone:
            return results
        import torch.distributed as dist

        from ..covariance.distributed import arrive

        arrive()
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, results)
        return [result for part in everyone for result in part]


@contextmanager
def job_of_environment() -> Iterator[Job]:
    """The job that torchrun's variables describe, joined; a job of one where there are none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Job()
        return
    import torch.distributed as dist

    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", timeout=_PATIENCE)  # what is gathered is on the CPU, wherever models are
    try:
        yield Job(dist.get_rank(), dist.get_world_size())
    finally:
        if not joined:
            dist.destroy_process_group()
