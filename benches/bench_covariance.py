"""scalpel.bench.covariance_update under pytest-benchmark."""

from collections.abc import Callable

from scalpel import bench


def test_covariance_update(timed: Callable[[bench.Case], None]) -> None:
    timed(bench.covariance_update())
