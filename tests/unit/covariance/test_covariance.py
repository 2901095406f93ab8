"""StreamingCovariance has one state however the rows arrive, and errors leave it unchanged."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scalpel
from cases import FLOAT32_SUMS
from covariance_states import assert_close, correlated, covariance_bound, same_bits, state_of, within
from scalpel import StreamingCovariance, _core, reference

# ---- how rows arrive ---------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("splits", [[1], [1, 2, 3], [256], [255, 257, 512], list(range(10, 600, 10)), [0, 0, 600]])
def test_any_split_into_batches(splits: list[int], center: bool, target: str) -> None:
    x = correlated(600, 21, shift=3.0)
    assert_close(state_of(x, splits, center), state_of(x, None, center))


@given(
    rows=st.integers(1, 60),
    dim=st.integers(1, 40),
    splits=st.lists(st.integers(0, 60), max_size=5).map(sorted),
    center=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_split_merge_and_twin_agree(rows: int, dim: int, splits: list[int], center: bool) -> None:
    x = correlated(rows, dim, shift=-2.0)
    whole, merged = state_of(x, None, center), StreamingCovariance(dim, center=center)
    for part in x.tensor_split(splits):
        merged.merge(StreamingCovariance(dim, center=center).update(part))
    assert_close(merged, whole)
    twin = reference.moments(x, center)
    scale = max(1e-300, np.abs(twin.covariance).max())
    assert np.abs(whole.covariance().numpy() - twin.covariance).max() <= 1e-12 * max(scale, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_means_a_thousand_times_the_deviations(dtype: torch.dtype, target: str) -> None:
    x = correlated(900, 20, shift=1000.0).to(dtype)
    expected = torch.from_numpy(reference.moments(x).covariance)
    bound = covariance_bound(x, True, None)  # relative to the deviations, whatever the means are
    for splits in (None, [300, 301], list(range(1, 900, 7))):
        assert within(state_of(x, splits).covariance(), expected, bound)


def test_same_bits_for_any_thread_count(target: str) -> None:
    x = correlated(700, 150).float()
    before = torch.get_num_threads()
    states = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        states.append(state_of(x, [400]).merge(state_of(x + 1)))
    torch.set_num_threads(before)
    assert all(same_bits(states[0], other) for other in states)


def test_small_batches_of_odd_widths_on_every_target() -> None:
    for dim in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48):
        for rows in (1, 2, 3, 255, 256, 257):
            x = correlated(rows, dim)
            expected = reference.moments(x).covariance
            for name in (t["name"] for t in _core.targets() if t["supported"]):
                _core.force_target(name)
                ours = state_of(x).covariance().numpy()
                assert np.abs(ours - expected).max() <= 1e-13 * max(1.0, np.abs(expected).max())
    _core.force_target("")


def test_one_row_and_no_rows() -> None:
    x = correlated(1, 5)
    state = state_of(x)
    assert state.count == 1
    assert torch.equal(state.mean, x[0])
    assert torch.equal(state.covariance(), torch.zeros(5, 5, dtype=torch.float64))
    before = copy.deepcopy(state)
    state.update(torch.empty(0, 5)).merge(StreamingCovariance(5))
    assert same_bits(state, before)
    assert same_bits(StreamingCovariance(5).merge(state), state)


def test_constant_columns_have_exactly_no_variance() -> None:
    x = correlated(500, 6).float()
    x[:, 2], x[:, 4] = 0.1, -1234.567
    state = state_of(x, [1, 7, 300])
    assert not state.covariance()[[2, 4]].any()
    assert torch.equal(state.mean[[2, 4]], x[0, [2, 4]].double())


def test_dimension_one() -> None:
    x = torch.randn(50, 1)
    state = state_of(x, [20])
    torch.testing.assert_close(state.covariance()[0, 0], x.double().var(correction=0))
    assert torch.equal(state.eigh().vectors, torch.ones(1, 1, dtype=torch.float64))
    assert (state.effective_rank(), state.participation_ratio(), state.stable_rank()) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_strides_and_numpy(dtype: torch.dtype) -> None:
    x = torch.randn(9, 40, 24).to(dtype)
    views = [x, x.transpose(0, 1), x[::2], x[..., :13], x[..., ::2], x[:1].expand(4, -1, -1)]
    for view in views:
        expected = state_of(view.contiguous().reshape(-1, view.shape[-1]))
        assert same_bits(StreamingCovariance(view.shape[-1]).update(view), expected)
        if dtype != torch.bfloat16:
            assert same_bits(StreamingCovariance(view.shape[-1]).update(view.numpy()), expected)
    backwards = x.double().numpy()[::-1]
    assert same_bits(StreamingCovariance(24).update(backwards), state_of(torch.tensor(backwards.copy())))


def test_float16_is_read_exactly() -> None:
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite()]
    state = StreamingCovariance(1, center=False)
    state.update(every[:, None])
    expected = reference.moments(every[:, None], center=False)
    assert abs(state.covariance().item() / expected.covariance.item() - 1) < FLOAT32_SUMS
    assert abs(state.mean.item() - expected.mean.item()) < 1e-12


def test_a_tensor_that_requires_grad_is_read() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    assert not StreamingCovariance(3).update(x * 2).covariance().requires_grad


# ---- merge and subtract ------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_subtract_undoes_merge(center: bool) -> None:
    a, b = correlated(300, 17, shift=2.0), correlated(200, 17, shift=-1.0)
    state = state_of(torch.cat([a, b]), None, center).subtract(state_of(b, None, center))
    assert_close(state, state_of(a, None, center))
    assert state.subtract(state_of(a, None, center)).count == 0


def test_merge_is_associative_and_returns_self() -> None:
    a, b, c = (correlated(n, 9, shift=n / 10) for n in (40, 3, 170))
    left = state_of(a).merge(state_of(b)).merge(state_of(c))
    right = state_of(a).merge(state_of(b).merge(state_of(c)))
    assert_close(left, right, 1e-13)
    assert left.merge(right) is left
    doubled = state_of(a)
    assert_close(doubled.merge(doubled), state_of(torch.cat([a, a])))


# ---- spectrum ----------------------------------------------------------------------------------


def test_eigh() -> None:
    state = state_of(correlated(400, 30, shift=5.0))
    values, vectors = state.eigh()
    covariance = state.covariance()
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(covariance @ vectors.T, vectors.T * values)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(30, dtype=torch.float64))
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    few = state.eigh(4)
    assert few.values.shape == (4,)
    assert few.vectors.shape == (4, 30)
    assert torch.equal(few.vectors, vectors[:4])


def test_measures_on_a_known_spectrum() -> None:
    # Columns of the scaled identity, mirrored: mean 0, covariance diag(4, 1, 1, 0).
    scales = torch.tensor([4.0, 1.0, 1.0, 0.0]).double()
    rows = torch.diag((scales * 4).sqrt())
    state = state_of(torch.cat([rows, -rows]))
    torch.testing.assert_close(state.eigh().values, scales)
    torch.testing.assert_close(state.explained_variance_ratio(2), torch.tensor([4 / 6, 1 / 6]).double())
    assert math.isclose(state.participation_ratio(), 36 / 18)
    assert math.isclose(state.stable_rank(), 6 / 4)
    entropy = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6))
    assert math.isclose(state.effective_rank(), math.exp(entropy))
    entropy = -(2 / 4 * math.log(2 / 4) + 2 / 4 * math.log(1 / 4))
    assert math.isclose(state.effective_rank(of="singular"), math.exp(entropy))


def test_measures_when_nothing_varies() -> None:
    state = state_of(torch.ones(7, 3))
    assert (state.effective_rank(), state.participation_ratio(), state.stable_rank()) == (0.0, 0.0, 0.0)
    assert not state.explained_variance_ratio(3).any()
    assert torch.equal(state.eigh().values, torch.zeros(3, dtype=torch.float64))


def test_results_come_in_the_asked_dtype() -> None:
    state = StreamingCovariance(4, dtype=torch.float32).update(torch.randn(9, 4))
    results = (state.mean, state.covariance(), *state.eigh(2), state.explained_variance_ratio(2))
    assert {r.dtype for r in results} == {torch.float32}


@pytest.mark.parametrize("op", ["update", "merge", "subtract"])
def test_an_interrupt_leaves_all_of_the_rows_or_none(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, more = correlated(20, 4), correlated(9, 4)
    state = state_of(x)
    others = {"merge": state_of(more), "subtract": state_of(x[:5])}
    for other in others.values():
        other.covariance()  # with fewer rows, the waiting rows would be copied
    native = getattr(_core, f"{op}_moments")

    def interrupted(*arguments: object) -> None:
        native(*arguments)
        raise KeyboardInterrupt  # a Ctrl-C during the call is raised when it returns

    monkeypatch.setattr(_core, f"{op}_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(state, op)(others.get(op, more))
    monkeypatch.undo()
    assert_close(state, state_of(x[5:] if op == "subtract" else torch.cat([x, more])))


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_bad_row_is_named_and_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(4, 100, 7).double()
    x[2, 31, 5] = bad
    x[3, 0, 0] = bad
    x = x.to(dtype)
    for state in (StreamingCovariance(7), state_of(correlated(20, 7))):
        before = copy.deepcopy(state)
        with pytest.raises(ValueError, match=r"row 231 of x has (nan|-?inf|1e\+200) in column 5.*unchanged"):
            state.update(x)
        assert same_bits(state, before)


FULL = state_of(correlated(20, 3))
ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "width": (
        lambda: FULL.update(torch.randn(5, 4)),
        ValueError,
        r"shape \(5, 4\); it must be \(\.\.\., 3\)",
    ),
    "scalar": (lambda: FULL.update(torch.tensor(1.0)), ValueError, r"shape \(\)"),
    "integers": (lambda: FULL.update(torch.ones(5, 3).long()), TypeError, "x is int64; allowed"),
    "numpy integers": (lambda: FULL.update(np.ones((5, 3), int)), TypeError, "x is int64; allowed"),
    "list": (lambda: FULL.update([[1.0, 2.0, 3.0]]), TypeError, "x is a list"),
    "sparse": (lambda: FULL.update(torch.ones(5, 3).to_sparse()), TypeError, "layout torch.sparse_coo"),
    "save nowhere": (lambda: FULL.save("/no/such/state"), FileNotFoundError, "there is no folder /no/such;"),
    "save over a folder": (lambda: FULL.save("."), IsADirectoryError, "is a folder"),
    "load a folder": (lambda: StreamingCovariance.load("."), ValueError, "is a folder"),
    "device": (lambda: FULL.update(torch.ones(5, 3, device="meta")), ValueError, "x is on meta.*CPU only"),
    "merge dim": (lambda: FULL.merge(StreamingCovariance(4)), ValueError, "other has dim 4.*dim 3"),
    "merge kind": (lambda: FULL.merge(torch.ones(3)), TypeError, "cannot merge a Tensor"),
    "mixed centering": (
        lambda: FULL.merge(StreamingCovariance(3, center=False)),
        ValueError,
        "centered and uncentered",
    ),
    "subtract more": (
        lambda: FULL.subtract(state_of(correlated(21, 3))),
        ValueError,
        "other holds 21 rows, this state only 20",
    ),
    "k of eigh": (lambda: FULL.eigh(4), ValueError, "k is 4, but dim is 3"),
    "k zero": (lambda: FULL.eigh(0), ValueError, "k is 0"),
    "k a float": (lambda: FULL.explained_variance_ratio(2.0), TypeError, "k is 2.0"),
    "of": (lambda: FULL.effective_rank(of="x"), ValueError, "of is 'x'"),
    "no rows, mean": (lambda: StreamingCovariance(3).mean, ValueError, "no rows"),
    "no rows, eigh": (lambda: StreamingCovariance(3).eigh(), ValueError, "no rows"),
    "dim": (lambda: StreamingCovariance(0), ValueError, "dim is 0"),
    "dim a float": (lambda: StreamingCovariance(2.0), TypeError, "dim is 2.0"),
    "rank": (lambda: StreamingCovariance(9, rank=10), ValueError, "rank is 10, but dim is 9"),
    "rank zero": (lambda: StreamingCovariance(9, rank=0), ValueError, "rank is 0"),
    "rank a float": (lambda: StreamingCovariance(9, rank=4.0), TypeError, "rank is 4.0"),
    "method": (lambda: StreamingCovariance(9, method="x"), ValueError, "method is 'x'"),
    "dtype": (lambda: StreamingCovariance(9, dtype=torch.int64), TypeError, "dtype is torch.int64"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call: Callable, kind: type[Exception], message: str) -> None:
    before = copy.deepcopy(FULL)
    with pytest.raises(kind, match=message):
        call()
    assert same_bits(FULL, before)


def test_repr() -> None:
    assert repr(FULL) == "StreamingCovariance(dim=3, count=20, center=True)"
    assert scalpel.StreamingCovariance is StreamingCovariance
