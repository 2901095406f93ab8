"""scalpel.collect with unusual models, batches and folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from covariance_states import same_bits, state_of
from decoder_cases import model_of
from scalpel.models.marks import model_mark
from scalpel.streams.budget import state_bytes
from scalpel.streams.marks import function_mark

collect = scalpel.collect
IDS = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(0))


def chain(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 5), *modules).double()


def squares(output: Tensor, batch: Any) -> Tensor:
    return output.square().sum()


def cubes(output: Tensor, batch: Any) -> Tensor:
    return output.pow(3).sum()


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_a_module_that_changes_its_input_in_place(frozen: bool) -> None:
    model = chain(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 11)).requires_grad_(not frozen)
    states = collect(model, [IDS], ["1", "2", "1.grad"], loss=squares)
    before = model[:2](IDS).flatten(0, 1).detach()
    torch.testing.assert_close(states["1"].mean, before.mean(dim=0))
    torch.testing.assert_close(states["2"].mean, before.relu().mean(dim=0))
    slope = (2 * model[3](before.relu()) @ model[3].weight) * (before > 0)
    torch.testing.assert_close(states["1.grad"].covariance(), state_of(slope.detach()).covariance())


def test_a_module_that_runs_more_than_once() -> None:
    shared = nn.Linear(5, 5)
    model = chain(shared, nn.Tanh(), shared)
    states = collect(model, [IDS], ["1", "1.grad"], loss=squares)
    first = model[:2](IDS).flatten(0, 1).detach()
    second = model(IDS).flatten(0, 1).detach()
    assert states["1"].count == states["1.grad"].count == 24
    torch.testing.assert_close(states["1"].covariance(), state_of(torch.cat([first, second])).covariance())


class _Turned(nn.Module):
    """Values with other memory layouts: transposed and expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.turned, self.out = nn.Embedding(13, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 13)
        self.same = nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.same(self.turned(self.emb(input_ids).mT).mT)
        return self.out(x.mean(-1, keepdim=True).expand(-1, -1, 6))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_values_that_are_turned_or_expanded(batch: int, rank: int | None) -> None:
    ids = torch.randint(13, (batch, 9))
    found = scalpel.collect(
        _Turned(), [ids], ["same", "out:in", "out.grad"], rank=rank, loss=lambda logits, _: logits.sum()
    )
    assert {name: state.count for name, state in found.items()} == dict.fromkeys(found, 9 * batch)
    assert torch.equal(found["out.grad"].mean, torch.ones(13).double())


def test_padding_of_tokens_in_a_row() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.expert = nn.Embedding(11, 5), nn.Linear(5, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.expert(self.e(input_ids).reshape(-1, 5))

    mask = torch.ones_like(IDS)
    mask[1, 2:] = 0
    states = collect(Flat(), [{"input_ids": IDS, "attention_mask": mask}], ["e", "expert"])
    assert states["e"].count == states["expert"].count == 10


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, 13, (1, 5), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    hooks = ["1.resid_in", "1.resid_in.grad"]
    plain = collect(model, [ids], hooks)
    left = collect(model, [{"input_ids": padded, "attention_mask": mask}], hooks)
    for hook in hooks:
        torch.testing.assert_close(left[hook].covariance(), plain[hook].covariance(), rtol=1e-5, atol=1e-9)


def test_inference_mode_and_training_mode() -> None:
    model = build("like_csp_yolo2").train()
    ids = tokens(model, 2, 5)
    hooks = ["1.resid_in", "1.resid_in.grad"]
    plain = collect(model, [ids], hooks)
    with torch.inference_mode():
        frozen_ids = ids.clone()
        inside = collect(model, [frozen_ids], hooks)
    assert model.training
    for hook in hooks:
        assert same_bits(inside[hook], plain[hook])


# ---- batches -------------------------------------------------------------------------------------


def test_one_row_and_odd_entries() -> None:
    model = build("plain")
    ids = tokens(model, 1, 6)
    with pytest.raises(ValueError, match=r"\(6,\).*input_ids\[None\]"):
        collect(model, [ids[0]], ["final_resid"])

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(11, 5)

        def forward(self, input_ids: Tensor, n: Tensor) -> Tensor:
            return self.e(input_ids) * n

    assert collect(Odd(), [{"input_ids": IDS, "n": torch.tensor(3)}], ["e"])["e"].count == 12


def test_what_can_be_read_only_once() -> None:
    class Once:
        def __init__(self, batches: list[Tensor]) -> None:
            self._left = iter(batches)

        def __iter__(self) -> Iterator[Tensor]:
            return self._left

    model = build("plain")
    batches = [tokens(model, 2, 5, seed=i) for i in range(4)]
    assert collect(model, Once(batches), ["final_resid"])["final_resid"].count == 40
    with pytest.raises(ValueError, match="can be read only once"):
        collect(model, Once(batches), ["0.resid_in", "final_resid"], state_bytes(12, None))


def test_batches_that_come_in_another_order() -> None:
    class Shuffled:
        def __init__(self, batches: list[Tensor]) -> None:
            self.batches, self.times = batches, 0

        def __iter__(self) -> Iterator[Tensor]:
            self.times += 1
            return iter(self.batches[:: 1 if self.times < 4 else -1])

    model = build("plain")
    shuffled = Shuffled([tokens(model, 2, 5, seed=i) for i in range(4)])
    before = set(Path(tempfile.gettempdir()).glob("scalpel-*"))
    with pytest.raises(ValueError, match="batches differed when they were read again, for group 2 of 2"):
        collect(model, shuffled, ["0.resid_in", "final_resid"], state_bytes(12, None))
    assert set(Path(tempfile.gettempdir()).glob("scalpel-*")) == before  # the objects created there are gone


def test_names_however_they_are_given() -> None:
    model = build("plain")
    batches = [tokens(model, 2, 5)]
    given = ["final_resid", "0.resid_in", "0.resid_in.grad"]
    assert list(collect(model, batches, given)) == given
    assert list(collect(model, batches, (name for name in given))) == given
    assert list(collect(model, batches, set(given))) == ["0.resid_in", "final_resid", "0.resid_in.grad"]


def test_errors_name_the_stream_and_the_batch() -> None:
    model = chain(nn.Linear(5, 4))
    good = torch.where(IDS == 7, 1, IDS)
    bad = good.clone()
    bad[1, 1] = 7
    with torch.no_grad():
        model[0].weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"^1, batch 2: row 5 is not finite"):
        collect(model, [good, bad], ["1"])

    class Scores(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.ones(len(input_ids), input_ids.shape[1], input_ids.shape[1])

    with pytest.raises(ValueError, match=r"^0 is 3 wide in batch 2, and was 4"):
        collect(nn.Sequential(Scores()), [IDS, IDS[:, :3]], ["0"])
    with pytest.raises(ValueError, match=r"^0:in.grad: the values there are torch.int64"):
        collect(model, [IDS], ["0:in.grad"], loss=squares)
    for loss, words in (
        (lambda output, batch: output, "must give one number"),
        (lambda output, batch: 3.0, "must give one number"),
        (lambda output, batch: torch.ones(()), "depends on no value that has a gradient"),
    ):
        with pytest.raises(ValueError, match=words):
            collect(model, [good], ["1.grad"], loss=loss)


# ---- folders -------------------------------------------------------------------------------------


def test_another_question_in_the_same_folder(tmp_path: Path) -> None:
    model = chain(nn.Linear(5, 4))
    batch = {"input_ids": IDS, "labels": IDS}

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids)

    whole = Takes()
    collect(whole, [batch], ["inner.1.grad"], loss=squares, folder=tmp_path)
    with pytest.raises(ValueError, match="another collection .*loss"):
        collect(whole, [batch], ["inner.1.grad"], loss=cubes, folder=tmp_path)
    with pytest.raises(ValueError, match="another corpus"):
        collect(whole, [batch | {"labels": IDS + 1}], ["inner.1.grad"], loss=squares, folder=tmp_path)
    with torch.no_grad():
        model[1].weight[2, 3] += 1
    with pytest.raises(ValueError, match="another collection .*model"):
        collect(whole, [batch], ["inner.1.grad"], loss=squares, folder=tmp_path)


def test_ablations_are_not_kept_in_a_folder(tmp_path: Path) -> None:
    model = build("plain")
    with model.ablate(["0.mlp.post_act:1"], "zero"):
        assert collect(model, [tokens(model, 2, 5)], ["final_resid"])["final_resid"].count == 10
        with pytest.raises(ValueError, match="ablations in force"):
            collect(model, [tokens(model, 2, 5)], ["final_resid"], folder=tmp_path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    model = build("plain")
    batches = [tokens(model, 2, 5)]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "thesis.txt").write_text("mine")
    (tmp_path / "collect.json").write_text('{"my": "config"}')
    for fresh in (False, True):
        with pytest.raises(ValueError, match="collect.json belongs to another program"):
            collect(model, batches, ["final_resid"], folder=tmp_path, fresh=fresh)
    (tmp_path / "collect.json").unlink()
    with pytest.raises(ValueError, match="no collect.json that says of what"):
        collect(model, batches, ["final_resid"], folder=tmp_path)
    collect(model, batches, ["final_resid"], folder=tmp_path, fresh=True)
    assert (tmp_path / "done" / "thesis.txt").read_text() == "mine"


def test_a_finished_state_that_is_not_sound_is_made_again(tmp_path: Path) -> None:
    model = build("plain")
    batches = [tokens(model, 2, 5)]
    first = collect(model, batches, ["final_resid"], folder=tmp_path)["final_resid"]
    path = tmp_path / "done" / "final_resid.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(RuntimeWarning, match="a finished state is damaged and is made again"):
        again = collect(model, batches, ["final_resid"], folder=tmp_path)["final_resid"]
    assert same_bits(first, again)


def test_groups_are_part_of_what_is_resumed(tmp_path: Path) -> None:
    model = build("plain")
    batches = [tokens(model, 2, 5)]
    hooks = ["0.resid_in", "final_resid"]
    collect(model, batches, hooks, folder=tmp_path)
    with pytest.raises(ValueError, match="another collection .*groups"):
        collect(model, batches, hooks, state_bytes(12, None), folder=tmp_path)
    assert json.loads((tmp_path / "collect.json").read_text())["key"]["groups"] == [hooks]


def test_a_damaged_folder_and_another_corpus(tmp_path: Path) -> None:
    """Complete groups must not be combined with one that was filled from other batches."""
    model = build("plain")
    batches = [tokens(model, 2, 5, seed=i) for i in range(4)]
    hooks = ["0.resid_in", "final_resid"]
    collect(model, batches, hooks, state_bytes(12, None), folder=tmp_path)
    path = tmp_path / "done" / "0.resid_in.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="another corpus"):
        collect(model, batches[:3], hooks, state_bytes(12, None), folder=tmp_path)
    with pytest.warns(RuntimeWarning, match="is made again"):
        again = collect(model, batches, hooks, state_bytes(12, None), folder=tmp_path)
    assert [again[hook].count for hook in hooks] == [40, 40]


def test_marks_tell_what_matters_and_nothing_else() -> None:
    def weighted(weight: float, name: str = "x") -> Any:
        def loss(output: Tensor, batch: Any) -> Tensor:
            return weight * sum(map(lambda each: each.sum(), output))  # noqa: C417  # a nested code object

        return loss

    assert function_mark(weighted(1.0)) == function_mark(weighted(1.0)) != function_mark(weighted(2.0))
    assert " at 0x" not in function_mark(weighted(1.0))

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

    assert model_mark(Scaled(1.0)) == model_mark(Scaled(1.0).eval()) != model_mark(Scaled(2.0))
    first, other = model_of("llama"), model_of("llama")
    assert model_mark(first) == model_mark(other)
    other.config.rms_norm_eps = 0.1
    assert model_mark(first) != model_mark(other)


def test_left_padding_of_a_wrapped_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("gpt2")

        def forward(self, *given: Any, **named: Any) -> Any:
            return self.inner(*given, **named)

    ids = torch.randint(0, 13, (1, 5), generator=torch.Generator().manual_seed(1))
    batch = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]),
    }
    place = "inner.transformer.h.1:in"
    plain = collect(Wrapper(), [{"input_ids": ids}], [place])[place]
    torch.testing.assert_close(collect(Wrapper(), [batch], [place])[place].mean, plain.mean, rtol=1e-5, atol=1e-9)
