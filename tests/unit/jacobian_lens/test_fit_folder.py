"""The folder of a fit when things go wrong: files cut short, other fits, prompts read ahead, lenses made before."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitgpt_cases import build
from decoder_cases import model_of
from scalpel.jacobian_lens.fits import subject
from scalpel.jacobian_lens.fits.folder import alone_in
from scalpel.jacobian_lens.fits.sums import Sums
from scalpel.jacobian_lens.fitting import fit
from scalpel.jacobian_lens.lens import JacobianLens


@pytest.fixture(scope="module")
def model() -> Any:
    return build("like_csp_yolo2")


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 7) for _ in range(7)] for _ in range(count)]


def fitted(model: Any, given: Any, **options: Any) -> JacobianLens:
    return fit(model, given, **{"skip_first": 2, "progress": False} | options)


def same(one: JacobianLens, other: JacobianLens) -> bool:
    return one.n_prompts == other.n_prompts and all(torch.equal(one.J[layer], other.J[layer]) for layer in one.J)


def test_files_that_were_cut_short_or_are_missing_are_never_read_as_zeros(model: Any, tmp_path: Path) -> None:
    right = fitted(model, prompts(3), folder=tmp_path / "whole")
    current = "sums-b.f64"  # the third prompt went to this one
    for name, cut in ((current, 8), (current, None), ("norms.f64", 8), ("norms.f64", None)):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        if cut is None:
            (folder / name).unlink()
        else:
            with (folder / name).open("r+b") as file:
                file.truncate(cut)
        with pytest.raises(ValueError, match=f"{name} has {cut or 0} bytes"):
            JacobianLens.from_folder(folder)
        with pytest.raises(ValueError, match="fresh=True"):
            fitted(model, prompts(3), folder=folder)
        assert same(fitted(model, prompts(3), folder=folder, fresh=True), right)
        shutil.rmtree(folder)


def test_lenses_keep_their_matrices_when_the_folder_gets_more_prompts(model: Any, tmp_path: Path) -> None:
    before = fitted(model, prompts(2), folder=tmp_path)
    read = JacobianLens.from_folder(tmp_path)
    after = fitted(model, prompts(5), folder=tmp_path)
    assert same(before, fitted(model, prompts(2))) and same(read, before)
    assert same(after, fitted(model, prompts(5))) and same(JacobianLens.from_folder(tmp_path), after)


def test_a_lens_of_a_fit_that_is_under_way_says_when_its_sums_are_gone(model: Any, tmp_path: Path) -> None:
    read: list[JacobianLens] = []

    def look(done: int) -> None:
        if done == 4:
            read.append(JacobianLens.from_folder(tmp_path))
            read[0].J[0]  # nothing has happened to it yet

    fitted(model, prompts(6), folder=tmp_path, progress=look)
    with pytest.raises(RuntimeError, match="4 prompts then, 6 now"):
        read[0].J[0]
    with pytest.raises(RuntimeError, match="read the folder again"):
        read[0].merge(JacobianLens.from_folder(tmp_path))


def test_two_fits_of_one_folder_at_once_are_refused(model: Any, tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(RuntimeError, match="another fit is adding"):
        fitted(model, prompts(2), folder=tmp_path)
    assert fitted(model, prompts(2), folder=tmp_path).n_prompts == 2


def test_fits_by_other_numbers_of_processes_are_not_added_up(model: Any, tmp_path: Path) -> None:
    for part in ("rank-0-of-2", "rank-1-of-2"):
        fitted(model, prompts(2), folder=tmp_path / part)
    assert JacobianLens.from_folder(tmp_path).n_prompts == 4
    fitted(model, prompts(2), folder=tmp_path / "rank-0-of-3")
    with pytest.raises(ValueError, match="several fits, rank-.-of-2 and rank-.-of-3"):
        JacobianLens.from_folder(tmp_path)


def test_a_matrix_with_nan_is_refused_and_spoils_no_folder(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            slope = (x[:, :1, :1] - 6).clamp(min=0)  # 0 with an infinite root's slope unless the prompt begins with 7
            return x + slope.sqrt()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.arange(9.0)[:, None].repeat(1, 3))
            self.blocks = torch.nn.ModuleList([Block(), Block(), Block()])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = block(x)
            return x

    good, bad = [7, 1, 2, 3, 4], [6, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"prompt 1 \(counted from 0\) at layer 0 holds NaN"):
        fitted(Model(), [good, bad, good], folder=tmp_path, skip_first=0)
    assert JacobianLens.from_folder(tmp_path).n_prompts == 1


def test_a_streamed_fit_that_is_stopped_behind_a_short_prompt_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama").float()
    model.save_pretrained(tmp_path / "model")
    given = prompts(8)
    given[6] = [1, 2]  # it is read ahead, while the ones before it are still to be added
    run, commit, done = subject.lens_rows_of_folder, Sums.commit, []
    memory = 4 * 3 * 7 * model.config.hidden_size * 4 * 2  # three prompts at a time
    monkeypatch.setattr(subject, "lens_rows_of_folder", lambda *a, **o: run(*a, **o, memory=memory))

    def dying(sums: Any, adding: Any, digest: str) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(digest)
        commit(sums, adding, digest)

    with pytest.warns(UserWarning, match="1 of 8"):
        right = fitted(tmp_path / "model", given)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Sums, "commit", dying)
        fitted(tmp_path / "model", given, folder=tmp_path / "lens")
    with pytest.warns(UserWarning, match="1 of 8"):
        again = fitted(tmp_path / "model", given, folder=tmp_path / "lens")
    assert same(again, right) and right.n_prompts == 7
    # prompts that were read ahead when a fit stops are none of the lens's
    streamed, whole = (fitted(source, given, tolerance=9.0) for source in (tmp_path / "model", model))
    said = ("corpus_sha256", "prompts_read", "prompts_left_out")
    assert [streamed.about[name] for name in said] == [whole.about[name] for name in said] and streamed.n_prompts == 2
