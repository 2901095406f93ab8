"""The exact covariance state on a device: the stand-in on CPU tensors, and a GPU where there is one."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from covariance_states import UNIT, correlated, covariance_bound, gram_bound, sizes, within
from cuda_stand_in import Gpu
from pairs import pairs
from scalpel import StreamingCovariance, reference
from scalpel.covariance import on_device
from scalpel.covariance.exact import Exact
from scalpel.covariance.on_device import OnDevice

CPU = torch.device("cpu")
NARROW = [torch.float16, torch.bfloat16, torch.float32]
DTYPES = [*NARROW, torch.float64]
where = CPU  # the device of the running test


@pytest.fixture(autouse=True)
def _kernels(gpu: Gpu) -> None:
    global where
    where = torch.empty(0, device=gpu.device).device


@pytest.fixture
def everywhere(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], StreamingCovariance]:
    """States that treat the tensors of the stand-in as GPU tensors."""
    if not gpu.real:
        monkeypatch.setattr(on_device, "takes", lambda device: True)
    return StreamingCovariance


def on(x: Tensor, splits: list[int] | None = None, center: bool = True) -> OnDevice:
    state = OnDevice(x.shape[-1], center, where)
    for part in x.to(where).tensor_split(splits or []):
        assert state.update(part) == -1
    return state


def error(found: Tensor, expected: Tensor | np.ndarray) -> float:
    """The relative error in the Frobenius norm."""
    wanted = torch.as_tensor(expected).double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-300))


# ---- errors ------------------------------------------------------------------------------------


def heavy(rows: int, dim: int) -> Tensor:
    normal = correlated(rows, dim)
    return normal * torch.empty(rows, 1, dtype=torch.float64).exponential_().clamp_min(0.01) ** -1.2


ROWS = {
    "one row": lambda: correlated(1, 130),
    "three rows": lambda: correlated(3, 20),
    "random": lambda: correlated(1500, 20),
    "wide": lambda: correlated(70, 130, shift=0.5),
    "three tiles": lambda: correlated(33, 257),
    "means": lambda: correlated(1500, 20, shift=1000.0),
    "heavy": lambda: heavy(1500, 20),
    "two flushes": lambda: correlated(4200, 3, shift=1.0),
}


# Every kind of rows occurs with every dtype. Centering happens before the products, so it is only paired with each kind
# and each dtype.
@pytest.mark.parametrize(("name", "dtype", "center"), pairs([*ROWS], DTYPES, [True, False]), ids=str)
def test_error_against_float64(name: str, dtype: torch.dtype, center: bool, gpu: Gpu) -> None:
    """The error stays within the bound. A few rows show the error of the split itself, many rows that of adding
    blocks.
    """
    x = ROWS[name]().to(dtype)
    expected = reference.moments(x, center)
    state, exact = on(x, None, center), Exact(x.shape[1], center)
    exact.update(x)
    assert state.count == len(x)
    assert error(state.mean, expected.mean) < 1e-13
    covariance = torch.from_numpy(expected.covariance)
    assert within(state.covariance(), covariance, covariance_bound(x, center, gpu.real))
    assert within(exact.covariance(), covariance, covariance_bound(x, center, None))


def test_sums_in_float32_are_short() -> None:
    """With equal terms every sum rounds in the same direction, until it is settled or added in float64.

    The partial sums of m equal numbers c are 2c, 3c, ..., m c, so adding them is off by at most u c (m + 1) m / 2,
    which is u (m + 1) / 2 of the sum. There are three such sums of 16: of rows, of steps, and of settlings. A single
    sum of all 256 steps would be off by some 60 u: half of its terms are added to partial sums between two powers of
    two, each with an error of up to half a unit there.
    """
    x = (1 + torch.rand(64, generator=torch.Generator().manual_seed(0))).expand(4096, -1)
    found = on(x, None, False).covariance().cpu()
    expected = x[0].double()[:, None] * x[0].double()
    off = float((found / expected - 1).abs().max())
    assert off < (3 * 17 / 2 + 5) * UNIT  # 5: the parts left out of the split, and the sums of small products


@pytest.mark.parametrize("center", [True, False])
def test_bfloat16_products_are_exact(center: bool) -> None:
    """With few rows of few digits nothing is rounded, not even in float32."""
    x = torch.randint(-8, 9, (200, 30)).bfloat16()
    x[0] = -x[1:].float().sum(dim=0)  # the mean is 0
    x = x[1:] if not center else x
    assert torch.equal(on(x, None, center).covariance().cpu(), (x.double().T @ x.double()) / len(x))


def test_the_fast_precision_rounds_once(gpu: Gpu) -> None:
    x = correlated(300, 20, shift=3.0).float()
    state = OnDevice(20, True, where, "fast")
    state.update(x.to(where))
    apart = (x - x.double().mean(dim=0).float()).bfloat16()
    expected = torch.from_numpy(reference.moments(apart, center=False).covariance)
    assert within(state.covariance(), expected, gram_bound(apart, 1, gpu.real) / len(x))
    once = sizes(apart) / len(x) * 2 * 2.0**-8  # the unit roundoff of bfloat16, for both factors
    assert within(state.covariance(), torch.from_numpy(reference.moments(x).covariance), once)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-13, 1e17, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_float32_can_hold_and_not_square(scale: float, dtype: torch.dtype, center: bool, gpu: Gpu) -> None:
    x = (correlated(300, 5) * scale).to(dtype)
    expected = torch.from_numpy(reference.moments(x, center).covariance)
    assert within(on(x, [7, 100], center).covariance(), expected, covariance_bound(x, center, gpu.real, [7, 100]))


def test_constant_columns_have_exactly_no_variance() -> None:
    for dtype in DTYPES:
        x = correlated(90, 6).to(dtype)
        x[:, 2], x[:, 4] = 0.1, -1234.567
        state = on(x, [1, 7, 30])
        assert not state.covariance()[[2, 4]].any()
        assert torch.equal(state.mean[[2, 4]].cpu(), x[0, [2, 4]].double())


# ---- how rows arrive ---------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("splits", [[1], [1, 2, 3], [130], [0, 0, 200], list(range(10, 200, 10))])
def test_any_split_into_batches(splits: list[int], center: bool, gpu: Gpu) -> None:
    for dtype in (torch.float64, torch.float32):
        x = correlated(200, 21, shift=3.0).to(dtype)
        expected, found = reference.moments(x, center), on(x, splits, center)
        assert found.count == 200
        bound = covariance_bound(x, center, gpu.real, splits)
        assert within(found.covariance(), torch.from_numpy(expected.covariance), bound)
        assert error(found.mean, expected.mean) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, everywhere: Callable[[int], StreamingCovariance], gpu: Gpu) -> None:
    x = torch.randn(3, 20, 24).to(where, dtype)
    for view in (x.transpose(0, 1), x[::2], x[..., 1:14], x[..., 1:], x[..., ::2], x[:1].expand(4, -1, -1)):
        rows = view.cpu().reshape(-1, view.shape[-1])
        found, expected = everywhere(view.shape[-1]).update(view), torch.from_numpy(reference.moments(rows).covariance)
        assert within(found.covariance(), expected, covariance_bound(rows, True, gpu.real))


def test_nothing_is_shared_with_the_rows_or_the_caller() -> None:
    x = correlated(50, 4).to(where)
    state = on(x)
    before = state.covariance()
    x.zero_()
    state.mean.zero_()
    state.covariance().zero_()
    state.spectrum(2).vectors.zero_()
    assert torch.equal(state.covariance(), before) and state.mean.any() and state.spectrum(2).vectors.any()
    copied = copy.deepcopy(state)
    copied.update(x)
    copied.merge(state)
    assert torch.equal(state.covariance(), before)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e150])
@pytest.mark.parametrize("row", [0, 3, 9])
def test_rows_that_are_not_finite(row: int, value: float, dtype: torch.dtype) -> None:
    state, x = on(correlated(30, 5).to(dtype)), correlated(10, 5).to(dtype)
    before = state._moments
    # 2e150 becomes infinite unless the dtype is float64.
    x[row:, 2] = torch.tensor(value, dtype=torch.float64).to(dtype)
    assert state.update(x.to(where)) == row
    assert state._moments is before
    exact = Exact(5, True)
    assert exact.update(x) == row


def test_the_words_of_refusal(everywhere: Callable[[int], StreamingCovariance]) -> None:
    x = correlated(10, 5)
    x[4, 3] = float("nan")
    state = everywhere(5).update(correlated(30, 5).to(where))
    with pytest.raises(ValueError, match="row 4 of x has nan in column 3"):
        state.update(x.to(where))
    assert state.count == 30


def test_rows_of_two_devices() -> None:
    state = StreamingCovariance(5)
    elsewhere = OnDevice(5, True, torch.device("meta"))
    elsewhere._moments = elsewhere._moments._replace(rows=3)
    state._state = elsewhere
    with pytest.raises(ValueError, match="x is on cpu, and the rows so far were on meta"):
        state.update(correlated(30, 5))
    elsewhere._moments = elsewhere._moments._replace(rows=0)
    assert state.update(correlated(30, 5)).covariance().device == CPU


# ---- two states --------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_merge_and_subtract(center: bool) -> None:
    parts = correlated(120, 17, shift=2.0), correlated(80, 17, shift=-1.0)
    both, a, b = on(torch.cat(parts), None, center), on(parts[0], None, center), on(parts[1], None, center)
    merged = a.empty()
    merged.merge(a)
    merged.merge(b)
    assert error(merged.covariance(), both.covariance()) < 1e-13 and error(merged.mean, both.mean) < 1e-13
    merged.subtract(b)
    assert error(merged.covariance(), a.covariance()) < 1e-12 and merged.count == a.count
    merged.merge(merged)
    assert error(merged.covariance(), a.covariance()) < 1e-12 and merged.count == 2 * a.count
    merged.subtract(merged)
    assert merged.count == 0 and not merged.mean.any()
    merged.update(parts[0].to(where))
    assert torch.equal(merged.covariance(), a.covariance())


def test_a_state_of_the_cpu_joins(everywhere: Callable[[int], StreamingCovariance]) -> None:
    """Test how `moved` moves a state between devices; with the stand-in both devices are the CPU."""
    x = correlated(300, 9, shift=1.0)
    theirs = Exact(9, True)
    theirs.update(x[100:])
    ours, copied = everywhere(9).update(x[:100].to(where)), OnDevice(9, True, where)
    copied.restore(theirs.tensors())
    ours._state.merge(copied)
    assert ours.count == 300 and error(ours.covariance(), reference.moments(x).covariance) < 1e-13


# ---- spectra, summaries, files -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 2000])
def test_everything_a_state_says(rows: int, everywhere: Callable[[int], StreamingCovariance]) -> None:
    x = correlated(rows, 60, shift=5.0)
    expected = StreamingCovariance(60)
    expected._state = Exact(60, True)
    expected.update(x).covariance()
    state = everywhere(60).update(x.to(where))
    assert isinstance(state._state, OnDevice)
    assert state.covariance().device == where and state.mean.device == where
    assert error(state.covariance(), expected.covariance()) < 1e-12
    values = expected.eigenvalues()
    torch.testing.assert_close(state.eigenvalues().cpu(), values, rtol=1e-9, atol=1e-12 * float(values[0]))
    for k in (3, None):
        found, wanted = state.eigh(k), expected.eigh(k)
        torch.testing.assert_close(found.values.cpu(), wanted.values, rtol=1e-9, atol=1e-12 * float(values[0]))
        torch.testing.assert_close(found.vectors[:3].cpu(), wanted.vectors[:3], rtol=0, atol=1e-7)
    with pytest.warns(RuntimeWarning) if rows < 60 else nullcontext():
        for name in ("effective_rank", "participation_ratio", "stable_rank"):
            assert getattr(state, name)() == pytest.approx(getattr(expected, name)(), rel=1e-9)
        torch.testing.assert_close(state.explained_variance_ratio(5).cpu(), expected.explained_variance_ratio(5))
    assert float(state.principal_angles(expected, 3).max()) < 1e-6
    A, B = state.contrast(expected, 3), expected.contrast(expected, 3)
    torch.testing.assert_close(A.values.cpu(), B.values, rtol=1e-6, atol=0)


def test_leading_eigenvectors_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration starts from the last answer and succeeds again after new rows; LAPACK is not called."""
    monkeypatch.setattr(on_device, "by_lapack", None)
    scale = torch.arange(1, 301).double() ** -0.7
    state = OnDevice(300, True, where)
    for step in range(3):
        state.update((torch.randn(900, 300, dtype=torch.float64) * scale.roll(step)).to(where))
        values, vectors = state.spectrum(6)
        expected = torch.linalg.eigvalsh(state.covariance()).flip(0)[:6]
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)
        residual = vectors @ state.covariance() - values[:, None] * vectors
        assert float(residual.norm(dim=1).max()) <= 1e-5 * float(values[0])
    assert torch.equal(state.spectrum(6).vectors, vectors) and torch.equal(state.spectrum(4).vectors, vectors[:4])


def test_files_and_copies(tmp_path: Path, everywhere: Callable[[int], StreamingCovariance]) -> None:
    x = correlated(200, 11, shift=1.0).float().to(where)
    state = everywhere(11).update(x)
    state.save(tmp_path / "state")
    for each in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), StreamingCovariance.load(tmp_path / "state")):
        assert each.count == 200
        assert torch.equal(each.covariance().cpu(), state.covariance().cpu())
        assert torch.equal(each.mean.cpu(), state.mean.cpu())
        each.update(x.to(each.mean.device))
        assert state.count == 200
    empty = everywhere(3)
    empty.save(tmp_path / "empty")
    assert StreamingCovariance.load(tmp_path / "empty").count == 0


def test_a_file_is_the_cpus(tmp_path: Path) -> None:
    x = correlated(200, 11)
    state = StreamingCovariance(11)
    state._state = on(x)
    state.save(tmp_path / "state")
    loaded = StreamingCovariance.load(tmp_path / "state")
    assert isinstance(loaded._state, Exact)
    assert torch.equal(loaded.covariance(), state.covariance().cpu())
    assert loaded._state.kind() == state._state.kind()  # processes with and without a GPU can merge


# ---- on a real GPU --------------------------------------------------------------------------------


def test_a_state_follows_its_first_rows(gpu: Gpu, cuda: torch.device) -> None:
    x = correlated(600, 30, shift=1.0)
    state = StreamingCovariance(30).update(x.to(cuda))
    assert state.mean.is_cuda and state.covariance().is_cuda and state.eigh(3).vectors.is_cuda
    with pytest.raises(ValueError, match="x is on cpu, and the rows so far were on cuda:"):
        state.update(x)
    with pytest.raises(ValueError, match="x is on cuda:.*, and the rows so far were on cpu"):
        StreamingCovariance(30).update(x).update(x.to(cuda))
    with pytest.raises(ValueError, match="x is on cuda:.*, but rows are read on the CPU only"):
        StreamingCovariance(30, rank=4).update(x.to(cuda))
    both = reference.moments(torch.cat([x, 2 * x])).covariance
    for ours, theirs in ((x.to(cuda), 2 * x), (x, 2 * x.to(cuda))):
        merged = StreamingCovariance(30).update(ours).merge(StreamingCovariance(30).update(theirs))
        assert merged.mean.device == ours.device and error(merged.covariance(), both) < 1e-13
        assert StreamingCovariance(30).merge(merged).mean.device == ours.device
        assert error(merged.subtract(StreamingCovariance(30).update(theirs)).mean, x.mean(dim=0)) < 1e-11


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("rows", "dim"), [(20000, 768), (9001, 2049), (3000, 4097)])
def test_large_states(rows: int, dim: int, dtype: torch.dtype, center: bool, gpu: Gpu, cuda: torch.device) -> None:
    if not gpu.real:
        pytest.skip("too large for the stand-in")
    x = (torch.randn(rows, dim, device=cuda, dtype=torch.float64) + torch.randn(dim, device=cuda)).to(dtype)
    apart = x.double() - x.double().mean(dim=0) if center else x.double()
    expected = apart.T @ apart / rows
    first, again = on(x, None, center), on(x, None, center)
    assert torch.equal(first.covariance(), again.covariance())
    shift = x.double().mean(dim=0).float().double() if center else 0.0
    sums = gram_bound(x.double() - shift, 1 if dtype == torch.bfloat16 and not center else 3, True)
    assert within(first.covariance(), expected, (sums + 2 * UNIT * sizes(apart)) / rows)
    values, vectors = first.spectrum(8)
    residual = vectors @ first.covariance() - values[:, None] * vectors
    assert float(residual.norm(dim=1).max()) <= 1e-5 * float(values[0])
