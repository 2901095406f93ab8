"""scalpel.bench.jacobian_jvp under pytest-benchmark."""

from collections.abc import Callable

from scalpel import bench


def test_jacobian_jvp(timed: Callable[[bench.Case], None]) -> None:
    timed(bench.jacobian_jvp())
