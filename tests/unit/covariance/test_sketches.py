"""Sketches: the proven bound on adversarial rows, what the tracker captures, and what stays exact."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from covariance_states import correlated, same_bits, state_of
from pairs import pairs
from scalpel import StreamingCovariance

METHODS = ["tracker", "frequent_directions"]


def decaying(rows: int, dim: int, power: float = 1.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g, dtype=torch.float64) * torch.arange(1, dim + 1) ** -power


def spikes(rows: int, dim: int) -> Tensor:
    """Each direction occurs once, in turn, so that none can be forgotten at little cost."""
    return torch.eye(dim, dtype=torch.float64).repeat(math.ceil(rows / dim), 1)[:rows]


def slow(rows: int, dim: int) -> Tensor:
    """Large directions that change, and a small one that is always present and ends as the largest."""
    x = torch.zeros(rows, dim, dtype=torch.float64)
    x[torch.arange(rows), 1 + torch.arange(rows) * (dim - 1) // rows] = 3.0
    x[:, 0] = 1.0 - 2.0 * (torch.arange(rows) % 2)
    return x


def late(rows: int, dim: int) -> Tensor:
    """Most of the energy comes at the end, in a new direction."""
    x = decaying(rows, dim, 0.5)
    x[rows * 9 // 10 :] = 100 * decaying(rows - rows * 9 // 10, dim, 0.5, seed=1).flip(1)
    return x


def drifting(rows: int, dim: int) -> Tensor:
    return decaying(rows, dim, 0.5) + torch.linspace(-5, 5, rows, dtype=torch.float64)[:, None]


STREAMS: dict[str, Callable[[int, int], Tensor]] = {
    "decaying": decaying,
    "flat": lambda rows, dim: decaying(rows, dim, 0.0),
    "spikes": spikes,
    "slow": slow,
    "late": late,
    "drifting": drifting,
}


def batches(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    at = 0
    while at < len(x):
        for size in sizes:
            yield x[at : at + size]
            at += size


def scatter_of(x: Tensor, center: bool) -> Tensor:
    x = x - x.mean(dim=0) if center else x
    return x.T @ x


# Since the bound is a single inequality, cases that contain every pair of a stream, a rank and a batch size suffice.
@pytest.mark.parametrize(
    ("name", "rank", "sizes", "center"), pairs([*STREAMS], [2, 5, 20], [[1], [7, 30], [500]], [True, False]), ids=str
)
def test_frequent_directions_keep_their_bound(name: str, rank: int, sizes: list[int], center: bool) -> None:
    x = STREAMS[name](600, 50)
    sketch = StreamingCovariance(50, rank=rank, method="frequent_directions", center=center)
    for part in batches(x, sizes):
        sketch.update(part)
    S = scatter_of(x, center)
    estimate = sketch.covariance() * len(x)
    values = torch.linalg.eigvalsh(S).flip(0)
    kept = min(50, 2 * rank)
    bound = min(float(values[k:].sum()) / (kept + 1 - k) for k in range(kept + 1))
    rounding = 1e-12 * float(values[0])
    shrunk = sketch._state._kept.shrunk  # type: ignore[attr-defined]
    assert shrunk <= bound + rounding
    below = torch.linalg.eigvalsh(S - (estimate - shrunk / 2 * torch.eye(50, dtype=torch.float64)))
    assert below.min() >= -rounding and below.max() <= shrunk + rounding
    assert torch.linalg.matrix_norm(S - estimate, 2) <= shrunk / 2 + rounding
    if name in ("flat", "spikes") and rank < 20:
        assert shrunk > 0.1 * bound  # so the bound is not vacuous


def test_the_bound_survives_merging() -> None:
    x = late(900, 40)
    whole = StreamingCovariance(40, rank=4, method="frequent_directions")
    for part in x.split(300):
        whole.merge(StreamingCovariance(40, rank=4, method="frequent_directions").update(part))
    S = scatter_of(x, True)
    shrunk = whole._state._kept.shrunk  # type: ignore[attr-defined]
    values = torch.linalg.eigvalsh(S).flip(0)
    assert shrunk <= min(float(values[k:].sum()) / (9 - k) for k in range(9))
    assert torch.linalg.matrix_norm(S - whole.covariance() * 900, 2) <= shrunk / 2 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_tracker_captures_nearly_what_can_be(power: float, dtype: torch.dtype) -> None:
    x = decaying(6000, 300, power).to(dtype)
    exact = StreamingCovariance(300).update(x)
    C, best = exact.covariance(), exact.eigh(10)
    sketch = StreamingCovariance(300, rank=10)
    for part in x.split(500):
        sketch.update(part)
    values, vectors = sketch.eigh()
    captured = float((vectors @ C * vectors).sum() / best.values.sum())
    assert 0.99 < captured < 1 + 1e-9  # block iteration captures slightly less than the optimum
    assert (values <= best.values * (1 + 1e-5)).all()  # no value exceeds the true one
    torch.testing.assert_close(values.sum(), best.values.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("center", [True, False])
def test_what_stays_exact(method: str, center: bool) -> None:
    x = drifting(2500, 30)
    sketch = StreamingCovariance(30, rank=3, method=method, center=center)
    for part in batches(x, [1, 300, 1200]):
        sketch.update(part)
    exact = state_of(x, None, center)
    assert sketch.count == 2500
    torch.testing.assert_close(sketch.mean, exact.mean, rtol=0, atol=1e-12)
    total = exact.covariance().trace()
    ratio = sketch.explained_variance_ratio(3)
    torch.testing.assert_close(sketch.eigh(3).values / ratio, total.expand(3), rtol=1e-10, atol=0)
    assert sketch.stable_rank() == pytest.approx(float(total / sketch.eigh(1).values[0]), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_few_rows_are_kept_whole(method: str) -> None:
    x = correlated(7, 20, shift=3.0)
    sketch = StreamingCovariance(20, rank=5, method=method).update(x[:3]).update(x[3:])
    exact = state_of(x)
    torch.testing.assert_close(sketch.covariance(), exact.covariance())
    torch.testing.assert_close(sketch.eigh(5).values, exact.eigh(5).values)
    torch.testing.assert_close(sketch.eigh(5).vectors, exact.eigh(5).vectors)
    one = StreamingCovariance(20, rank=5, method=method).update(x[:1])
    values, vectors = one.eigh()
    assert not values.any()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_merging_sketches(method: str) -> None:
    x = decaying(3000, 60)
    a, b = (StreamingCovariance(60, rank=8, method=method) for _ in range(2))
    a.update(x[:1000])
    b.update(x[1000:])
    before = copy.deepcopy(b)
    assert a.merge(b) is a and a.count == 3000
    assert same_bits(b, before)
    best = state_of(x).eigh(8)
    captured = (a.eigh(8).vectors @ state_of(x).covariance() * a.eigh(8).vectors).sum() / best.values.sum()
    assert captured > 0.98
    empty = StreamingCovariance(60, rank=8, method=method)
    assert same_bits(empty.merge(b), b)


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_of_a_sketch(method: str) -> None:
    sketch = StreamingCovariance(400, rank=6, method=method)
    for part in batches(decaying(3000, 400), [5, 900]):
        sketch.update(part)
        state = sketch._state
        held = state._kept.directions.numel() + sum(each.numel() for each in state._waiting)  # type: ignore[attr-defined]
        assert held <= 4 * 6 * 400


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_again_and_from_a_file(method: str, tmp_path) -> None:
    parts = list(batches(decaying(4000, 50).float(), [700]))

    def run(stop: int | None) -> StreamingCovariance:
        sketch = StreamingCovariance(50, rank=4, method=method)
        for i, part in enumerate(parts):
            if i == stop:
                sketch.save(tmp_path / "state")
                sketch = StreamingCovariance.load(tmp_path / "state")
            sketch.update(part)
        return sketch

    assert same_bits(run(None), run(None))
    assert same_bits(run(3), run(None))
    assert run(3).rank == 4 and run(3).method == method


@pytest.mark.parametrize("method", METHODS)
def test_bad_rows_change_nothing(method: str) -> None:
    sketch = StreamingCovariance(6, rank=2, method=method).update(correlated(30, 6))
    before = copy.deepcopy(sketch)
    x = correlated(40, 6)
    x[17, 2] = float("nan")
    with pytest.raises(ValueError, match=r"row 17 of x has nan in column 2"):
        sketch.update(x)
    assert same_bits(sketch, before)
    assert same_bits(sketch.update(torch.empty(0, 6)), before)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_sketch_does_not_know(method: str) -> None:
    sketch = StreamingCovariance(9, rank=3, method=method).update(decaying(50, 9))
    exact = StreamingCovariance(9).update(decaying(50, 9))
    for ask, words in (
        (sketch.effective_rank, r"effective_rank needs the whole spectrum.*effective_rank_bounds"),
        (sketch.participation_ratio, "participation_ratio needs the whole spectrum"),
        (lambda: sketch.eigh(4), "k is 4, but rank is 3"),
        (lambda: sketch.subtract(sketch), "cannot subtract rows"),
        (lambda: sketch.merge(exact), "rank and method must be equal"),
        (lambda: exact.merge(sketch), "rank and method must be equal"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    low, high = exact.effective_rank_bounds(3)
    assert low <= exact.effective_rank() <= high < 9
    assert exact.effective_rank_bounds(9) == pytest.approx((exact.effective_rank(),) * 2)
    np.testing.assert_allclose(sketch.effective_rank_bounds(), (low, high), rtol=0.2)
    assert repr(sketch) == f"StreamingCovariance(dim=9, rank=3, method='{method}', count=50, center=True)"
