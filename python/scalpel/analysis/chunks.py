"""Measuring the chunks of an analysis one by one, keeping each, and shortening them where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..experiments.result import plain
from .job import Job
from .measure import Figures, measure
from .pace import Clock, Plan, Progress, Stopped
from .source import Source, ran_out
from .store import Store
from .streamed import measure_streamed
from .text import Text

LEAST = 8  # the fewest tokens to which a chunk is shortened for lack of memory
_CUT_OFF = 2  # after this many runs were cut off at the same chunk, a lack of memory is assumed

Record = dict[str, Any]


def measure_chunks(
    task: Task,
    store: Store,
    text: Text,
    count: int,
    job: Job,
    plan: Plan,
    clock: Clock,
    first: Callable[[list[Record]], None],
) -> tuple[list[Record], list[dict[str, int]]]:
    """Measure the chunks that fall to this process, until they are finished or time is over.

    ``first`` is called with the records of the finished chunks once the first of those that this call measures is.

    Returns the records as they are on disk, so that a resumed analysis has identical results, and the chunks at which
    earlier runs were cut off.
    """
    records: list[Record] = []
    cut_off: list[dict[str, int]] = []
    measured = 0
    for chunk in filter(job.mine, range(count)):
        record = store.load(chunk)
        while record is None:
            if clock.over:
                return records, cut_off
            if times := store.times_cut_off(chunk):
                cut_off.append({"chunk": chunk, "tokens": store.length, "times": times})
                if times >= _CUT_OFF:
                    store.shrink(chunk, _smaller(store.length, task.source, text))
            ids = text.chunk(chunk, store.length)
            counted, ids = text.counted(ids), ids.to(task.source.device)
            words = f"chunk {chunk + 1} of {count}, {ids.shape[1]} tokens"
            steps = {side: plan.of(f"{side} {chunk}", words) for side in task.sides(chunk)}
            store.begin_chunk(chunk)
            try:
                figures = _within_memory(task, ids, counted, steps)
            except Stopped:
                store.end()
                return records, cut_off
            except BaseException:
                store.end()
                raise
            if figures is None:
                store.end()
                store.shrink(chunk, _smaller(store.length, task.source, text))
                continue
            record = plain({"chunk": chunk, "start": text.chunks[chunk].start, "tokens": ids.shape[1], **figures})
            store.save(chunk, record)
            clock.achieved()
            measured += 1
            if measured == 1:
                first([*records, record])
        records.append(record)
    return records, cut_off


class Task:
    """The measurement of one chunk, for the trained model and, at the first chunk, the untrained one."""

    def __init__(self, source: Source, T: int, seed: int, beside: bool, depths: Sequence[int]) -> None:
        self.source = source
        self.T = T
        self.seed = seed
        self.beside = beside
        self.depths = depths
        self._untrained: nn.Module | None = None

    def sides(self, chunk: int) -> list[str]:
        """Which models are measured at a chunk: the untrained one at the first alone."""
        return ["trained", "untrained"] if self.beside and chunk == 0 else ["trained"]

    def __call__(self, ids: Tensor, counted: list[int] | None, steps: dict[str, Progress]) -> dict[str, Figures]:
        """Measure the figures at ``ids`` (1, L) of the models whose progress ``steps`` report, by their names.

        ``counted`` lists the positions of the tokens that count; None if all do.
        """
        source = self.source
        if source.trained is None:
            assert source.folder is not None
            narrow = "bfloat16" in str(source.facts["dtype"])
            return {
                "trained": measure_streamed(source.folder, ids, self.T, self.seed, narrow, steps["trained"], counted)
            }
        sides = {}
        for side, step in steps.items():
            step(side, 0.0)
            model = source.trained if side == "trained" else self.untrained()
            sides[side] = measure(model, ids, self.T, self.seed, self.depths, counted, _within(side, step))
        return sides

    def untrained(self) -> nn.Module:
        """The untrained model, which is made when it is first needed."""
        assert self.source.untrained is not None
        if self._untrained is None:
            self._untrained = self._fresh(self.source.untrained)
        return self._untrained

    def _fresh(self, make: Callable[[int], nn.Module]) -> nn.Module:
        """Make the untrained model; an error says what to do where memory runs out."""
        try:
            return make(self.seed)
        except (MemoryError, RuntimeError, OSError) as error:
            if not ran_out(error):
                raise
            raise ValueError(
                "memory ran out while the untrained model was made beside the trained one, whatever the chunks: give "
                "--no-untrained"
            ) from error


def _within(side: str, step: Progress) -> Progress:
    """Report steps within the measurement of one model, which is named."""
    return lambda what, done: step(f"{side}: {what}", done)


def _within_memory(
    task: Task, ids: Tensor, counted: list[int] | None, steps: dict[str, Progress]
) -> dict[str, Figures] | None:
    """Return the figures of ``task``; None where memory ran out."""
    try:
        return task(ids, counted, steps)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
    gc.collect()  # after the except block, since the error's frames hold what did not fit into memory
    return None


def _smaller(length: int, source: Source, text: Text) -> int:
    """Return half the length, at least ``LEAST`` and what the text needs; ValueError where it is already that short."""
    least = max(LEAST, text.least)
    if length <= least:
        remedy = "fewer --tangents" + (", or --stream" if source.kind == "decoder" else "")
        raise ValueError(f"memory ran out at chunks of {length} tokens, and shorter ones say little: try {remedy}")
    return max(least, length // 2)
