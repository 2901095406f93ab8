"""The processes that share an analysis, as torchrun starts them; by default there is only one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

# how long to wait for a process that is still at work; one that has ended is noticed at once
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Job:
    """One of the ``world`` processes that share an analysis: the one with number ``rank``."""

    rank: int = 0
    world: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world == 1

    def folder(self, folder: Path) -> Path:
        """Return the folder, inside ``folder``, to which only this process writes; ``folder`` where it is alone."""
        return folder if self.alone else folder / f"rank-{self.rank}-of-{self.world}"

    def mine(self, number: int) -> bool:
        """Whether task ``number`` falls to this process."""
        return number % self.world == self.rank

    def gathered(self, results: list[Any]) -> list[Any]:
        """Gather the results of all processes in the order of their ranks; every process gets the same list.

        Raises:
            RuntimeError: Processes have ended; the message names their ranks.
        """
        if self.alone:
            return results
        import torch.distributed as dist

        from ..covariance.distributed import arrive

        arrive()
        results_by_rank: list[Any] = [None] * self.world
        dist.all_gather_object(results_by_rank, results)
        return [result for results_of_one in results_by_rank for result in results_of_one]


@contextmanager
def job_of_environment() -> Iterator[Job]:
    """Join the job that torchrun's environment variables describe; without them, the job is this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Job()
        return
    import torch.distributed as dist

    was_joined = dist.is_initialized()
    if not was_joined:
        dist.init_process_group("gloo", timeout=_PATIENCE)  # results are on the CPU, whatever the device of the models
    try:
        yield Job(dist.get_rank(), dist.get_world_size())
    finally:
        if not was_joined:
            dist.destroy_process_group()
