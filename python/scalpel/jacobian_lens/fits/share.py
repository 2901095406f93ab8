"""The processes that share the prompts of a fit, as torchrun starts them; by default there is only one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .sums import Sums, relative_errors

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """One of ``world`` processes: number ``rank`` takes the prompts rank, rank + world, and so on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_job(cls) -> Share:
        """The share of this process in a torch.distributed job.

        Raises:
            RuntimeError: There is no such job.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "shard=True needs a torch.distributed job: start the program with torchrun, and call "
                "torch.distributed.init_process_group() in it before fit"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def folder(self, folder: Path) -> Path:
        """The folder to which only this process writes."""
        return folder if self.world == 1 else folder / f"rank-{self.rank}-of-{self.world}"

    def mine(self, number: int) -> bool:
        """Whether the prompt ``number`` falls to this process."""
        return number % self.world == self.rank

    def rounds(self, read: int) -> int:
        """How many of its prompts this process has done when it has read the first ``read``."""
        return (read + self.world - 1 - self.rank) // self.world

    def gathered(self, value: Any) -> list[Any]:
        """The values that all processes give, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def errors(self, sums: Sums | None) -> list[float]:
        """The relative errors of the mean over the prompts of all processes; no layer where no prompt was done."""
        if self.world == 1:
            return [] if sums is None else list(sums.errors().values())
        parts = self.gathered(None if sums is None else (sums.n, sums.norms.sum(0), sums.layers, sums.width))
        known = [part for part in parts if part is not None]
        if not known:
            return []
        totals = self._totals(sums, known[0][2], known[0][3])
        squares = np.array([float(np.vdot(total, total)) for total in totals])
        norms = np.sum([norms for _, norms, _, _ in known], axis=0)
        return relative_errors(sum(n for n, _, _, _ in known), norms, squares)

    def merged(self, sums: Sums | None) -> Sums | None:
        """The sums over the prompts of all processes, in memory, with the same bits as those of a single process."""
        if self.world == 1:
            return sums
        facts = self.gathered(
            None if sums is None else (sums.numbers, sums.norms, sums.probed, sums.read, sums.layers, sums.width)
        )
        known = [fact for fact in facts if fact is not None]
        if not known:
            return None
        layers, width = known[0][4:]
        result = Sums(layers, width, probes=known[0][2].shape[2])
        result.take(
            self._totals(sums, layers, width),
            np.concatenate([fact[0] for fact in known]),
            np.concatenate([fact[1] for fact in known]),
            np.concatenate([fact[2] for fact in known]),
        )
        return result

    def _totals(self, sums: Sums | None, layers: tuple[Any, ...], width: int) -> np.ndarray:
        """The sums of all processes, (layers, width, width); a process without prompts adds zeros."""
        import torch.distributed as dist

        totals = np.zeros((len(layers), width, width))
        where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        for place, layer in enumerate(layers):
            total = torch.from_numpy(totals[place] if sums is None else np.array(sums.total(layer))).to(where)
            dist.all_reduce(total)
            totals[place] = total.cpu().numpy()
        return totals
