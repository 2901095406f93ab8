"""Orbits on grids against the slow twin, below and above the size from which numba is used."""

import numpy as np
import pytest

from scalpel.reference import semigroup as twin
from scalpel.semigroup import distances, orbit_shapes, orbits, reachable, unreachable


def grid(rows, columns, wrap):
    """Two generators on a grid, one row down and one column right; at the edge they wrap around or stay."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down = (row + 1) % rows if wrap else np.minimum(row + 1, rows - 1)
    right = (column + 1) % columns if wrap else np.minimum(column + 1, columns - 1)
    return np.stack([down * columns + column, row * columns + right])


MAPS = {
    "one state": np.zeros((1, 1), dtype=np.int64),
    "identity": np.arange(5)[None],
    "grid": grid(7, 9, wrap=False),
    "torus": grid(6, 5, wrap=True),
    **{f"random {seed}": np.random.default_rng(seed).integers(40, size=(2, 40)) for seed in range(5)},
}


@pytest.fixture(params=["numpy", "numba"])
def loop(request, monkeypatch):
    monkeypatch.setattr(orbits, "_FEW_STATES", 10**9 if request.param == "numpy" else 0)


@pytest.mark.parametrize("name", MAPS)
def test_distances_are_the_twins(name, loop):
    maps = MAPS[name]
    for starts in ([0], [0, maps.shape[1] - 1]):
        expected = twin.distances(maps.tolist(), starts)
        assert distances(maps, starts).tolist() == expected
        assert reachable(maps, starts).tolist() == [d >= 0 for d in expected]
        assert unreachable(maps, starts).tolist() == [i for i, d in enumerate(expected) if d < 0]


def test_wide_frontiers_in_parallel():
    rng = np.random.default_rng(0)
    maps = rng.integers(300_000, size=(3, 300_000))
    assert distances(maps, 0).tolist() == twin.distances(maps.tolist(), [0])
    rows, columns = 400, 300
    torus = distances(grid(rows, columns, wrap=True), 0).reshape(rows, columns)
    assert (torus == np.arange(rows)[:, None] + np.arange(columns)).all()


@pytest.mark.parametrize("name", MAPS)
def test_orbit_shapes_are_the_twins(name):
    for image in MAPS[name]:
        index, period = orbit_shapes(image)
        assert list(zip(index, period, strict=True)) == [twin.orbit_shape(image, s) for s in range(len(image))]


def test_no_starts_reach_nothing_and_no_generators_only_the_starts():
    assert not reachable(MAPS["grid"], []).any()
    assert reachable(np.zeros((0, 3), dtype=int), 1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("images", "starts", "error", "words"),
    [
        ([[0, 5]], 0, ValueError, "sends state 1 to 5"),
        ([[0, -1]], 0, ValueError, "sends state 1 to -1"),
        ([[0.0]], 0, TypeError, "array of integers"),
        ([0, 1], 0, ValueError, "must be \\(generators, states\\)"),
        ([[0, 1]], 2, ValueError, "no state 2"),
        ([[0, 1]], 0.5, TypeError, "float64"),
    ],
)
def test_what_is_no_map_is_refused(images, starts, error, words):
    with pytest.raises(error, match=words):
        distances(images, starts)
