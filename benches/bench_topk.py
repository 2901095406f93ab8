"""scalpel.bench.keep_topk under pytest-benchmark."""

from collections.abc import Callable

from scalpel import bench


def test_keep_topk(timed: Callable[[bench.Case], None]) -> None:
    timed(bench.keep_topk())
