"""Fits of every kind of model: in a folder that is streamed, by the rules of relevance, without a family, on text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import prompts, same_bits
from torch import Tensor, nn

import scalpel
from decoder_cases import exact_norms, model_of
from scalpel.jacobian_lens.fitting import fit
from scalpel.jacobian_lens.sweeps.sweep import lens_matrices

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms():
        yield
    torch.set_num_threads(threads)


def test_a_folder_is_fitted_without_its_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama").float()  # in float64, bits depend on how many prompts share a product
    model.save_pretrained(tmp_path / "model")
    given = [*prompts(4), [1, 2], *prompts(2, seed=1)]
    with pytest.warns(UserWarning, match="1 of 7"):
        whole = fit(model, given, skip_first=2, progress=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)

    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        fit(tmp_path / "model", given, skip_first=2, folder=tmp_path / "lens", progress=stop)
    with pytest.warns(UserWarning, match="1 of 7"):
        lens = fit(str(tmp_path / "model"), given, skip_first=2, folder=tmp_path / "lens", progress=False)
    assert same_bits(lens, whole)
    assert lens.about["model"] == "LlamaForCausalLM" and lens.about["model_name"] == "model"
    assert lens.about["corpus_sha256"] == whole.about["corpus_sha256"]


@pytest.mark.parametrize("targets", ["after", "same"])
def test_relevance(targets: str) -> None:
    model, given = model_of("llama"), prompts(3)
    lens = fit(model, given, skip_first=2, progress=False, estimator="relevance", targets=targets)
    plain = fit(model, given, skip_first=2, progress=False, targets=targets)
    for layer in lens.J:
        each = [
            lens_matrices(
                model, torch.tensor([ids]), layers=[layer], skip_first=2, estimator="relevance", targets=targets
            )[layer]
            for ids in given
        ]
        torch.testing.assert_close(lens.J[layer].double(), torch.stack(each).mean(0), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(lens.J[layer], plain.J[layer], atol=1e-3)
    assert lens.about["estimator"] == "relevance"


class Chain(nn.Module):
    """Blocks of no family: h + W h, and a running mean of h."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h + h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None])
        return h


def test_a_model_of_no_family_against_its_closed_form() -> None:
    model = Chain()
    length, skip = 6, 1
    lens = fit(model, [list(range(length))], skip_first=skip, progress=False)
    assert lens.source_layers == [0, 1] and lens.about["target"] == 2
    mixing = torch.eye(length) + torch.tril(torch.ones(length, length)) / torch.arange(1, length + 1)[:, None]
    valid = slice(skip, length - 1)
    for layer, steps in ((0, 2), (1, 1)):
        over_positions = torch.linalg.matrix_power(mixing, steps)[valid, valid].sum() / (length - 1 - skip)
        product = torch.eye(4)
        for block in list(model.blocks)[layer + 1 :]:
            product = block.weight.detach() @ product
        torch.testing.assert_close(lens.J[layer], over_positions * product, rtol=1e-5, atol=1e-6)
    by_path = fit(model, [list(range(length))], layers=["blocks.1"], target="blocks.2", skip_first=skip, progress=False)
    torch.testing.assert_close(by_path.J["blocks.1"], lens.J[1])


def test_text_and_a_shipped_model(tmp_path: Path) -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    texts = ["x = [1, 2, [3, 4], 5]", "y = [[1], 2, [3]]"]
    (tmp_path / "text.jsonl").write_text("\n".join(f'"{text}"' for text in texts))
    lens = fit(model, tmp_path / "text.jsonl", skip_first=2, progress=False)
    ids = [torch.tensor([model.tokenizer.encode(text)]) for text in texts]
    each = [lens_matrices(model, prompt, layers=[0], skip_first=2)[0] for prompt in ids]
    torch.testing.assert_close(lens.J[0], torch.stack(each).mean(0), rtol=1e-5, atol=1e-6)
    assert lens.about["model_name"] == "bracket-mini" and not math.isnan(lens.error[0])


def test_a_negative_target_counts_from_the_last_layer(tmp_path: Path) -> None:
    model, given = model_of("llama").float(), prompts(2)
    model.save_pretrained(tmp_path)
    before_last = fit(model, given, target=1, skip_first=2, progress=False)
    for each in (model, tmp_path):
        lens = fit(each, given, target=-2, skip_first=2, progress=False)
        assert lens.about["target"] == 1 and lens.source_layers == [0] and same_bits(lens, before_last)
        with pytest.raises(ValueError, match="target is -4; the model has 3 layers"):
            fit(each, given, target=-4, skip_first=2, progress=False)
