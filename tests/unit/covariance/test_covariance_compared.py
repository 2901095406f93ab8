"""Functions of several states: intervals, angles, contrasts, similarity; and the names that scikit-learn users know."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from sklearn.decomposition import PCA
from torch import Tensor

from covariance_states import correlated, same_bits, state_of
from scalpel import StreamingCovariance
from scalpel.covariance import DebiasedCKA, leave_one_out
from scalpel.covariance.measures import effective_rank, effective_rank_bounds


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- intervals -----------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_students_t() -> None:
    """For a mean over blocks of equal size, leaving one out gives the textbook interval over block means."""
    x = normal(80, 1) + 2
    blocks = [state_of(part) for part in x.split(10)]
    before = copy.deepcopy(blocks)
    found = leave_one_out(blocks, lambda state: state.mean)
    means = x.reshape(8, 10).mean(dim=1).numpy()
    low, high = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([float(found.value), float(found.low), float(found.high)], [means.mean(), low, high])
    assert found.left_out.shape == (8, 1)
    assert all(same_bits(a, b) for a, b in zip(blocks, before, strict=True))


@pytest.mark.parametrize("rank", [None, 4])
def test_leaving_out_is_leaving_out(rank: int | None) -> None:
    x = correlated(600, 12)
    blocks = [StreamingCovariance(12, rank).update(part) for part in x.split(100)]
    found = leave_one_out(blocks, lambda state: state.explained_variance_ratio(3))
    for i, part in enumerate(found.left_out):
        rest = torch.cat([x[: 100 * i], x[100 * (i + 1) :]])
        expected = state_of(rest).explained_variance_ratio(3)
        torch.testing.assert_close(part, expected, rtol=1e-9 if rank is None else 0.05, atol=0)
    assert (found.low < found.value).all() and (found.value < found.high).all()


def test_the_interval_covers() -> None:
    """About 95 % of 200 intervals contain the participation ratio of infinitely many rows."""
    scale = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5]).double()
    truth = float(scale.square().sum() ** 2 / scale.pow(4).sum())
    hits = 0
    for seed in range(200):
        blocks = [state_of(part) for part in (normal(1600, 5, seed=seed) * scale).split(200)]
        found = leave_one_out(blocks, lambda state: state.participation_ratio())
        hits += bool(found.low <= truth <= found.high)
    assert 0.90 <= hits / 200 <= 0.99


def test_intervals_that_are_refused() -> None:
    state = state_of(normal(9, 3))
    with pytest.raises(ValueError, match="1 of the blocks have rows"):
        leave_one_out([state, StreamingCovariance(3)], lambda each: each.stable_rank())
    with pytest.raises(ValueError, match="other has dim 4"):
        leave_one_out([state, state_of(normal(9, 4))], lambda each: each.stable_rank())


# ---- two states ----------------------------------------------------------------------------------


def test_principal_angles() -> None:
    dim, k = 40, 3
    turn = torch.linalg.qr(normal(dim, dim)).Q
    scale = torch.tensor([9.0, 7.0, 5.0] + [0.01] * (dim - 3)).double()
    angles = torch.tensor([1e-9, 0.3, 1.5]).double()
    other = turn.clone()
    for i, angle in enumerate(angles):  # each leading axis is tilted towards one of the others
        other[i] = angle.cos() * turn[i] + angle.sin() * turn[10 + i]
        other[10 + i] = angle.cos() * turn[10 + i] - angle.sin() * turn[i]
    states = [state_of(torch.cat([scale[:, None] * basis, -scale[:, None] * basis])) for basis in (turn, other)]
    found = states[0].principal_angles(states[1], k)
    torch.testing.assert_close(found, angles, rtol=1e-6, atol=1e-12)
    expected = np.sort(scipy.linalg.subspace_angles(turn[:3].T.numpy(), other[:3].T.numpy()))
    np.testing.assert_allclose(found.numpy()[1:], expected[1:], rtol=1e-6)  # scipy returns 0 for the first
    assert float(states[0].principal_angles(states[0], k).max()) < 1e-12


def test_contrast_is_the_generalised_eigenproblem() -> None:
    a, b = state_of(correlated(300, 9)), state_of(correlated(200, 9, shift=1.0))
    values, vectors = a.contrast(b, 4, ridge=1e-3)
    B = b.covariance().numpy()
    B = B + 1e-3 * np.trace(B) / 9 * np.eye(9)
    expected = scipy.linalg.eigh(a.covariance().numpy(), B, eigvals_only=True)[::-1][:4]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(4, dtype=torch.float64))
    apart = vectors @ a.covariance() - values[:, None] * (vectors @ torch.from_numpy(B))
    assert float(apart.abs().max()) < 1e-9 * float(a.covariance().abs().max())


def test_contrast_finds_what_one_has_and_the_other_lacks() -> None:
    x = normal(4000, 20, seed=1) * torch.linspace(5, 1, 20).double()
    hidden = normal(20, seed=3)
    hidden = hidden / hidden.norm()
    more = x + 3 * normal(4000, 1, seed=2) * hidden
    plain = state_of(normal(4000, 20, seed=4) * torch.linspace(5, 1, 20).double())
    values, vectors = state_of(more).contrast(plain, 2)
    # Relative to B, the direction that stands out is B⁻¹ h.
    towards = hidden / torch.linspace(5, 1, 20).double() ** 2
    assert abs(float(vectors[0] @ towards / towards.norm())) > 0.99
    assert values[0] > 2 * values[1]
    assert abs(float(state_of(more).eigh(1).vectors[0] @ towards / towards.norm())) < 0.5  # PCA does not see it


def test_two_states_that_do_not_fit() -> None:
    a = state_of(normal(9, 3))
    for call, words in (
        (lambda: a.contrast(state_of(normal(9, 4)), 1), "other has dim 4"),
        (lambda: a.contrast(state_of(normal(9, 3), None, False), 1), "center=False"),
        (lambda: a.contrast(a, 1, ridge=0), "ridge is 0"),
        (lambda: a.contrast(a, 4), "k is 4"),
        (lambda: a.contrast(StreamingCovariance(3), 1), "no rows"),
        (lambda: a.contrast(state_of(torch.ones(5, 3)), 1), "nothing varies in other"),
        (lambda: a.principal_angles(state_of(normal(9, 4)), 1), "other has dim 4"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---- similarity ----------------------------------------------------------------------------------


def hsic_by_hand(x: Tensor, y: Tensor) -> float:
    """The estimator of Song et al. 2012, as a mean over all quadruples of different rows."""
    K, L = (x @ x.T).numpy(), (y @ y.T).numpy()
    n, total, count = len(K), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                        count += 1
    return total / count


def test_cka_is_the_unbiased_one() -> None:
    x, y = normal(7, 3), normal(7, 5, seed=1)
    found = DebiasedCKA().update(x, y).value
    expected = hsic_by_hand(x, y) / math.sqrt(hsic_by_hand(x, x) * hsic_by_hand(y, y))
    assert found == pytest.approx(expected, rel=1e-9)


def test_cka_of_what_is_equal_and_what_is_not() -> None:
    x = normal(400, 30)
    turn = torch.linalg.qr(normal(30, 30, seed=1)).Q
    same, other = DebiasedCKA(), DebiasedCKA()
    for part in x.split(50):
        same.update(part, 3 * part @ turn + 1000)
        other.update(part, normal(50, 300, seed=int(part[0, 0] * 1e6) % 1000))
    assert same.value == pytest.approx(1, abs=1e-9)
    assert abs(other.value) < 0.05  # 300 columns of 50 rows: the plain CKA is near 1 here
    low, high = other.interval()
    assert low < 0 < high
    plain = torch.linalg.matrix_norm(x[:50].T @ normal(50, 300)) ** 2
    plain /= torch.linalg.matrix_norm(x[:50].T @ x[:50]) * torch.linalg.matrix_norm(normal(50, 300).T @ normal(50, 300))
    assert plain > 0.3
    halves = [DebiasedCKA().update(part, part) for part in x.split(200)]
    assert halves[0].merge(halves[1]).blocks == 2
    assert math.isnan(DebiasedCKA().update(torch.ones(5, 2), x[:5]).value)


def test_cka_errors() -> None:
    for x, y, words in (
        (normal(3, 2), normal(3, 2), "3 rows.*4"),
        (normal(5, 2), normal(6, 2), "x has 5 rows and y has 6"),
        (normal(5, 2), normal(5, 2) / 0, "y holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            DebiasedCKA().update(x, y)
    with pytest.raises(ValueError, match="no rows yet"):
        _ = DebiasedCKA().value
    with pytest.raises(ValueError, match="there are 1 blocks"):
        DebiasedCKA().update(normal(5, 2), normal(5, 2)).interval()


# ---- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("known", [1, 3, 20, 50])
def test_bounds_of_the_effective_rank_hold(power: float, known: int) -> None:
    values = torch.arange(1, 51).double() ** -power
    low, high = effective_rank_bounds(values[:known], float(values.sum()), 50)
    assert low * (1 - 1e-9) <= effective_rank(values) <= high * (1 + 1e-9)
    # There are spectra that attain either bound.
    rest, top = float(values[known:].sum()), float(values[known - 1])
    flat = torch.cat([values[:known], torch.full((50 - known,), rest / max(1, 50 - known)).double()])
    assert high == pytest.approx(effective_rank(flat), rel=1e-6)
    whole = int(rest / top)
    packed = torch.cat([values[:known], torch.tensor([top] * whole + [rest - whole * top]).double()])
    assert low == pytest.approx(effective_rank(packed), rel=1e-6)


def test_the_names_of_scikit_learn() -> None:
    x = correlated(300, 8)
    state, pca = StreamingCovariance(8), PCA().fit(x.numpy())
    assert state.partial_fit(x[:100]) is state
    state.partial_fit(x[100:].numpy(), y=None)
    np.testing.assert_allclose(state.mean_.numpy(), pca.mean_)
    np.testing.assert_allclose(state.explained_variance_ratio_.numpy(), pca.explained_variance_ratio_)
    np.testing.assert_allclose(state.explained_variance_.numpy() * 300 / 299, pca.explained_variance_)
    np.testing.assert_allclose(np.abs((state.components_.numpy() * pca.components_).sum(axis=1)), 1, rtol=1e-9)
    assert state.n_samples_seen_ == 300
    sketch = StreamingCovariance(8, rank=3).partial_fit(x)
    assert sketch.components_.shape == (3, 8) and sketch.explained_variance_ratio_.shape == (3,)


def test_leaving_out_leaves_no_rounding() -> None:
    """With a dominant block, and with blocks of one row, leaving one out must equal a state without that block."""
    parts = [normal(20, 6, seed=i) for i in range(5)]
    parts[2] = parts[2] * 1e8
    found = leave_one_out([state_of(part) for part in parts], lambda state: state.effective_rank("singular"))
    rest = state_of(torch.cat([part for i, part in enumerate(parts) if i != 2]))
    assert float(found.left_out[2]) == pytest.approx(rest.effective_rank("singular"), rel=1e-9)
    single = leave_one_out([state_of(normal(1, 3)), state_of(normal(1, 3, seed=1))], lambda state: state.count)
    assert single.left_out.tolist() == [1, 1]


@pytest.mark.parametrize("scale", [1e-160, 1e-41, 1e40, 1e150])
def test_cka_at_any_scale(scale: float) -> None:
    x, y = normal(20, 3), normal(20, 4, seed=1)
    plain, scaled, merged = DebiasedCKA(), DebiasedCKA(), DebiasedCKA()
    for i, part in enumerate(((x[:8], y[:8]), (x[8:], y[8:]))):
        plain.update(*part)
        scaled.update(part[0] * scale, part[1] * scale)
        merged.merge(DebiasedCKA().update(part[0] * (1 + i), part[1]))
    assert scaled.value == pytest.approx(plain.value, rel=1e-9)
    whole = DebiasedCKA().update(x[:8], y[:8]).update(2 * x[8:], y[8:])
    assert merged.value == pytest.approx(whole.value, rel=1e-9)
