"""Spectra of activations and gradients over a text, with jackknife intervals that leave out one block at a time."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import replace_text
from .._info import __version__
from .._resume import Pieces
from ..covariance import StreamingCovariance, leave_one_out
from ..covariance.measures import effective_rank, participation_ratio
from ..streams import collect
from .job import Job
from .pace import Clock, Progress, Stopped
from .text import Text

RESIDUAL = r"(\d+\.resid_in|final_resid)(\.grad)?"  # the residual stream before each layer and after the last
BLOCKS = 8  # the parts of the text, one of which is left out at a time
_BATCH = 8  # stretches of text that go through the model at once
_SHOWN = 32  # leading eigenvalues whose shares are kept
_ALL = 1024  # dimensions up to which all eigenvalues are computed for each block that is left out
_SHARES = (1, 3, 10)
_TOPS = tuple(f"top_{k}" for k in _SHARES)
_SHARE = 0.6  # the share of the time, roughly, that the model's passes over the text take
_OF = "of.txt"  # in a folder of states, the file that names the measurement they belong to


class Spectra:
    """The measurement of spectra at hooks, whose results are kept in the folder ``out``.

    ``<out>/spectra-….json`` holds the figures once they are finished. The states of blocks are kept until then. The
    states of the whole text are in ``<out>/states``, from where ``StreamingCovariance.load`` reads them.
    """

    def __init__(
        self,
        out: Path,
        text: Text,
        length: int,
        stretches: int,
        hooks: str,
        memory: str,
        job: Job,
        fresh: bool,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self.device = device
        self.clock = clock
        self.text, self.length, self.hooks, self.memory, self.job, self.fresh = text, length, hooks, memory, job, fresh
        self.stretches = min(stretches, len(text.chunks))
        self.out = out
        self.pieces = Pieces(out)

    def measure(self, side: str, model: Callable[[], nn.Module], mark: str, step: Progress) -> dict[str, Any]:
        """Measure one model, or read its figures from disk where they are kept.

        Args:
            side: "trained" or "untrained".
            model: Returns the model; not called where the figures are on disk.
            mark: A text that differs between different models.
            step: Called as ``step(what, done)`` before each block and each spectrum.

        Returns:
            The figures by stream.

        Raises:
            Stopped: Time is over. Finished blocks are kept.
        """
        key = f"{mark} {self.length} {self.stretches} {self.hooks} {self.text.facts['tokens_sha256']} {self.job.world}"
        key += f" {__version__} {torch.__version__}"
        if self.text.key:
            key += f" {json.dumps(self.text.key, sort_keys=True)}"
        name = f"{side}-{_short(key)}"
        file, whole = f"spectra-{name}.json", self.out / "states" / side
        if not self.fresh and (figures := self._finished(file)) is not None and _text(whole / _OF) == name:
            return figures
        # memory decides how the streams in the folder are grouped
        blocks_folder = self.out / f"blocks-{name}-{_short(self.memory)}"
        blocks = self._blocks()
        states = []
        for i, batches in enumerate(blocks):
            step(f"block {i + 1} of {len(blocks)}", _SHARE * i / len(blocks))
            if any(self.job.gathered([self.clock.over])):  # together, since processes meet in collect
                raise Stopped
            began = not (blocks_folder / f"{i}").is_dir()
            collected = collect(
                model(),
                batches,
                self.hooks,
                self.memory,
                rows=self.text.rows,
                folder=blocks_folder / f"{i}",
                fresh=self.fresh,
                shard=not self.job.alone,
                progress=False,
            )
            if began:
                self.clock.achieved()
            # The states of all blocks are held at once, so they go to the CPU, which has more memory. States that
            # collect leaves on disk are read to the CPU anyway.
            in_memory = isinstance(collected, dict)
            states.append({stream: state.to("cpu") for stream, state in collected.items()} if in_memory else collected)
        if self.job.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)  # states of another measurement
            whole.mkdir(parents=True)
        figures = {}
        for i, stream in enumerate(states[0]):
            step(f"spectrum at {stream}", _SHARE + (1 - _SHARE) * i / len(states[0]))
            figures[stream] = self._figures([block[stream] for block in states], whole / f"{stream}.safetensors")
        if self.job.rank == 0:
            self.pieces.write(file, figures)
            replace_text(whole / _OF, name + "\n")
        self.job.gathered([])  # every process has read its blocks
        if self.job.rank == 0:
            for old_folder in self.out.glob(f"blocks-{name}-*"):
                shutil.rmtree(old_folder, ignore_errors=True)
        return figures

    def _finished(self, name: str) -> dict[str, Any] | None:
        """Return the figures on disk; None, so that they are measured again, where the file is missing or damaged."""
        try:
            return self.pieces.read(name)
        except ValueError:
            return None

    def _blocks(self) -> list[list[Tensor]]:
        """Divide the stretches into blocks, and these into batches.

        Neighbours are in the same block, since neighbouring stretches may be alike.
        """
        stretches = [self.text.chunk(i, self.length) for i in range(self.stretches)]
        blocks = torch.cat(stretches).to(self.device).tensor_split(min(BLOCKS, self.stretches))
        # batches are small enough that every process has at least one
        return [list(block.split(min(_BATCH, -(-len(block) // self.job.world)))) for block in blocks]

    def _figures(self, blocks: list[StreamingCovariance], path: Path) -> dict[str, Any]:
        """Compute the figures of one stream from the states of all blocks, and save the merged state at ``path``."""
        whole = copy.deepcopy(blocks[0])
        for block in blocks[1:]:
            whole.merge(block)
        if self.job.rank == 0:
            whole.save(path)
        values = whole.eigenvalues()
        total = float(values.sum())
        figures: dict[str, Any] = {
            "count": whole.count,
            "dim": whole.dim,
            "variance": total,
            "mean_norm": float(torch.linalg.vector_norm(whole.mean)),
            "shares": (values[:_SHOWN] / total).tolist() if total > 0 else [],
        }
        measures = _numbers(values)
        intervals: dict[str, tuple[float, float]] = {}
        if len(blocks) > 1:
            all_eigenvalues = whole.dim <= _ALL
            names = list(measures) if all_eigenvalues else ["participation_ratio"]

            def measure(state: StreamingCovariance) -> Tensor:
                if all_eigenvalues:
                    return torch.tensor(list(_numbers(state.eigenvalues()).values()), dtype=torch.float64, device="cpu")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a note tells of too few rows instead
                    return torch.tensor([state.participation_ratio()], dtype=torch.float64, device="cpu")

            jackknife = leave_one_out(blocks, measure)
            intervals = {which: (float(jackknife.low[i]), float(jackknife.high[i])) for i, which in enumerate(names)}
        for name, value in measures.items():
            low, high = intervals.get(name, (None, None))
            if low is not None and high is not None:  # a t interval may exceed the range of the measure
                low, high = (
                    max(low, 0.0 if name in _TOPS else min(1.0, value)),
                    min(high, 1.0 if name in _TOPS else whole.dim),
                )
            figures[name] = {"value": value, "low": low, "high": high}
        return figures


def _numbers(values: Tensor) -> dict[str, float]:
    """The measures of a spectrum, given all its eigenvalues in descending order."""
    total = float(values.sum())
    figures = {f"top_{k}": float(values[:k].sum()) / total if total > 0 else 0.0 for k in _SHARES}
    return figures | {
        "effective_rank": effective_rank(values),
        "effective_rank_singular": effective_rank(values, of="singular"),
        "participation_ratio": participation_ratio(float((values / total).square().sum()) if total > 0 else 0.0),
    }


def _short(key: str) -> str:
    """A short hash of ``key`` for names of files."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _text(path: Path) -> str:
    """The text of a file; empty where there is none."""
    return path.read_text().strip() if path.is_file() else ""
