"""The package's whole GPU path, tested on a simulated device (elsewhere.py)."""

import copy
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lanes_cases as lanes
import scalpel
import scalpel.jacobians.derivative as derivative
from analysis_cases import SIZES
from circuitgpt_cases import build, tokens
from cuda_stand_in import NO_GPU
from decoder_cases import MODELS, exact_norms, ids_of, model_of
from elsewhere import DEVICE, device_with, elsewhere
from places import ROOT
from scalpel._native import cuda_core, memory_of, runs_on
from scalpel.analysis import analyze, source
from scalpel.circuits import Schedule, ablation_effects, bracket_counting, node_hooks
from scalpel.circuits.ablations import substitute
from scalpel.circuits.masks import learn_masks
from scalpel.circuits.task import answer_logits
from scalpel.cli import bench


@pytest.fixture(autouse=True, params=["pretended", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The simulated device, and a GPU where there is one."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and runs_on(DEVICE)):
            pytest.skip(NO_GPU)
        monkeypatch.setitem(globals(), "elsewhere", lambda x: x.to(DEVICE))
        yield
        return
    with device_with(request.getfixturevalue("stand_in"), monkeypatch):
        yield


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.device == DEVICE
    lanes.close(found.cpu(), expected)


# ---- the device itself ---------------------------------------------------------------------------


def test_it_keeps_pytorchs_rules(request: pytest.FixtureRequest) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU keeps them by itself, in other words")
    x = torch.randn(3, 4, device="cuda")
    assert x.device == DEVICE and x.is_cuda and not x.is_cpu and (x @ x.mT).device == DEVICE
    assert torch.arange(3, device=DEVICE).tolist() == [0, 1, 2] and float(x.sum()) == float(x.cpu().sum())
    assert type(x.cpu()) is torch.Tensor and torch.equal(x.cpu().to(DEVICE).cpu(), x.cpu())
    y = x.double()
    assert y.device == DEVICE and y.add_(1) is y and x.to(DEVICE) is x
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="should be on the CPU"):
        torch.randn(4)[torch.arange(2, device="cuda")]
    with pytest.raises(TypeError, match="cuda"):
        x.numpy()
    with pytest.raises(AssertionError, match="memory of the CPU"):
        cuda_core().topk_mask(memory_of(torch.ones(2, 3)), 1, False, memory_of(x, "out", DEVICE), (0, 0))


# ---- TopK, Jacobians -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["topk_mask", "keep_topk", "topk_indices"])
def test_topk(op: str) -> None:
    x = torch.randn(4, 50)
    found = getattr(scalpel, op)(elsewhere(x), 5)
    assert found.device == DEVICE and torch.equal(found.cpu(), getattr(scalpel, op)(x, 5))
    with pytest.raises(ValueError, match="out"):
        getattr(scalpel, op)(elsewhere(x), 5, out=found.cpu())


def check_jacobian(model: Any, there: Any, ids: torch.Tensor, ends: tuple[str, ...], ids_there: torch.Tensor) -> None:
    expected, found = scalpel.jacobian(model, ids, *ends), scalpel.jacobian(there, ids_there, *ends)
    V, U = (torch.randn(3, *shape, dtype=torch.float64) for shape in (expected.source_shape, expected.target_shape))
    same(found.jvp(elsewhere(V)), expected.jvp(V))
    same(found.vjp(elsewhere(U)), expected.vjp(U))
    same(found.svd(2)[1], expected.svd(2)[1])
    with pytest.raises(ValueError, match="move V there"):
        found.jvp(V)


@pytest.mark.parametrize("case", ["like_csp_yolo2", "positions_concatenated_rms"])
def test_the_jacobian_of_a_circuitgpt(case: str) -> None:
    model, there = build(case), elsewhere(build(case))
    ids = tokens(model)
    check_jacobian(model, there, ids, (), ids)  # tokens move to the model's device
    expected = scalpel.lyapunov(model, ids, 3)
    found = scalpel.lyapunov(there, ids, 3)
    lanes.close(found.log_singular_values, expected.log_singular_values)
    assert found.right.device == DEVICE


@pytest.mark.parametrize("name", MODELS)
def test_the_jacobian_of_a_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivative, "_announced", False)
    with exact_norms(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="scalpel.jacobian differentiates")  # the warning for torch.func
        ids = ids_of()
        check_jacobian(model_of(name), elsewhere(model_of(name)), ids, ("0.resid_in", "final_resid"), elsewhere(ids))


def test_weights_on_two_devices_go_through_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalpel.models.decoders.families import decoder_or_reason

    model = model_of("llama")
    elsewhere(model.model.layers[1])
    assert "cpu, cuda:0" in str(decoder_or_reason(model))


# ---- covariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("center", [True, False])
def test_covariances(dtype: torch.dtype, center: bool, tmp_path: Path) -> None:
    x, y = torch.randn(300, 40).to(dtype), torch.randn(100, 40).to(dtype)
    states = []
    for to in (lambda x: x, elsewhere):
        state = scalpel.StreamingCovariance(40, center=center).update(to(x))
        other = scalpel.StreamingCovariance(40, center=center).update(to(y))
        angles = state.principal_angles(other, 3)
        contrast = state.contrast(other, 3).values
        state.merge(other)
        states.append([state.mean, state.covariance(), state.eigh().values, state.eigh(3).values, angles, contrast])
        assert state.subtract(other).count == 300
    for expected, found in zip(*states, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
        assert found.device == DEVICE
    state.save(tmp_path / "state")
    loaded = scalpel.StreamingCovariance.load(tmp_path / "state")
    with pytest.raises(ValueError, match="the rows so far were on cpu"):
        loaded.update(elsewhere(x))
    again = loaded.to("cuda")
    assert loaded.covariance().is_cpu and torch.equal(again.covariance().cpu(), state.covariance().cpu())
    assert again.to(DEVICE) is again and again.update(elsewhere(x)).count == 600
    fast = scalpel.StreamingCovariance(40, center=center, precision="fast").update(elsewhere(x))
    assert copy.deepcopy(fast)._precision == "fast"
    apart = (fast.covariance() - state.covariance()).abs().cpu()
    exact = dtype == torch.float64 or (dtype == torch.bfloat16 and not center)
    spread = state.covariance().diagonal().cpu().sqrt()
    assert exact or 0 < float((apart / spread[:, None] / spread).max()) < 2**-8
    with pytest.raises(ValueError, match="precision is 'rough'; allowed: 'accurate', 'fast'"):
        scalpel.StreamingCovariance(40, precision="rough")
    with pytest.raises(ValueError, match="a sketch can only be on the CPU"):
        scalpel.StreamingCovariance(40, rank=3).to(DEVICE)


@pytest.mark.parametrize("name", ["circuitgpt", "llama"])
def test_collect(name: str, tmp_path: Path) -> None:
    model, there = (build("plain"), elsewhere(build("plain"))) if name == "circuitgpt" else (
        model_of(name), elsewhere(model_of(name))
    )  # fmt: skip
    ids = tokens(model) if name == "circuitgpt" else ids_of()
    hooks = ["0.resid_in", "1.resid_in.grad"]
    expected, found = scalpel.collect(model, [ids], hooks), scalpel.collect(there, [ids], hooks)
    for hook in hooks:
        lanes.close(found[hook].covariance().cpu(), expected[hook].covariance())
        assert found[hook].covariance().device == DEVICE
    assert scalpel.collect(there, [elsewhere(ids)], hooks, rank=4)[hooks[0]].mean.is_cpu


class Stopped(Exception):
    pass


def test_a_collection_goes_on_where_it_was(tmp_path: Path) -> None:
    """States are loaded from disk to the CPU, and move back to the model's device."""
    there, hooks = elsewhere(build("plain")), ["0.resid_in", "final_resid"]
    batches = [elsewhere(torch.randint(0, 13, (2, 9))) for _ in range(5)]
    whole = scalpel.collect(there, batches, hooks, save_every=2)

    def stop(done: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        scalpel.collect(there, batches, hooks, save_every=2, folder=tmp_path, progress=stop)
    again = scalpel.collect(there, batches, hooks, save_every=2, folder=tmp_path)
    assert scalpel.collect(there, batches, hooks, save_every=2, folder=tmp_path)[hooks[0]].mean.device == DEVICE
    with pytest.raises(ValueError, match="places"):
        scalpel.collect(build("plain"), [each.cpu() for each in batches], hooks, save_every=2, folder=tmp_path)
    for name in hooks:
        assert again[name].mean.device == whole[name].mean.device == DEVICE
        assert again[name].count == 90 and torch.equal(again[name].covariance().cpu(), whole[name].covariance().cpu())


# ---- models --------------------------------------------------------------------------------------


def test_a_model_and_what_reads_it() -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    there = elsewhere(scalpel.CircuitGPT.from_pretrained("bracket-mini"))
    ids, mask = model.tokenizer.batch(["x = [[1, 2, 3", "y = [4"], side="left")
    with torch.no_grad():
        same(there(ids, mask), model(ids, mask))
        expected, found = (
            m.run_with_cache(ids, names=r"\d+\.attn\..*", attention_mask=mask)[1] for m in (model, there)
        )
        for name, value in expected.items():
            same(found[name], value)
        with model.ablate(["1.attn.v:5"]), there.ablate(["1.attn.v:5"]):
            same(there(ids), model(ids))
    assert len(there.edges()) == len(model.edges())
    options: dict[str, Any] = {"attention_mask": mask, "temperature": 1.0, "seed": 3}
    told, asked = (m.logit_attribution(ids, "]", attention_mask=mask) for m in (there, model))
    same(told.heads, asked.heads)
    assert torch.equal(there.generate(ids, 4, **options).cpu(), model.generate(ids, 4, **options))
    guard = scalpel.HoleGuard(there, scalpel.semigroup.ThresholdCounter("0.15"))
    assert guard(elsewhere(ids), there(ids)[:, -1]).device == DEVICE
    with pytest.raises(ValueError, match=r"experiments take models on the CPU: model.cpu\(\)"):
        scalpel.experiments.run("dilution", there)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/cuda.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec("import torch, scalpel\n" + block.replace("(4096, 16384,", "(3, 40,").replace("(x, 512)", "(x, 5)"), names)
    assert names["x"].shape == (3, 40) and names["C"].mean.device == names["J"].device == DEVICE
    assert torch.equal(names["C"].mean.cpu(), names["states"]["1.resid_in"].mean.cpu())


def test_what_prunes_a_circuit() -> None:
    """The same draws give the same masks and answers on every device."""
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    there = elsewhere(scalpel.CircuitGPT.from_pretrained("bracket-mini"))
    task = bracket_counting(model, 8, 0)
    lanes.close(answer_logits(there, task), answer_logits(model, task))
    hooks = node_hooks(model)
    stand_ins = [substitute(m, "resample", (task.ids, task.mask), hooks) for m in (model, there)]
    masks = [
        learn_masks(m, task, one, Schedule(steps=1, batch=4), seed=1)
        for m, one in zip((model, there), stand_ins, strict=True)
    ]
    for name, found in masks[1].items():
        lanes.close(found, masks[0][name])
    effects = [ablation_effects(m, task, kind="zero", hooks=["1.attn.v", "final_resid"]).hooks for m in (model, there)]
    for name, found in effects[1].items():
        lanes.close(torch.from_numpy(found), torch.from_numpy(effects[0][name]))


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases on another device, except the Jacobian's, which are compared with torch.func; it does not run there."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(bench, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "cases", lambda *at: [bench.keep_topk(*at), bench.covariance_update(*at)])
    report = bench.run(quick=True, device="cuda")
    assert report["environment"]["gpu"] == "a stand-in" and set(waits) == {"cuda"}
    assert [case["device"] for case in report["cases"]] == ["cuda", "cuda"]


# ---- scalpel analyze -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stream"), [("circuit", False), ("llama", False), ("llama", True)])
def test_an_analysis(
    name: str, stream: bool, tmp_path: Path, text: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    folder: Path = request.getfixturevalue(name)
    sizes: dict[str, Any] = SIZES | {
        "stream": stream,
        "products": False,
        "chunks": 1,
        "tangents": 2,
        "stretches": 0 if stream else 2,
    }
    expected, found = (
        json.loads(analyze(folder, text, tmp_path / device, device=device, **sizes).to_json())
        for device in ("cpu", "cuda")
    )
    assert found["model"].pop("device") == "a stand-in"
    for each in (found, expected):
        each["model"].pop("parameters")  # tied weights count twice here, because moving copies them
    assert found["model"] == expected["model"] and found["notes"] == expected["notes"]
    for side in ("trained", "untrained", "spectra"):
        close(found[side], expected[side])
    with pytest.raises(ValueError, match="device"):
        analyze(folder, text, tmp_path / "cuda", **sizes)  # that folder belongs to another device


def test_torchruns_processes_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(source, "device_named", torch.device)
    assert source._place("cuda") == torch.device("cuda:1") and source._place("cpu") == torch.device("cpu")


def close(found: Any, expected: Any) -> None:
    """Compare plain data: equal up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)
