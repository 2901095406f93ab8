"""Fitting a lens: means and errors against a stack of each prompt's matrices, stopping, resuming and merging."""

from __future__ import annotations

import math
import os
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder_cases import exact_norms, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from scalpel.jacobian_lens.fits.sums import Sums
from scalpel.jacobian_lens.fitting import fit
from scalpel.jacobian_lens.lens import JacobianLens
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices, lens_rows

pytest.importorskip("transformers")
SKIP = 2


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    with exact_norms():
        return model_of("llama")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 19) for _ in range(draw.randrange(6, 10))] for _ in range(count)]


def fitted(model: Any, given: Any, **options: Any) -> JacobianLens:
    return fit(model, given, **{"skip_first": SKIP, "progress": False} | options)


def same_bits(one: JacobianLens, other: JacobianLens) -> bool:
    assert list(one.J) == list(other.J)
    equal = one.sums.norms.tobytes() == other.sums.norms.tobytes()
    return equal and all(one.sums.total(layer).tobytes() == other.sums.total(layer).tobytes() for layer in one.J)


def stack(model: Any, given: list[list[int]], layer: int) -> Tensor:
    """Each prompt's matrix, (prompts, width, width), by autograd over the whole model."""
    blocks = blocks_of(model)
    found = []
    for ids in given:
        batch = {"input_ids": torch.tensor([ids])}
        full = block_jacobian(model, batch, blocks[layer], blocks[-1], model.config.hidden_size)
        found.append(lens_matrix(full, range(SKIP, len(ids) - 1), "after"))
    return torch.stack(found)


def test_it_is_the_mean_over_prompts_and_the_error_that_of_a_mean(model: Any) -> None:
    given = prompts(5)
    lens = fitted(model, given)
    assert lens.n_prompts == 5 and list(lens.J) == lens.source_layers == [0, 1]
    for layer in (0, 1):
        each = stack(model, given, layer)
        mean = each.mean(0)
        total = torch.from_numpy(np.array(lens.sums.total(layer)))
        torch.testing.assert_close(total / 5, mean, rtol=1e-9, atol=1e-10)
        assert lens.J[layer].dtype == torch.float32
        torch.testing.assert_close(lens.J[layer].double(), mean, rtol=1e-6, atol=1e-7)
        of_the_mean = (each - mean).square().sum() / 4 / 5  # the squared standard error, over all entries
        assert lens.error[layer] == pytest.approx(float((of_the_mean / mean.square().sum()).sqrt()), rel=1e-6)


def test_prompts_weigh_the_same_whatever_their_length(model: Any) -> None:
    short, long = [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]
    both = fitted(model, [short, long])
    apart = [lens_matrices(model, torch.tensor([ids]), layers=[0], skip_first=SKIP)[0] for ids in (short, long)]
    torch.testing.assert_close(both.J[0].double(), (apart[0] + apart[1]) / 2, rtol=1e-6, atol=1e-7)


def test_one_prompt_has_no_error_and_never_stops_a_fit(model: Any) -> None:
    assert math.isnan(fitted(model, prompts(1)).error[0])
    lens = fitted(model, prompts(4), tolerance=1e9)
    assert lens.n_prompts == 2 and lens.about["stopped"]["tolerance"] == 1e9


def test_the_tolerance_stops_at_the_last_layer_to_reach_it(model: Any) -> None:
    given = prompts(12)
    errors = [fitted(model, given[:n]).error for n in range(2, 13)]
    tolerance = sorted(max(each.values()) for each in errors)[4]
    first = next(n for n, each in enumerate(errors, 2) if max(each.values()) <= tolerance)
    lens = fitted(model, given, tolerance=tolerance)
    assert lens.n_prompts == first < 12
    assert lens.error[lens.about["stopped"]["last_layer"]] == max(lens.error.values()) <= tolerance
    assert fitted(model, given, tolerance=min(max(each.values()) for each in errors) / 2).about["stopped"] is None


def test_errors_are_true_errors() -> None:
    """Over many fits of few prompts, the squared error that a fit states is that which it has, on the average."""
    generator = torch.Generator().manual_seed(0)
    true, noise = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    stated, real, fits, n = torch.zeros(3), torch.zeros(3), 400, 6
    for _ in range(fits):
        sums = Sums(range(3), 6)
        for _ in range(n):
            scale = torch.randn(3, generator=generator, dtype=torch.float64)
            with sums.adding() as prompt:
                for layer in range(3):
                    prompt.add(layer, 0, true[layer] + scale[layer] * noise[layer] * (layer + 1) / 3)
        for layer, error in sums.errors().items():
            mean = sums.mean(layer)
            stated[layer] += (error * mean.norm()) ** 2 / fits
            real[layer] += (mean - true[layer]).square().sum() / fits
    torch.testing.assert_close(stated, real.float(), rtol=0.2, atol=0)
    assert real[0] * 5 < real[2]


def test_merging_in_any_order_gives_the_bits_of_one_fit(model: Any) -> None:
    given = prompts(7)
    whole = fitted(model, given)
    parts = [fitted(model, given[:1]), fitted(model, given[1:4]), fitted(model, given[4:])]
    first, *others = (part.sums for part in parts)
    merged = first.merged(others)
    assert merged.n == 7 and merged.numbers.tolist() == list(range(7))
    assert same_bits(JacobianLens.from_sums(merged, {}), whole)
    backward = others[1].merged([others[0], first])
    assert all(backward.total(layer).tobytes() == whole.sums.total(layer).tobytes() for layer in whole.J)


# ---- stopped and resumed -------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_fit_that_was_stopped_goes_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*prompts(3), [1, 2], *prompts(3, seed=1)]
    with pytest.warns(UserWarning, match="1 of 7 prompts have fewer than 4 tokens"):
        whole = fitted(model, given)

    def stop(done: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        fitted(model, given, folder=tmp_path, progress=stop)
    flush = np.memmap.flush

    def interrupted(self: Any) -> None:
        self[...] = 7.0  # what is half written
        raise Stopped

    monkeypatch.setattr(np.memmap, "flush", interrupted)
    with pytest.raises(Stopped), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted(model, given, folder=tmp_path)
    monkeypatch.setattr(np.memmap, "flush", flush)
    assert JacobianLens.from_folder(tmp_path).n_prompts == 3
    computed = []

    def counted(*arguments: Any, **options: Any) -> Any:
        computed.append(1)
        return lens_rows(*arguments, **options)

    monkeypatch.setattr("scalpel.jacobian_lens.fits.subject.lens_rows", counted)
    with pytest.warns(UserWarning, match="1 of 7"):
        resumed = fitted(model, given, folder=tmp_path)
    assert len(computed) == 3
    assert same_bits(resumed, whole) and resumed.about["prompts_left_out"] == 1
    assert resumed.about == whole.about
    stored = JacobianLens.from_folder(tmp_path)
    assert same_bits(stored, whole) and stored.about == whole.about and stored.n_prompts == 6


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_that_is_killed_at_any_moment_ends_with_the_same_bits(model: Any, tmp_path: Path, seed: int) -> None:
    given, draw = prompts(8), random.Random(seed)
    fitted(model, given, folder=tmp_path / "warm")
    started = time.perf_counter()
    whole = fitted(model, given, folder=tmp_path / "whole")
    takes, kills = time.perf_counter() - started, 0
    for _ in range(4):
        if (child := os.fork()) == 0:  # starting a new process is slow
            try:
                fitted(model, given, folder=tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.0, 0.8) * takes)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kills
    assert same_bits(fitted(model, given, folder=tmp_path / "killed"), whole)


def test_a_folder_of_another_lens_is_refused(model: Any, tmp_path: Path) -> None:
    given = prompts(3)
    fitted(model, given, folder=tmp_path)
    for options, named in (
        ({"skip_first": 1}, "skip_first 2 there, 1 here"),
        ({"layers": [1]}, "layers"),
        ({"targets": "same"}, "targets 'after' there, 'same' here"),
        ({"target": 1}, "target 2 there, 1 here"),
    ):
        with pytest.raises(ValueError, match=named):
            fitted(model, given, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="first 3 prompts are not those"):
        fitted(model, prompts(4, seed=9), folder=tmp_path)
    with pytest.raises(ValueError, match="there are 2 prompts"):
        fitted(model, given[:2], folder=tmp_path)
    anew = fitted(model, prompts(2, seed=9), folder=tmp_path, fresh=True)
    assert same_bits(anew, fitted(model, prompts(2, seed=9)))
    more = fitted(model, prompts(2, seed=9) + given, folder=tmp_path)  # more prompts of the same corpus go on
    assert more.n_prompts == 5


def test_probes_are_each_prompts_matrix_times_a_vector(model: Any, tmp_path: Path) -> None:
    given, width = prompts(3), model.config.hidden_size
    probes = torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lens = fitted(model, given, probes=probes, folder=tmp_path)
    for layer in (0, 1):
        right = torch.einsum("pij,nj->pni", stack(model, given, layer), probes)
        torch.testing.assert_close(torch.from_numpy(lens.sums.probed[:, layer]).double(), right, rtol=1e-5, atol=1e-6)
    assert np.array_equal(JacobianLens.from_folder(tmp_path).sums.probed, lens.sums.probed)
    with pytest.raises(ValueError, match="probes"):
        fitted(model, given, probes=probes[:, 1:])


def test_layers_in_any_order_and_form(model: Any) -> None:
    both = fitted(model, prompts(2))
    for layers in ([1, 0, 1], np.array([1, 0]), range(2)):
        found = fitted(model, prompts(2), layers=layers)
        assert found.source_layers == [0, 1] and all(type(layer) is int for layer in found.source_layers)
        assert same_bits(found, both)
    assert fitted(model, prompts(2), layers=1).source_layers == [1]


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no prompt counts: 2 were read"):
        fitted(model, [[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="no prompt counts: 0 were read"):
        fitted(model, [])
    for options, named in (
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_tokens": 3}, "max_tokens is 3"),
        ({"layers": "last"}, "layers is 'last'"),
        ({"layers": [7]}, "no layer 7"),
        ({"targets": "before"}, "targets"),
        ({"estimator": "tuned"}, "estimator"),
        ({"precision": "float8"}, "precision"),
    ):
        with pytest.raises(ValueError, match=named):
            fitted(model, prompts(1), **options)
    with pytest.raises(RuntimeError, match="torch.distributed"):
        fitted(model, prompts(1), shard=True)
