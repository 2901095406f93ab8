"""Spectra of activations and gradients over the text, with intervals by leaving one block of it out."""

from __future__ import annotations

import copy
import hashlib
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
from .text import Text

RESIDUAL = r"(\d+\.resid_in|final_resid)(\.grad)?"  # the residual stream before each layer and after the last
BLOCKS = 8  # of the text, one of which is left out at a time
_BATCH = 8  # stretches that go through the model at once
_SHOWN = 32  # leading shares that are kept
_ALL = 1024  # dimensions up to which all eigenvalues are found for each block that is left out
_SHARES = (1, 3, 10)
_TOPS = tuple(f"top_{k}" for k in _SHARES)
_OF = "of.txt"  # in a folder of states: which measurement they are of

Step = Callable[[str, float], None]


class Spectra:
    """What is measured, and where it is kept.

    ``<out>/spectra-….json`` holds the figures once they are finished, and states of blocks are kept until then. The
    states of the whole text are in ``<out>/states``, where ``StreamingCovariance.load`` reads them.
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
    ) -> None:
        self.device = device
        self.text, self.length, self.hooks, self.memory, self.job, self.fresh = text, length, hooks, memory, job, fresh
        self.stretches = min(stretches, len(text.ids) // length)
        self.out = out
        self.pieces = Pieces(out)

    def measure(self, side: str, model: Callable[[], nn.Module], mark: str, step: Step) -> dict[str, Any]:
        """{stream: figures} of one model; ``mark`` tells it from others. Read from disk where it was measured."""
        key = f"{mark} {self.length} {self.stretches} {self.hooks} {self.text.facts['tokens_sha256']} {self.job.world}"
        key += f" {__version__} {torch.__version__}"
        name = f"{side}-{_short(key)}"
        kept, whole = f"spectra-{name}.json", self.out / "states" / side
        if not self.fresh and (figures := self._finished(kept)) is not None and _text(whole / _OF) == name:
            return figures
        folder = self.out / f"blocks-{name}-{_short(self.memory)}"  # memory decides how streams are grouped there
        parts = self._blocks()
        states = []
        for i, part in enumerate(parts):
            step(f"{side}, spectra, block {i + 1} of {len(parts)}", i / len(parts))
            found_there = collect(
                model(),
                part,
                self.hooks,
                self.memory,
                folder=folder / f"{i}",
                fresh=self.fresh,
                shard=not self.job.alone,
                progress=False,
            )
            # All blocks' states are held at once: on the CPU, which has the memory. Read from disk, they are there.
            here = isinstance(found_there, dict)
            states.append({s: state.to("cpu") for s, state in found_there.items()} if here else found_there)
        if self.job.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)  # of another question
            whole.mkdir(parents=True)
        figures = {}
        for stream in states[0]:
            step(f"{side}, spectrum at {stream}", 1.0)
            figures[stream] = self._figures([block[stream] for block in states], whole / f"{stream}.safetensors")
        if self.job.rank == 0:
            self.pieces.write(kept, figures)
            replace_text(whole / _OF, name + "\n")
        self.job.gathered([])  # every process has read its blocks
        if self.job.rank == 0:
            for left in self.out.glob(f"blocks-{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        return figures

    def _finished(self, name: str) -> dict[str, Any] | None:
        """None where nothing was measured, or the file is damaged: then it is measured again."""
        try:
            return self.pieces.read(name)
        except ValueError:
            return None

    def _blocks(self) -> list[list[Tensor]]:
        """The stretches as blocks of batches: neighbours in one block, since they are alike."""
        ids = torch.tensor(self.text.ids[: self.stretches * self.length], dtype=torch.int64, device="cpu")
        rows = ids.reshape(self.stretches, self.length).to(self.device)
        blocks = rows.tensor_split(min(BLOCKS, self.stretches))
        # small enough that every process has some
        return [list(block.split(min(_BATCH, -(-len(block) // self.job.world)))) for block in blocks]

    def _figures(self, blocks: list[StreamingCovariance], path: Path) -> dict[str, Any]:
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
            small = whole.dim <= _ALL
            names = list(measures) if small else ["participation_ratio"]

            def measure(state: StreamingCovariance) -> Tensor:
                if small:
                    return torch.tensor(list(_numbers(state.eigenvalues()).values()), dtype=torch.float64, device="cpu")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # of few rows: a note says so
                    return torch.tensor([state.participation_ratio()], dtype=torch.float64, device="cpu")

            jack = leave_one_out(blocks, measure)
            intervals = {n: (float(jack.low[i]), float(jack.high[i])) for i, n in enumerate(names)}
        for name, value in measures.items():
            low, high = intervals.get(name, (None, None))
            if low is not None and high is not None:  # a t interval knows no bounds
                low, high = (
                    max(low, 0.0 if name in _TOPS else min(1.0, value)),
                    min(high, 1.0 if name in _TOPS else whole.dim),
                )
            figures[name] = {"value": value, "low": low, "high": high}
        return figures


def _numbers(values: Tensor) -> dict[str, float]:
    total = float(values.sum())
    figures = {f"top_{k}": float(values[:k].sum()) / total if total > 0 else 0.0 for k in _SHARES}
    return figures | {
        "effective_rank": effective_rank(values),
        "effective_rank_singular": effective_rank(values, of="singular"),
        "participation_ratio": participation_ratio(float((values / total).square().sum()) if total > 0 else 0.0),
    }


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
