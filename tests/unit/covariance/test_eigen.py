"""Leading eigenvectors: the promised residual, the starting vectors, and the fallback."""

import pytest
import torch
from torch import Tensor

from covariance_states import state_of
from scalpel import StreamingCovariance
from scalpel.covariance import eigen, exact
from scalpel.covariance.eigen import RELATIVE, TOLERANCE, Leading, by_rows, fix_signs
from scalpel.covariance.measures import principal_angles


def rows_with(power: float, rows: int = 700, dim: int = 300, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64) * torch.arange(1, dim + 1) ** -power
    return x @ turn


def residual(state: StreamingCovariance, values: Tensor, vectors: Tensor) -> float:
    C = state.covariance()
    return float(torch.linalg.vector_norm(vectors @ C - values[:, None] * vectors, dim=1).max() / values[0])


@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (8, 1.0), (50, 1.0), (8, 1e-12), (8, 1e12)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_few_of_many_meet_their_residual(power: float, k: int, scale: float) -> None:
    state = state_of(rows_with(power) * scale, None, center=False)
    values, vectors = state.eigh(k)
    assert residual(state, values, vectors) <= TOLERANCE
    apart = torch.linalg.vector_norm(vectors @ state.covariance() - values[:, None] * vectors, dim=1)
    assert (apart <= RELATIVE * values).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    whole = torch.linalg.eigvalsh(state.covariance()).flip(0)
    torch.testing.assert_close(values, whole[:k], rtol=1e-3, atol=0)
    assert (values.diff() <= 0).all()
    assert torch.equal(vectors, fix_signs(vectors))


def test_iteration_is_used_and_begins_from_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []
    real = eigen._ritz

    def seen(C: Tensor, V: Tensor, k: int, goal: float, look_from: int) -> eigen._Ritz:
        blocks.append(V)
        return real(C, V, k, goal, look_from)

    monkeypatch.setattr(eigen, "_ritz", seen)
    monkeypatch.setattr(exact, "by_lapack", lambda _: pytest.fail("LAPACK was asked"))
    x = rows_with(0.5, 4000)
    state = state_of(x[:3900])
    before = state.eigh(8).vectors
    blocks.clear()
    state.update(x[3900:])
    values, vectors = state.eigh(8)
    assert principal_angles(blocks[0].T.double(), before)[-1] < 1e-5
    assert residual(state, values, vectors) <= TOLERANCE


def test_lapack_takes_over_where_iteration_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(rows_with(1.0))
    expected = torch.linalg.eigh(state.covariance())
    monkeypatch.setattr(Leading, "find", lambda *_: None)
    values, vectors = state.eigh(8)
    torch.testing.assert_close(values, expected.eigenvalues.flip(0)[:8])
    torch.testing.assert_close(vectors, fix_signs(expected.eigenvectors.T.flip(0)[:8]))


def test_a_wrong_answer_is_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration that reports convergence is checked in float64, and its wrong answer is refused."""
    state = state_of(rows_with(1.0))
    asked = []

    def sure(C: Tensor, V: Tensor, *_: object) -> eigen._Ritz:
        asked.append(1)
        return eigen._Ritz(torch.linalg.qr(torch.randn(V.shape)).Q, 0.0, 1, True)

    monkeypatch.setattr(eigen, "_ritz", sure)
    values, vectors = state.eigh(8)
    assert 1 < len(asked) <= eigen._ROUNDS
    assert residual(state, values, vectors) <= 1e-12


@pytest.mark.parametrize(("dim", "rows"), [(40, 7), (1500, 300), (300, 299)])
@pytest.mark.parametrize("center", [True, False])
def test_fewer_rows_than_dimensions(dim: int, rows: int, center: bool) -> None:
    x = torch.randn(rows, dim, dtype=torch.float64) + 1
    state = state_of(x, [3], center)
    values, vectors = state.eigh(5)
    assert not len(state._state._scatter)  # type: ignore[attr-defined]  # no dim x dim was made
    participation = state.participation_ratio() if dim <= rows else None
    known = state.effective_rank_bounds(rows - 1)
    assert residual(state, values, vectors) <= 1e-12  # this forms the full matrix
    full = torch.linalg.eigvalsh(state.covariance()).flip(0)
    torch.testing.assert_close(values, full[:5])
    with pytest.warns(RuntimeWarning, match=f"{rows} rows in {dim} dimensions"):
        assert known[0] - 1e-6 <= state.effective_rank() <= known[1] + 1e-6
    assert participation is None or participation == pytest.approx(state.participation_ratio())


def test_measures_of_few_rows_are_those_of_the_covariance() -> None:
    x = torch.randn(20, 50, dtype=torch.float64)
    waiting, joined = state_of(x), state_of(x)
    joined.covariance()
    for name in ("effective_rank", "participation_ratio", "stable_rank"):
        with pytest.warns(RuntimeWarning, match="20 rows in 50 dimensions"):
            assert getattr(waiting, name)() == pytest.approx(getattr(joined, name)(), rel=1e-9), name
    torch.testing.assert_close(waiting.explained_variance_ratio(5), joined.explained_variance_ratio(5))


def test_more_directions_than_rows_span() -> None:
    x = torch.randn(4, 9, dtype=torch.float64)
    values, vectors = by_rows(x, 4, None)
    assert values.shape == (9,) and (values[4:] == 0).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(vectors.T * values @ vectors, x.T @ x / 4)


def test_rows_beyond_float32_go_through_lapack() -> None:
    state = state_of(rows_with(1.0) * 1e25, None, center=False)
    values, vectors = state.eigh(3)
    assert residual(state, values, vectors) <= 1e-12


@pytest.mark.parametrize("factor", [1.05, 1.3, 10.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_an_unseen_direction_is_found(power: float, factor: float) -> None:
    """Eigenvalues i^-power along the axes. Only the leading axes were known, and the last axis now has more energy."""
    dim, k = 1024, 32
    values = torch.arange(1, dim + 1).double() ** -power
    values[-1] = factor * values[k - 1]
    for seed in range(3):
        leading = Leading()
        leading.start_from(torch.eye(dim)[: k + 4])
        leading._calls = seed
        found = leading.find(torch.diag(values).float(), lambda R: R * values, k)
        assert found is not None and float(found.vectors[:, -1].norm()) > 0.99


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_a_start_that_is_nearly_right_needs_no_lapack(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of eigenvectors add only rounding errors to a block, which must not be taken for directions."""
    state = state_of(rows_with(1.0, 4000))
    before = state.eigh(8)
    monkeypatch.setattr(exact, "by_lapack", lambda _: pytest.fail("LAPACK was asked"))
    state.update(size * rows_with(1.0, 1, seed=1))
    values, vectors = state.eigh(8)
    assert residual(state, values, vectors) <= TOLERANCE
    torch.testing.assert_close(values, before.values, rtol=1e-2, atol=0)
