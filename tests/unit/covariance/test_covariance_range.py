"""Rows and spectra near the limits of the number formats, and directions that first appear late."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cases import FLOAT32_SUMS
from covariance_states import assert_close, same_bits, state_of
from scalpel import StreamingCovariance, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCALES = [1e-40, 1e-30, 1e-20, 1e-13, 1e14, 1e17, 1e25, 1e37]


# Centering does not interact with the scale, so each dtype and scale is tested with one of the two choices, in turn.
@pytest.mark.parametrize(
    ("scale", "dtype", "center"),
    [
        (scale, dtype, (i + j) % 2 == 0)
        for i, scale in enumerate(SCALES)
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_rows_that_float32_can_hold_and_not_square(scale: float, dtype: torch.dtype, center: bool, target: str) -> None:
    x = (normal(2100, 5) * scale).to(dtype)
    expected = reference.moments(x, center).covariance
    for state in (state_of(x, None, center), state_of(x, [7, 1030], center)):
        found = state.covariance().numpy()
        assert np.abs(found - expected).max() <= FLOAT32_SUMS * np.abs(expected).max()
    for method in ("tracker", "frequent_directions"):
        sketch = StreamingCovariance(5, 5, method, center).update(x)
        assert np.abs(sketch.covariance().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def test_columns_of_unrelated_scales() -> None:
    x = (normal(3000, 4) * torch.tensor([1e12, 1.0, 1e-6, 0.0])).float()
    expected = reference.moments(x).covariance
    found = state_of(x).covariance().numpy()
    assert np.abs(found - expected).max() <= FLOAT32_SUMS * np.abs(expected).max()
    assert abs(found[1, 1] / expected[1, 1] - 1) < FLOAT32_SUMS and found[3, 3] == 0


@pytest.mark.parametrize("scale", [1e-120, 1e-60, 1e60, 1e100])
def test_measures_do_not_overflow(scale: float) -> None:
    x = normal(300, 8) * torch.linspace(1, 4, 8).double()
    plain, scaled = state_of(x), state_of(x * scale)
    for name in ("participation_ratio", "effective_rank", "stable_rank"):
        assert getattr(scaled, name)() == pytest.approx(getattr(plain, name)(), rel=1e-9), name
    waiting = StreamingCovariance(400).update(normal(9, 400) * scale)
    with pytest.warns(RuntimeWarning):
        assert 7 < waiting.participation_ratio() < 9


@pytest.mark.parametrize("method", ["tracker", "frequent_directions"])
def test_small_rows_after_large_ones(method: str) -> None:
    large, small = (normal(2000, 40) * 1e30).float(), normal(2000, 40, seed=1).float()
    for first, second in ((large, small), (small, large)):
        sketch = StreamingCovariance(40, 4, method).update(first).update(second)
        best = state_of(torch.cat([first, second]).double()).eigh(4).values
        values = sketch.eigh().values
        assert values.isfinite().all() and 0.5 < float(values[0] / best[0]) < 1.5


# ---- what is new and orthogonal ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.1, 3.0, 1e6])
@pytest.mark.parametrize("center", [True, False])
def test_a_direction_that_comes_later_is_found(factor: float, center: bool) -> None:
    dim, k = 300, 4
    scale = torch.arange(1, dim + 1).double() ** -0.5
    scale[200:] = 0
    state = StreamingCovariance(dim, center=center).update(normal(4096, dim) * scale)
    before = state.eigh(k).values
    late = torch.zeros(4096, dim).double()
    late[:, 250] = normal(4096, seed=1) * (2 * factor * float(before[-1])) ** 0.5
    state.update(late)
    values, vectors = state.eigh(k)
    expected = torch.linalg.eigvalsh(state.covariance()).flip(0)[:k]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)
    assert float(vectors[:, 250].abs().max()) > 0.9
    assert state.stable_rank() == pytest.approx(float(state.covariance().trace() / expected[0]), rel=1e-4)


def test_classes_that_come_one_after_the_other() -> None:
    """One-hot rows: every new class is orthogonal to everything before it."""
    state = StreamingCovariance(512, center=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        classes = torch.randint(20 * step, 20 * step + 30, (1024,), generator=generator)
        state.update(torch.eye(512)[classes] * (1 + step))
        values = state.eigh(4).values
        expected = torch.linalg.eigvalsh(state.covariance()).flip(0)[:4]
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=0)


def test_the_same_question_has_the_same_answer() -> None:
    state = state_of(normal(2000, 300))
    first, again, fewer = state.eigh(8), state.eigh(8), state.eigh(5)
    assert torch.equal(first.vectors, again.vectors) and torch.equal(first.vectors[:5], fewer.vectors)
    first.vectors.zero_()
    assert torch.equal(again.vectors, state.eigh(8).vectors)
    state.update(normal(1, 300))
    assert not torch.equal(again.values, state.eigh(8).values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    state = state_of(normal(1100, 300))
    sketch = StreamingCovariance(300, 5).update(normal(3000, 300).float())
    torch.set_default_dtype(dtype)
    try:
        values = state.eigh(4).values
        assert sketch.update(normal(3000, 300).float()).eigh().vectors.dtype == torch.float64
        StreamingCovariance(6).update(normal(9, 6)).eigh(2)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(state.covariance()).flip(0)[:4], rtol=1e-3, atol=0)


def test_signs_are_fixed_in_the_dtype_that_is_returned() -> None:
    for seed in range(50):
        x = normal(40, 2, seed=seed)
        state = StreamingCovariance(2, center=False, dtype=torch.float32).update(torch.cat([x, x.flip(1)]))
        vectors = state.eigh().vectors
        peaks = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        assert (peaks > 0).all()


def test_what_changes_nothing_changes_nothing() -> None:
    state = StreamingCovariance(600).update(normal(500, 600).float())
    bad = normal(3, 600)
    bad[1, 1] = float("nan")
    with pytest.raises(ValueError, match="row 1 of x has nan"):
        state.update(bad)  # another dtype, so the waiting rows continue to wait
    state.update(torch.empty(0, 600, dtype=torch.float64))
    assert state._state._counts.tolist() == [0, 500]  # type: ignore[attr-defined]
    one = StreamingCovariance(600).update(normal(500, 600).float())
    more = normal(700, 600, seed=1).float()
    assert same_bits(state.update(more), one.update(more))


def test_memory_of_a_wide_sketch_stays_small() -> None:
    sketch = StreamingCovariance(60000, 32).update(normal(5, 60000))
    values, vectors = sketch.eigh()  # a square matrix of that width would take 27 GB
    assert vectors.shape == (32, 60000) and not values[5:].any()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(32, dtype=torch.float64))


def test_sketches_whose_files_were_changed(tmp_path: Path) -> None:
    from safetensors import safe_open

    from scalpel.covariance import file

    sketch = StreamingCovariance(9, 3).update(normal(50, 9))
    sketch.save(tmp_path / "state")
    with safe_open(str(tmp_path / "state"), framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["kind"] == file.KIND
    header, tensors = file.read(tmp_path / "state")
    for change, words in (
        ({"directions": tensors["directions"].flip(0)}, "not those of a sketch"),
        ({"directions": tensors["directions"].repeat(5, 1)}, "directions has shape"),
        ({"energy": -tensors["energy"]}, "not those of a sketch"),
    ):
        file.write(tmp_path / "changed", header, tensors | change)
        with pytest.raises(ValueError, match=words):
            StreamingCovariance.load(tmp_path / "changed")
    save_file(tensors, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not one that StreamingCovariance.save wrote"):
        StreamingCovariance.load(tmp_path / "foreign")


def test_fold_and_merge_of_rows_that_wait() -> None:
    parts = [normal(n, 1500, seed=n) for n in (700, 900, 40)]
    states = [StreamingCovariance(1500).update(part) for part in parts]
    merged = states[0].merge(states[1]).merge(states[2])
    assert_close(merged, state_of(torch.cat(parts)))
