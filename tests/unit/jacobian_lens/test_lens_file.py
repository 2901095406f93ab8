"""The published file of a lens: ours is read by the published rules, theirs by ours, and what is no lens is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scalpel
from lens_cases import lens_model
from scalpel import JacobianLens


def matrices(layers: int = 2, width: int = 4, seed: int = 0) -> dict[Any, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(width, width, generator=generator) for layer in range(layers)}


def theirs(path: Path, **changes: Any) -> Path:
    """A file as the published code writes it."""
    content = {
        "J": {layer: matrix.half() for layer, matrix in matrices().items()},
        "n_prompts": 458,
        "source_layers": [0, 1],
        "d_model": 4,
    }
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)
    return path


def test_what_is_saved_is_what_the_published_rules_read(tmp_path: Path) -> None:
    J = matrices()
    lens = JacobianLens(J, 12, error={0: 0.25, 1: math.nan}, about={"target": 2, "estimator": "jacobian"})
    path = tmp_path / "folder" / "small_jacobian_lens.pt"
    lens.save(path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"J", "n_prompts", "source_layers", "d_model"}
    assert (content["n_prompts"], content["source_layers"], content["d_model"]) == (12, [0, 1], 4)
    assert all(torch.equal(content["J"][layer], J[layer].half()) for layer in J)
    again = JacobianLens.load(path)
    assert (again.n_prompts, again.source_layers, again.d_model, again.about) == (12, [0, 1], 4, lens.about)
    assert again.error[0] == 0.25 and math.isnan(again.error[1])
    assert again.J[1].dtype == torch.float32 and torch.equal(again.J[1], J[1].half().float())
    lens.save(path, dtype=torch.float32)
    assert torch.equal(JacobianLens.load(path).J[0], J[0])
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, f"{path.name}.scalpel.json"]


def test_their_file_is_read(tmp_path: Path) -> None:
    lens = JacobianLens.load(theirs(tmp_path / "x.pt"))
    assert (lens.n_prompts, lens.about, lens.source_layers) == (458, {}, [0, 1])
    assert torch.equal(lens.J[1], matrices()[1].half().float()) and all(map(math.isnan, lens.error.values()))
    more = theirs(tmp_path / "y.pt", metadata={"target_layer": 2, "corpus": "wikitext"}, provenance={"by": "them"})
    assert JacobianLens.load(more).about == {
        "metadata": {"target_layer": 2, "corpus": "wikitext"},
        "provenance": {"by": "them"},
        "target": 2,
    }


def test_what_a_file_leaves_open_is_taken_from_the_matrices(tmp_path: Path) -> None:
    content = {"J": {1: torch.ones(4, 4), 0: torch.ones(4, 4)}, "n_prompts": None, "source_layers": None}
    torch.save(content, tmp_path / "x.pt")
    found = JacobianLens.load(tmp_path / "x.pt")
    assert found.source_layers == [0, 1] and found.n_prompts == 0 and found.d_model == 4
    assert JacobianLens.load(theirs(tmp_path / "x.pt", source_layers=torch.tensor([0, 1]))).source_layers == [0, 1]


def test_a_checkpoint_of_a_fit_is_read_as_its_mean(tmp_path: Path) -> None:
    sums = {layer: 3 * matrix for layer, matrix in matrices().items()}
    content = {"jacobian_sum": sums, "n_done": 3, "next_idx": 5, "source_layers": [0, 1], "skip_first": 4}
    torch.save(content, tmp_path / "checkpoint.pt")
    lens = JacobianLens.load(tmp_path / "checkpoint.pt")
    assert lens.n_prompts == 3 and lens.about == {"skip_first": 4}
    assert torch.allclose(lens.J[0], matrices()[0], atol=1e-6)


def test_an_identity_at_the_end_is_the_target(tmp_path: Path) -> None:
    J = {0: matrices()[0].half(), 1: torch.eye(4).half()}
    assert JacobianLens.load(theirs(tmp_path / "x.pt", J=J)).about == {"identity_slot": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"J": None}, r"has no J; it has the keys \['d_model', 'n_prompts', 'source_layers'\]"),
        ({"J": {}}, "no mapping from layers to matrices"),
        ({"source_layers": [0, 1, 2]}, r"names the layers \[0, 1, 2\] and has matrices of \[0, 1\]"),
        ({"d_model": 5}, r"has shape \(4, 4\) and dtype torch.float16; expected \(5, 5\)"),
        ({"J": {0: torch.ones(4, 16), 1: torch.ones(4, 16)}, "d_source": 16}, "is 4 × 16: it reads several streams"),
        ({"J": {0: torch.ones(4, 4), 1: torch.full((4, 4), torch.inf)}}, "layer 1 .*NaN or an infinity"),
        ({"J": {0: torch.ones(4, 4), 1: torch.ones(4, 4).long()}}, "dtype torch.int64"),
        ({"J": {0: torch.ones(()), 1: torch.ones(())}, "d_model": None}, r"has shape \(\)"),
        ({"provenance": Path("code")}, "could run code when it is loaded.*weights_only=False, in a sandbox"),
    ],
)
def test_what_is_no_lens_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        JacobianLens.load(theirs(tmp_path / "x.pt", **changes))


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    theirs(tmp_path / "x.pt", provenance=Trap())
    with pytest.raises(ValueError, match="could run code") as refused:
        JacobianLens.load(tmp_path / "x.pt")
    assert "will likely succeed" not in str(refused.value)  # what torch says of the same file without protection
    assert not (tmp_path / "ran").exists()
    for junk in (b"", b"\x80", b"hello world", b"not a file of torch", b"PK\x03\x04" + bytes(99), b"\x80\x02}q\x00."):
        (tmp_path / "junk.pt").write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.pt"):
            JacobianLens.load(tmp_path / "junk.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.pt"):
        JacobianLens.load(tmp_path / "absent.pt")


def test_what_stands_beside_another_file_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    JacobianLens(matrices(), 12, error={0: 0.25, 1: 0.5}, about={"target": 2}).save(path)
    beside = json.loads(path.with_name("x.pt.scalpel.json").read_text())
    assert beside["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    theirs(path)
    with pytest.warns(UserWarning, match=r"x\.pt\.scalpel\.json belongs to another file than x\.pt"):
        lens = JacobianLens.load(path)
    assert lens.about == {} and all(map(math.isnan, lens.error.values()))
    path.with_name("x.pt.scalpel.json").write_text("{")
    with pytest.warns(UserWarning, match="can't be read"):
        JacobianLens.load(path)


def test_too_large_an_entry_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    JacobianLens(matrices(), 12).save(path)
    before = path.read_bytes()
    J = matrices()
    J[1][0, 0] = -70000
    with pytest.raises(
        ValueError, match=r"layer 1 has an entry of 70000.*at most 65504: save with dtype=torch\.bfloat16"
    ):
        JacobianLens(J, 12).save(path)
    assert path.read_bytes() == before
    JacobianLens(J, 12).save(path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        JacobianLens(J, 12).save(path, dtype=torch.int8)


def test_layers_that_are_paths_come_back(tmp_path: Path) -> None:
    J = dict(zip(("blocks.0", "blocks.1"), matrices().values(), strict=True))
    JacobianLens(J, 2, error={"blocks.0": 0.5}).save(tmp_path / "x.pt")
    lens = JacobianLens.load(tmp_path / "x.pt")
    assert lens.source_layers == ["blocks.0", "blocks.1"] and lens.error["blocks.0"] == 0.5


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    theirs(tmp_path / "a_jacobian_lens.pt")
    names = ["README.md", "a_jacobian_lens.pt"]
    asked: list[Any] = []

    def download(repo: str, filename: str, revision: str | None = None, **options: Any) -> str:
        asked.append((repo, filename, revision, options))
        if not (tmp_path / filename).is_file():
            raise LocalEntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def listed(repo: str, revision: str | None = None, **access: Any) -> list[str]:
        assert "cache_dir" not in access  # which lists don't take
        asked.append(access)
        return names

    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    lens = JacobianLens.from_pretrained("some/lenses", revision="abc", cache_dir="there")
    assert lens.about == {"from": {"repo": "some/lenses", "filename": "a_jacobian_lens.pt", "revision": "abc"}}
    assert asked[:2] == [{}, ("some/lenses", "a_jacobian_lens.pt", "abc", {"cache_dir": "there"})]
    JacobianLens.from_pretrained("some/lenses", token="of a private one")
    assert {"token": "of a private one"} in asked
    names.append("b/b_jacobian_lens_n1000.pt")
    with pytest.raises(ValueError, match=r"has 2 files .*a_jacobian_lens\.pt, b/b_jacobian_lens_n1000\.pt"):
        JacobianLens.from_pretrained("some/lenses")
    lens.error[0] = 0.125
    lens.save(tmp_path / "ours.pt")
    assert JacobianLens.from_pretrained("some/lenses", "ours.pt").error[0] == 0.125


def test_copies_and_pickles_hold_the_matrices() -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    lens = JacobianLens({0: torch.eye(128)}, 3, error={0: 0.5}, about={"target": 1}, model=model).permuted(1)
    assert pickle.loads(pickle.dumps(lens)).J[0].equal(lens.J[0])
    assert len(pickle.dumps(lens)) < 2 * 128 * 128 * 4
    for twin in (copy.copy(lens), copy.deepcopy(lens)):
        assert twin.J[0].equal(lens.J[0]) and twin.attached.model is model and twin.about == lens.about


@pytest.mark.parametrize("kind", ["llama", "circuit"])
def test_a_lens_knows_its_model_again(kind: str, tmp_path: Path) -> None:
    model = lens_model(kind).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = scalpel.jacobian_lens.fit(model, [[1, 2, 3, 4, 5, 6]] * 2, skip_first=2, progress=False)
        fitted.save(tmp_path / "x.pt", dtype=torch.float32)
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
        again = JacobianLens.load(tmp_path / "x.pt", model)
    assert again.about == fitted.about and again.error == fitted.error
    assert torch.equal(again.readout([1, 2, 3]).jacobian.tokens, fitted.readout([1, 2, 3]).jacobian.tokens)


# ---- merging -------------------------------------------------------------------------------------

SAID = {
    "model_sha256": "a" * 64,
    "target": 2,
    "targets": "after",
    "estimator": "jacobian",
    "skip_first": 16,
    "max_tokens": 128,
    "dtype": "float32",
    "precision": None,
}


def fitted(prompts: list[Tensor], **about: Any) -> JacobianLens:
    """A lens of one layer over matrices of prompts, with its error by the definition."""
    stacked = torch.stack(prompts).double()
    mean, n = stacked.mean(0), len(prompts)
    spread = stacked.square().sum((1, 2)).mean() - mean.square().sum()
    error = math.nan if n == 1 else float((spread / ((n - 1) * mean.square().sum())).sqrt())
    return JacobianLens({0: mean.float()}, n, error={0: error}, about=SAID | about)


def test_means_are_merged_as_if_fitted_at_once() -> None:
    prompts = [each[0] for each in (matrices(1, seed=seed) for seed in range(9))]
    parts = [fitted(prompts[:4], corpus_sha256="x"), fitted(prompts[4:5]), fitted(prompts[5:], corpus_sha256="z")]
    with pytest.warns(UserWarning, match="their merger is inexact"):
        merged = parts[0].merge(*parts[1:])
    whole = fitted(prompts)
    assert merged.n_prompts == 9 and torch.allclose(merged.J[0], whole.J[0], atol=1e-6)
    assert merged.error[0] == pytest.approx(whole.error[0], rel=1e-5)
    assert merged.about == SAID | {"corpus_sha256": ["x", None, "z"]}


def test_lenses_of_a_fit_are_merged_exactly() -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    texts = ["x = [1, 2, [3, 4], 5]", "y = [[1], 2, [3]]", "z = [[[1], 2], [3, 4]]"]
    options: dict[str, Any] = {"skip_first": 2, "progress": False}
    whole = scalpel.jacobian_lens.fit(model, texts, **options)
    one, two = (scalpel.jacobian_lens.fit(model, part, **options) for part in (texts[:1], texts[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = one.merge(two)
    assert torch.equal(merged.J[0], whole.J[0]) and merged.n_prompts == 3
    assert merged.error[0] == pytest.approx(whole.error[0]) and merged.attached is one.attached
    assert merged.about["prompts_read"] == 3
    with pytest.warns(UserWarning, match="the same prompts, which now count twice"):
        two.merge(two)


@pytest.mark.parametrize("name", SAID)
def test_lenses_of_different_things_are_not_merged(name: str) -> None:
    one, two = fitted([matrices()[0]]), fitted([matrices()[1]], **{name: "other"})
    with pytest.raises(ValueError, match=rf"differ in {name} \({SAID[name]!r} and 'other'\)"):
        one.merge(two)


def test_a_control_is_never_part_of_a_merger() -> None:
    one, two = fitted([matrices()[0]]), fitted([matrices()[1]])
    for lenses in ((one, two.permuted()), (one.random(), two), (one.permuted(), two.permuted())):
        with pytest.raises(ValueError, match="include a control"):
            lenses[0].merge(*lenses[1:])


def test_what_cant_be_compared_warns_or_is_refused() -> None:
    one, unknown = fitted([matrices()[0]]), JacobianLens({0: matrices()[1]}, 458)
    with pytest.warns(UserWarning) as warned:
        merged = one.merge(unknown)
    assert any("don't all say model_sha256, target, targets" in str(each.message) for each in warned)
    assert math.isnan(merged.error[0]) and merged.n_prompts == 459
    with pytest.raises(ValueError, match=r"layers \[0\] of width 4 and \[0, 1\] of width 4"):
        one.merge(JacobianLens(matrices(), 1))
    with pytest.raises(ValueError, match=r"means over \[1, 0\] prompts"), pytest.warns(UserWarning):
        one.merge(JacobianLens({0: matrices()[0]}, 0))
