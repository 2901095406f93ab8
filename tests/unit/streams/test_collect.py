"""Many streams over a corpus, compared with values recorded one by one; in groups, saved, killed and resumed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from covariance_states import same_bits, state_of
from decoder_cases import model_of
from places import SUPPORT, TABLES
from scalpel.streams.budget import bytes_of, state_bytes

collect = scalpel.collect
HOOKS = ["0.resid_in", "1.mlp.post_act", "final_resid", "0.resid_in.grad", "1.attn.act_in.grad"]


def corpus(model: nn.Module, count: int = 5, rows: int = 3) -> list[Tensor]:
    return [tokens(model, rows, 7, seed=i) for i in range(count)]


def expected(model: Any, batches: list[Tensor], hook: str) -> Tensor:
    """The rows of a CircuitGPT, computed slowly: each batch by itself, and gradients by backward()."""
    found = []
    for ids in batches:
        with torch.enable_grad():
            logits, acts = model.run_with_cache(ids)
            value = acts[hook.removesuffix(".grad")]
            if hook.endswith(".grad"):
                value.retain_grad()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
                loss.backward()
                value = value.grad
        found.append(value.detach().flatten(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("center", [True, False])
def test_a_circuitgpt(center: bool) -> None:
    model = build("like_csp_yolo2")
    batches = corpus(model)
    states = collect(model, batches, HOOKS, center=center)
    assert list(states) == HOOKS
    for hook, state in states.items():
        rows = expected(model, batches, hook)
        assert state.count == len(rows) == 5 * 3 * 7
        torch.testing.assert_close(state.covariance(), state_of(rows, None, center).covariance(), rtol=0, atol=1e-12)
        torch.testing.assert_close(state.mean, rows.mean(dim=0), rtol=0, atol=1e-12)


def test_frozen_weights_have_gradients_too() -> None:
    model, frozen = build("like_csp_yolo2"), build("like_csp_yolo2").requires_grad_(False)
    states = [collect(each, corpus(each), HOOKS) for each in (model, frozen)]
    for hook in HOOKS:
        torch.testing.assert_close(states[0][hook].covariance(), states[1][hook].covariance(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_with_padding(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 1:] = 0
    hooks = ["1.resid_in", "0.mlp.resid_delta", "1.resid_in.grad"]
    states = collect(model, [{"input_ids": ids, "attention_mask": mask}], hooks)
    rows: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        alone = collect(model, [ids[i : i + 1, :length]], hooks, center=False)
        for hook in hooks:
            rows[hook].append(alone[hook].covariance() * length)
    for hook in hooks:
        state = states[hook]
        assert state.count == int(mask.sum())
        second = (state.covariance() + torch.outer(state.mean, state.mean)) * state.count
        torch.testing.assert_close(second, sum(rows[hook]), rtol=1e-6, atol=1e-8)


def test_any_module_and_its_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 11)).double()
    batches = [torch.randint(0, 11, (2, 6)) for _ in range(3)]
    states = collect(model, batches, ["1", "3:in", "2.grad"], loss=lambda output, batch: output.square().sum())
    middle = torch.cat([model[:2](ids).flatten(0, 1) for ids in batches]).detach()
    torch.testing.assert_close(states["1"].covariance(), state_of(middle).covariance())
    torch.testing.assert_close(states["3:in"].covariance(), state_of(middle.tanh()).covariance())
    slope = 2 * model[3](middle.tanh()) @ model[3].weight
    torch.testing.assert_close(states["2.grad"].covariance(), state_of(slope.detach()).covariance())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_patterns_name_activations_and_gradients() -> None:
    model = build("plain")
    states = collect(model, corpus(model, 1), r"\d\.resid_in(\.grad)?")
    assert list(states) == ["0.resid_in", "1.resid_in", "0.resid_in.grad", "1.resid_in.grad"]
    assert list(collect(model, corpus(model, 1), lambda name: name == "final_resid")) == ["final_resid"]
    assert list(collect(model, corpus(model, 1), ["blocks.1.hook_resid_pre"])) == ["blocks.1.hook_resid_pre"]


def test_sketches_and_narrow_hooks() -> None:
    model = build("like_csp_yolo2")
    states = collect(model, corpus(model), HOOKS[:2], rank=20)
    assert [state.rank for state in states.values()] == [min(20, state.dim) for state in states.values()]


# ---- groups --------------------------------------------------------------------------------------


def test_groups_give_the_same_bits(tmp_path: Path) -> None:
    model = build("like_csp_yolo2")
    batches = corpus(model)
    whole = collect(model, batches, HOOKS)
    size = max(state_bytes(state.dim, None) for state in whole.values())
    seen: list[int] = []
    grouped = collect(model, batches, HOOKS, memory=2 * size, progress=seen.append)
    assert list(grouped) == HOOKS and len(grouped) == 5 and seen[-1] >= 2 * len(batches)
    for hook in HOOKS:  # without gradients in its group, a hook's values differ by rounding
        torch.testing.assert_close(grouped[hook].covariance(), whole[hook].covariance(), rtol=0, atol=1e-13)
    folder = grouped._saved.folder  # type: ignore[attr-defined]
    assert folder.is_dir()
    del grouped
    gc.collect()
    assert not folder.exists()
    kept = collect(model, batches, HOOKS, memory=size, folder=tmp_path / "kept")
    again = collect(model, batches, HOOKS, memory=size, folder=tmp_path / "kept")
    assert all(same_bits(kept[hook], again[hook]) for hook in HOOKS)
    with pytest.raises(KeyError):
        kept["2.resid_in"]


def test_memory_in_words() -> None:
    assert bytes_of("8GiB") == 8 * 2**30 and bytes_of("1.5 MB") == 1500000 and bytes_of(77) == bytes_of("77") == 77
    for bad in ("8 giga", "", "-1GiB", True, None, 0):
        with pytest.raises(ValueError, match="give bytes, or a text such as '8GiB'"):
            bytes_of(bad)  # type: ignore[arg-type]


# ---- saved ---------------------------------------------------------------------------------------

# One forked process per collection that is killed, because starting a new process is slow.
KILLED = """
import json, os, signal, sys
import torch
sys.path[:0] = sys.argv[1:]
torch.set_num_threads(1)
import scalpel
import scalpel._resume as resume
import scalpel.streams.saved as saved
from circuitgpt_cases import build
from test_collect import HOOKS, corpus

def run(folder, at, where, memory):
    steps = []
    def stop(done):
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
    if where:
        modules = [module for module in (saved, resume) if hasattr(module, where)]
        real = getattr(modules[0], where)
        def stopped(*given):
            steps.append(1)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)
        for module in modules:
            setattr(module, where, stopped)
        stop = False
    model = build("like_csp_yolo2")
    scalpel.collect(model, corpus(model, 11), HOOKS, memory, folder=folder, save_every=3, progress=stop)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(*json.loads(line))
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Kill = Callable[..., None]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    """Collect into a folder, and be killed at a batch, or at a call of a function that writes its states."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(SUPPORT), str(TABLES), str(Path(__file__).parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def killed(folder: Path, at: int, where: str = "", memory: int = 2**30) -> None:
        print(json.dumps([str(folder), at, where, memory]), file=to, flush=True)
        assert back.readline() == f"{-signal.SIGKILL}\n"

    yield killed
    to.close()
    assert process.wait(60) == 0
    back.close()


@pytest.mark.parametrize(
    ("at", "where"),
    [(2, ""), (7, ""), (11, ""), (4, "replace_text"), (5, "replace_text"), (3, "replace_text"), (2, "flush")],
)
def test_killed_and_resumed_to_the_same_bits(tmp_path: Path, at: int, where: str, kill: Kill) -> None:
    model = build("like_csp_yolo2")
    whole = collect(model, corpus(model, 11), HOOKS, folder=tmp_path / "whole", save_every=3)
    folder = tmp_path / "killed"
    kill(folder, at, where)
    ran: list[int] = []
    found = collect(model, corpus(model, 11), HOOKS, folder=folder, save_every=3, progress=ran.append)
    assert ran[-1] == 11
    assert all(same_bits(found[hook], whole[hook]) for hook in HOOKS)
    assert not list(folder.glob("at-*"))


def test_killed_in_the_second_group(tmp_path: Path, kill: Kill) -> None:
    model = build("like_csp_yolo2")
    size = state_bytes(48, None)
    whole = collect(model, corpus(model, 11), HOOKS, size, folder=tmp_path / "whole", save_every=3)
    assert not isinstance(whole, dict)
    kill(tmp_path / "killed", 19, memory=size)
    found = collect(model, corpus(model, 11), HOOKS, size, folder=tmp_path / "killed", save_every=3)
    assert all(same_bits(found[hook], whole[hook]) for hook in HOOKS)


def test_a_finished_folder_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("like_csp_yolo2")
    batches = corpus(model)
    first = collect(model, batches, HOOKS, folder=tmp_path)
    monkeypatch.setattr("scalpel.streams.collecting._Filling.fill", lambda *_: pytest.fail("it was made again"))
    again = collect(model, batches, HOOKS, folder=tmp_path)
    assert all(same_bits(first[hook], again[hook]) for hook in HOOKS)
    with pytest.raises(ValueError, match="holds states of another corpus"):
        collect(model, batches[:4], HOOKS, folder=tmp_path)
    with pytest.raises(ValueError, match="another collection .*center"):
        collect(model, batches, HOOKS, folder=tmp_path, center=False)
    other = build("like_csp_yolo2", seed=1)
    with pytest.raises(ValueError, match="another collection .*model"):
        collect(other, batches, HOOKS, folder=tmp_path)


def test_an_unsound_state_is_refused_and_the_one_before_is_used(tmp_path: Path, kill: Kill) -> None:
    model = build("like_csp_yolo2")
    whole = collect(model, corpus(model, 11), HOOKS, folder=tmp_path / "whole", save_every=3)

    def damaged(folder: Path, change: Any) -> None:
        kill(folder, 8)
        generations = sorted(folder.glob("at-*"))
        assert [path.name[-2:] for path in generations] == ["03", "06"]
        change(generations[-1])
        with pytest.warns(RuntimeWarning, match="at-0000-000000006 is damaged and not used"):
            found = collect(model, corpus(model, 11), HOOKS, folder=folder, save_every=3)
        assert all(same_bits(found[hook], whole[hook]) for hook in HOOKS)

    def truncate(generation: Path) -> None:
        path = next(generation.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-9])

    def foreign(generation: Path) -> None:
        next(generation.glob("*.safetensors")).write_bytes(b"not a state")

    damaged(tmp_path / "truncated", truncate)
    damaged(tmp_path / "foreign", foreign)
    damaged(tmp_path / "headless", lambda generation: (generation / "position.json").unlink())
    kill(tmp_path / "all", 8)
    for generation in (tmp_path / "all").glob("at-*"):
        truncate(generation)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match="all states in .* are damaged: .*fresh=True to collect anew"),
    ):
        collect(model, corpus(model, 11), HOOKS, folder=tmp_path / "all", save_every=3)
    found = collect(model, corpus(model, 11), HOOKS, folder=tmp_path / "all", save_every=3, fresh=True)
    assert all(same_bits(found[hook], whole[hook]) for hook in HOOKS)


def test_another_corpus_is_not_mixed_in(tmp_path: Path, kill: Kill) -> None:
    model = build("like_csp_yolo2")
    kill(tmp_path, 8)
    with pytest.raises(ValueError, match="the first 6 batches are not those that the saved states were made of"):
        collect(model, corpus(model, 11)[::-1], HOOKS, folder=tmp_path, save_every=3)
    with pytest.raises(ValueError, match="there are 4 batches, and the saved states were made of the first 6"):
        collect(model, corpus(model, 4), HOOKS, folder=tmp_path, save_every=3)
    (tmp_path / "collect.json").unlink()
    with pytest.raises(ValueError, match=r"holds at-0000-\d+, but no collect.json"):
        collect(model, corpus(model, 11), HOOKS, folder=tmp_path, save_every=3)


def test_the_files_hold_no_text(tmp_path: Path, kill: Kill) -> None:
    kill(tmp_path, 8)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"collect.json", "position.json", *(f"{hook}.safetensors" for hook in HOOKS)}
    told = json.loads(next(tmp_path.glob("at-*/position.json")).read_text())
    assert set(told) == {"batches", "digest", "streams"}


# ---- errors --------------------------------------------------------------------------------------


def test_errors() -> None:
    model = build("plain")
    batches = corpus(model, 2)

    def once() -> Iterator[Tensor]:
        yield from batches

    size = state_bytes(12, None)
    for call, kind, words in (
        (lambda: collect(model, batches, ["0.resid_on"]), ValueError, "unknown hook '0.resid_on'.*0.resid_in"),
        (lambda: collect(model, batches, "nothing"), ValueError, "hooks matches none of 0.resid_in"),
        (lambda: collect(model, batches, "("), ValueError, "not a regular expression"),
        (lambda: collect(model, batches, [3]), TypeError, "hooks must be names"),
        (lambda: collect(model, [], ".*"), ValueError, "batches is empty"),
        (lambda: collect(model, ["text"], ".*"), TypeError, "input_ids is str.*int64 tensor"),
        (lambda: collect(model, [{"ids": batches[0]}], ".*"), ValueError, "it must have input_ids"),
        (lambda: collect(model, batches, ".*", "1KiB"), ValueError, "its state takes .*more than memory='1KiB'"),
        (lambda: collect(model, once(), ".*", 2 * size), ValueError, "batches can be read only once: give a list"),
        (lambda: collect(model, batches, ".*", save_every=0), ValueError, "save_every is 0"),
        (lambda: collect(model, batches, ".*", shard=True), RuntimeError, "needs a torch.distributed job"),
        (lambda: collect(nn.Linear(3, 3), [torch.ones(2, 3)], ["nothing"]), ValueError, "unknown hook 'nothing'"),
    ):
        with pytest.raises(kind, match=words):
            call()
    assert len(collect(model, once(), ["final_resid"])) == 1


def test_a_model_that_is_no_language_model_needs_a_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="give loss="):
        collect(model, [torch.ones(2, 3)], ["0.grad"])
