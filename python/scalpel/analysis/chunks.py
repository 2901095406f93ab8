"""The chunks of an analysis in order: each is measured and kept, and they get shorter where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..experiments.result import plain
from .job import Job
from .measure import Figures, measure
from .source import Source, ran_out
from .store import Store
from .streamed import measure_streamed
from .text import Text

LEAST = 8  # tokens that memory may shrink a chunk to
_CUT_OFF = 2  # runs cut off at one chunk after which memory is taken to be the reason

Progress = Callable[[str, float], None]
Record = dict[str, Any]


def measure_chunks(
    task: Task, store: Store, text: Text, length: int, count: int, job: Job, report: Progress
) -> tuple[list[Record], list[dict[str, int]]]:
    """Measure this process's chunks.

    Gives their records as they are on disk, so that a resumed analysis is the same to the bit, and the chunks at which
    earlier runs were cut off.
    """
    records, cut_off = [], []
    for i in filter(job.mine, range(count)):
        record = store.load(i)
        while record is None:
            if times := store.times_cut_off(i):
                cut_off.append({"chunk": i, "tokens": store.length, "times": times})
                if times >= _CUT_OFF:
                    store.shrink(i, _smaller(store.length, task.source))
            ids = text.chunk(i, length, store.length).to(task.source.device)
            step = _Step(report, f"chunk {i + 1} of {count}, {ids.shape[1]} tokens", i, count)
            store.begin_chunk(i)
            try:
                figures = _within_memory(task, ids, step)
            except BaseException:
                store.end()
                raise
            if figures is None:
                store.end()
                store.shrink(i, _smaller(store.length, task.source))
                continue
            record = plain({"chunk": i, "start": i * length, "tokens": ids.shape[1], **figures})
            store.save(i, record)
        records.append(record)
    return records, cut_off


class Task:
    """The measurement of one chunk. The untrained model is made when it is first needed."""

    def __init__(self, source: Source, T: int, seed: int, beside: bool, products: bool) -> None:
        self.source = source
        self.T = T
        self.seed = seed
        self.beside = beside
        self.products = products
        self._untrained: nn.Module | None = None

    def __call__(self, ids: Tensor, step: Progress) -> dict[str, Figures]:
        source = self.source
        if source.trained is None:
            assert source.folder is not None
            narrow = "bfloat16" in str(source.facts["dtype"])
            return {"trained": measure_streamed(source.folder, ids, self.T, self.seed, narrow, step)}
        step("trained", 0.0)
        sides = {"trained": measure(source.trained, ids, self.T, self.seed, self.products)}
        if self.beside and source.untrained is not None:
            step("untrained", 0.5)
            sides["untrained"] = measure(self.untrained(), ids, self.T, self.seed, self.products)
        return sides

    def untrained(self) -> nn.Module:
        assert self.source.untrained is not None
        if self._untrained is None:
            self._untrained = self._fresh(self.source.untrained)
        return self._untrained

    def _fresh(self, make: Callable[[int], nn.Module]) -> nn.Module:
        try:
            return make(self.seed)
        except (MemoryError, RuntimeError, OSError) as error:
            if not ran_out(error):
                raise
            raise ValueError(
                "memory ran out while the untrained model was made beside the trained one, whatever the chunks: give "
                "--no-untrained"
            ) from error


@dataclass(frozen=True)
class _Step:
    """Progress within a chunk, reported as progress of the whole analysis."""

    report: Progress
    chunk: str
    number: int
    count: int

    def __call__(self, what: str, done: float) -> None:
        self.report(f"{self.chunk}: {what}", (self.number + done) / self.count)


def _within_memory(task: Task, ids: Tensor, step: _Step) -> dict[str, Figures] | None:
    """The figures that ``task`` gives; None where memory ran out."""
    try:
        return task(ids, step)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
    gc.collect()  # out of the except block, or the error's frames would hold what did not fit
    return None


def _smaller(length: int, source: Source) -> int:
    if length <= LEAST:
        way = "fewer --tangents" + (", or --stream" if source.kind == "decoder" else "")
        raise ValueError(f"memory ran out at chunks of {length} tokens, and shorter ones say little: try {way}")
    return max(LEAST, length // 2)
