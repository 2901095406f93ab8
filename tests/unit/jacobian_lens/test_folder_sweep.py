"""The matrices of prompts whose model is read from a folder layer by layer, against those of the model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder_cases import MODELS, exact_norms, ids_of, model_of
from lens_oracle import block_jacobian, blocks_of, lens_matrix
from scalpel.jacobian_lens.sweeps import folder_sweep
from scalpel.jacobian_lens.sweeps.folder_sweep import layers_in_folder, lens_matrices_of_folder, lens_rows_of_folder
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices
from scalpel.jacobians import streamed_sweep

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SKIP = 2


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms():
        yield
    torch.set_num_threads(threads)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="4KB")
    return folder


def prompts() -> list[Any]:
    """Of several lengths, one of them padded."""
    ids = ids_of(1, 7, 3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return [ids_of(1, 8), {"input_ids": ids, "attention_mask": mask}, ids_of(1, 5, 4), ids_of(1, 8, 5)]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are read, in order."""
    numbers: list[int] = []
    plain = streamed_sweep.streamed_layers

    def counting(decoder: Any, order: Any) -> Iterator[Any]:
        for i, layer in plain(decoder, order):
            numbers.append(i)
            yield i, layer

    monkeypatch.setattr(streamed_sweep, "streamed_layers", counting)
    return numbers


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    folder = saved(model, tmp_path)
    for options in ({"skip_first": 1}, {"skip_first": SKIP, "target": 1, "estimator": "relevance"}):
        layers = [1, 0]
        found = list(lens_matrices_of_folder(folder, prompts(), layers=layers, **options))
        assert len(found) == len(prompts())
        for matrices, prompt in zip(found, prompts(), strict=True):
            right = lens_matrices(model, prompt, layers=layers, **options)
            assert list(matrices) == list(right) == [0, 1]
            assert all(torch.equal(matrices[layer], right[layer]) for layer in right)


def test_against_autograd(tmp_path: Path) -> None:
    model, ids = model_of("qwen3"), ids_of(1, 8)
    (found,) = lens_matrices_of_folder(saved(model, tmp_path), [ids], layers=[0, 1], skip_first=SKIP)
    for layer in (0, 1):
        blocks = blocks_of(model)
        full = block_jacobian(model, {"input_ids": ids}, blocks[layer], blocks[-1], 12)
        torch.testing.assert_close(found[layer], lens_matrix(full, range(SKIP, 7), "after"), **EXACT)


def test_little_memory_changes_nothing(tmp_path: Path, readings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass holds what fits, and at least one piece; the layers are read once for each pass."""
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._PIECE_BYTES", 2000)  # a few cotangents
    model = model_of("llama")
    folder = saved(model, tmp_path)
    options: dict[str, Any] = {"layers": [0, 1], "skip_first": SKIP, "targets": "same", "groups": 2}
    right = [lens_matrices(model, prompt, **options) for prompt in prompts()]
    counts = []
    for memory in (1 << 31, 20_000, 1):
        readings.clear()
        found = list(lens_matrices_of_folder(folder, prompts(), memory=memory, **options))
        for matrices, wanted in zip(found, right, strict=True):
            for layer in wanted:
                torch.testing.assert_close(matrices[layer], wanted[layer], **EXACT)
        counts.append(len(readings))
    assert counts[0] == len([0, 1]) + len([2, 1])  # once forward to the target's layer, and once back, for all prompts
    assert counts[0] < counts[1] < counts[2]


def test_layers_behind_the_last_source_are_not_read_again(tmp_path: Path, readings: list[int]) -> None:
    folder = saved(model_of("gpt2"), tmp_path)
    for layers, target, order in (([1], None, [0, 1, 2]), ([0], 1, [0, 1]), ([2], 2, [])):
        readings.clear()
        list(lens_matrices_of_folder(folder, [ids_of(1, 6)], layers=layers, target=target, skip_first=1))
        assert readings == order


def test_rows_are_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalpel.jacobians.rows.sweep._PIECE_BYTES", 2000)
    model = model_of("gpt2")
    folder = saved(model, tmp_path)
    sums = torch.zeros(4, 3, 12, 12, dtype=torch.float64)

    def see(prompt: int, layer: int, first: int, rows: Tensor) -> None:
        sums[prompt, layer, first : first + len(rows)] += rows

    options: dict[str, Any] = {"layers": [0, 2], "skip_first": SKIP}
    done = list(lens_rows_of_folder(folder, prompts(), see, memory=10_000, dimensions=slice(3, 8), **options))
    assert [number for numbers in done for number in numbers] == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts()):
        right = lens_matrices(model, prompt, **options)
        for layer in (0, 2):
            torch.testing.assert_close(sums[number, layer, 3:8], right[layer][3:8], **EXACT)
    assert not bool(sums[:, :, :3].any() or sums[:, :, 8:].any() or sums[:, 1].any())


def test_prompts_come_when_their_turn_comes(tmp_path: Path) -> None:
    folder, taken = saved(model_of("llama"), tmp_path), []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(len(taken))
            yield ids_of(1, 6, len(taken))

    found = lens_matrices_of_folder(folder, endless(), layers=[0], skip_first=1, memory=5000)
    for _ in range(3):
        next(found)
    assert len(taken) < 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(model_of("qwen3").to(dtype), tmp_path)
    # Read again, since a conversion rounds the angles of rotary positions too, which no file holds.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    for precision in (None, "bfloat16"):
        options: dict[str, Any] = {"layers": [0, 1], "skip_first": SKIP, "precision": precision}
        (found,) = lens_matrices_of_folder(folder, prompts()[:1], **options)
        right = lens_matrices(model, prompts()[0], **options)
        assert all(found[layer].dtype == torch.float32 and torch.equal(found[layer], right[layer]) for layer in right)


def test_what_is_refused(tmp_path: Path) -> None:
    folder, ids = saved(model_of("llama"), tmp_path), ids_of(1, 8)
    assert layers_in_folder(folder) == 3
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (ids, {"layers": [3]}, "there is no layer 3; the folder's model has layers 0 to 2"),
        (ids, {"layers": []}, "layers is empty"),
        (ids, {"layers": [2], "target": 1}, "layer 2 comes after the target, layer 1"),
        (ids, {"layers": [0], "memory": 0}, "memory is 0"),
        (ids, {"layers": [0], "estimator": "none"}, "estimator is 'none'"),
        (ids_of(2, 8), {"layers": [0]}, "prompt 0 holds 2 prompts"),
        (ids[:, :3], {"layers": [0]}, "the prompt has 3 tokens"),
        (ids + 40, {"layers": [0]}, "input_ids holds"),
    ]
    for prompt, options, message in cases:
        with pytest.raises(ValueError, match=message):
            list(lens_matrices_of_folder(folder, [prompt], **({"skip_first": SKIP} | options)))
    with pytest.raises(TypeError, match="'model.layers.0' stands among layers"):
        list(lens_matrices_of_folder(folder, [ids], layers=["model.layers.0"], skip_first=SKIP))  # type: ignore[list-item]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "tanh"}))
    with pytest.raises(ValueError, match="no rule for the activation 'tanh'"):
        list(lens_matrices_of_folder(folder, [ids], layers=[0], skip_first=SKIP, estimator="relevance"))
    broken = model_of("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN at '1\.resid_in'"):
        list(lens_matrices_of_folder(saved(broken, tmp_path / "broken"), [ids], layers=[0], skip_first=SKIP))


def test_matrices_count_as_memory(tmp_path: Path, readings: list[int]) -> None:
    """Prompts whose matrices don't fit beside each other go back one by one."""
    folder = saved(model_of("gpt2"), tmp_path)
    options: dict[str, Any] = {"layers": [0, 1], "skip_first": 1}
    one = len(options["layers"]) * 12 * 12 * 4
    list(lens_matrices_of_folder(folder, prompts(), memory=1 << 31, **options))
    together = len(readings)
    readings.clear()
    assert folder_sweep.MEMORY == 1 << 31
    list(lens_matrices_of_folder(folder, prompts(), memory=30 * one, **options))
    assert len(readings) > together
