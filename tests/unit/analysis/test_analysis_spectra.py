"""scalpel analyze: spectra of activations and gradients, and the same distributed by torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import scalpel
from analysis_cases import CIRCUIT, LETTERS, invoke
from circuitgpt_cases import one_thread  # noqa: F401
from covariance_states import assert_close
from scalpel import CircuitGPT, StreamingCovariance, collect
from scalpel.analysis import analyze, spectra
from scalpel.covariance import leave_one_out
from scalpel.report.pictures.spectra_pictures import spectra_pictures

STREAMS = [f"{hook}{end}" for end in ("", ".grad") for hook in ("0.resid_in", "1.resid_in", "final_resid")]
SMALL = {"length": 8, "chunks": 1, "tangents": 2}


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    path = tmp_path / "longer.txt"
    drawn = torch.randint(len(LETTERS), (8 * 40 + 3,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(LETTERS[i] for i in drawn))
    return path


def batches_of(path: Path, stretches: int = 40) -> list[torch.Tensor]:
    ids = torch.tensor([LETTERS.index(letter) for letter in path.read_text()])
    return list(ids[: 8 * stretches].reshape(-1, 8).split(5))


def test_they_are_those_of_collect(circuit: Path, longer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    analysis = analyze(circuit, longer, out, seed=3, **SMALL)
    assert analysis.spectra is not None and analysis.spectra["stretches"] == 40
    model = CircuitGPT.from_pretrained(circuit)
    for side, of in (("trained", model), ("untrained", CircuitGPT(model.config, seed=3).double())):
        found = analysis.spectra[side]
        assert list(found) == STREAMS
        blocks = [collect(of, [batch], STREAMS, progress=False) for batch in batches_of(longer)]  # 8 blocks of 5
        for stream in STREAMS:
            whole = collect(of, batches_of(longer), [stream], progress=False)[stream]
            leaf = found[stream]
            assert (leaf["count"], leaf["dim"]) == (320, whole.dim)
            for name, value in (
                ("effective_rank", whole.effective_rank()),
                ("effective_rank_singular", whole.effective_rank("singular")),
                ("participation_ratio", whole.participation_ratio()),
                ("top_3", float(whole.explained_variance_ratio(3).sum())),
            ):
                assert leaf[name]["value"] == pytest.approx(value, rel=1e-9), name
                assert leaf[name]["low"] < value < leaf[name]["high"]
            jack = leave_one_out([block[stream] for block in blocks], lambda state: state.effective_rank())
            assert leaf["effective_rank"]["low"] == pytest.approx(float(jack.low), rel=1e-6)
            saved = StreamingCovariance.load(out / "states" / side / f"{stream}.safetensors")
            assert_close(saved, whole, 1e-10)
    assert not list(out.glob("blocks-*"))


def test_they_are_kept_and_asked_for_by_name(
    circuit: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--length", 8, "--chunks", 1, "--tangents", 2)
    options = ("--text", longer, "--out", tmp_path / "out", *sizes, "--no-untrained")
    done = invoke(circuit, *options, "--spectra", 16, "--hooks", r"\d\.mlp\.post_act")
    assert done.exit_code == 0 and "1.mlp.post_act" in done.stdout
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["spectra"]
    assert list(found["trained"]) == ["0.mlp.post_act", "1.mlp.post_act"] and found["untrained"] is None
    assert found["trained"]["0.mlp.post_act"]["count"] == 128
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Activations: in how many directions, by depth" in page and "Gradients: in how many" not in page
    monkeypatch.setattr("scalpel.analysis.spectra.collect", lambda *_, **__: pytest.fail("measured again"))
    again = invoke(circuit, *options, "--spectra", 16, "--hooks", r"\d\.mlp\.post_act", "--json")
    assert json.loads(again.stdout)["spectra"] == found
    none = invoke(circuit, *options, "--spectra", 0, "--json")
    assert json.loads(none.stdout)["spectra"] is None


def test_what_is_said_and_what_is_refused(circuit: Path, longer: Path, tmp_path: Path) -> None:
    analysis = analyze(circuit, longer, tmp_path / "few", stretches=1, hooks="1.mlp.post_act", **SMALL)
    assert re.search(r"8 rows in \d+ dimensions at 1.mlp.post_act", " ".join(analysis.notes))
    for options, words in (
        ({"hooks": "nothing"}, "hooks matches none of"),
        ({"stretches": -1}, "stretches is -1"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": "1KiB"}, "its state takes"),
    ):
        with pytest.raises(ValueError, match=words):
            analyze(circuit, longer, tmp_path / "out", **SMALL, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_torchrun_shares_the_work(circuit: Path, longer: Path, tmp_path: Path) -> None:
    world = 3  # one process more than there are chunks
    out, alone = tmp_path / "out", tmp_path / "alone"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "scalpel", "analyze", str(circuit), "--text", str(longer), "--out", str(out), "--json"]
    command += ["--length", "8", "--chunks", "2", "--tangents", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = json.loads(analyze(circuit, longer, alone, **SMALL | {"chunks": 2}).to_json())
    for name in ("chunks", "trained", "untrained", "notes"):
        assert found[name] == expected[name], name
    for side in ("trained", "untrained"):
        for stream in STREAMS:
            ours, theirs = (
                StreamingCovariance.load(folder / "states" / side / f"{stream}.safetensors") for folder in (out, alone)
            )
            assert_close(ours, theirs, 1e-10)
            leaves = [each["spectra"][side][stream]["effective_rank"] for each in (found, expected)]
            assert leaves[0] == {part: pytest.approx(value, rel=1e-8) for part, value in leaves[1].items()}
    assert (out / "report.html").is_file()
    assert sorted(path.name for path in out.glob("rank-*")) == [f"rank-{i}-of-{world}" for i in range(world)]


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "scalpel", "--version"], capture_output=True, text=True)
    assert done.stdout == f"scalpel {scalpel.__version__}\n"
    assert CIRCUIT == 12


def test_states_are_those_of_the_report(circuit: Path, longer: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        return analyze(circuit, longer, tmp_path / "out", untrained=False, **SMALL, **options)

    def states() -> dict[str, int]:
        folder = tmp_path / "out" / "states" / "trained"
        return {p.name.removesuffix(".safetensors"): StreamingCovariance.load(p).count for p in folder.glob("*.safet*")}

    first = run(stretches=16)
    run(stretches=4, hooks=r"0\.resid_in")
    assert states() == {"0.resid_in": 32}
    again = run(stretches=16)
    assert again.to_json() == first.to_json()
    assert states() == dict.fromkeys(STREAMS, 128)
    kept = next((tmp_path / "out").glob("spectra-*.json"))
    for path in (tmp_path / "out").glob("spectra-*.json"):
        path.write_text(path.read_text()[:-9])  # a truncated file is measured again
    assert run(stretches=16).to_json() == first.to_json()
    run(stretches=0, fresh=True)
    assert not kept.exists() and not (tmp_path / "out" / "states").exists()


def test_stopped_in_the_spectra_and_gone_on_with_less_memory(
    circuit: Path, longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(circuit, longer, tmp_path / "whole", untrained=False, **SMALL)
    real, calls = spectra.collect, []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(spectra, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        analyze(circuit, longer, tmp_path / "out", untrained=False, **SMALL)
    again = analyze(circuit, longer, tmp_path / "out", untrained=False, memory="120KiB", **SMALL)
    assert again.spectra is not None and whole.spectra is not None
    for stream in STREAMS:
        ours, theirs = (each.spectra["trained"][stream]["effective_rank"] for each in (again, whole))
        assert ours == {part: pytest.approx(value, rel=1e-6) for part, value in theirs.items()}
    assert not list((tmp_path / "out").glob("blocks-*"))


@pytest.mark.slow
def test_another_analysis_is_refused_under_torchrun_too(circuit: Path, longer: Path, tmp_path: Path) -> None:
    analyze(circuit, longer, tmp_path / "out", untrained=False, stretches=0, seed=5, **SMALL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scalpel", "analyze", str(circuit), "--text", str(longer), "--out", str(tmp_path / "out")]
    command += ["--length", "8", "--chunks", "1", "--tangents", "2", "--spectra", "0", "--no-untrained"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "holds another analysis (seed 5 there, 0 here)" in done.stderr


def test_pictures_of_odd_hooks() -> None:
    def leaf(dim: int) -> dict[str, Any]:
        numbers = {name: {"value": 2.0, "low": 1.0, "high": 3.0} for name in ("effective_rank", "participation_ratio")}
        shares = {f"top_{k}": {"value": 0.5, "low": 0.4, "high": 0.6} for k in (1, 3, 10)}
        return {"count": 9, "dim": dim, "variance": 1.0, "shares": [0.5, 0.0], **numbers, **shares}

    hooks = {"0.resid_mid": 4, "1.resid_mid": 4, "final_resid": 4, "1.mlp.post_act.grad": 16}
    side = {name: leaf(dim) for name, dim in hooks.items()}
    found = {p.name: p.figure for p in spectra_pictures({"tokens": 8, "trained": side, "untrained": None})}
    ranks = found["spectra-ranks-activations"]
    assert "Of 4." in ranks["summary"] and "Dashed" not in ranks["summary"]
    assert {s["label"]: s["x"] for s in ranks["series"]}["final_resid, effective rank, trained"] == [2]
    labels = [s["label"] for s in found["spectra-shares-activations"]["series"]]
    assert len(set(labels)) == len(labels)
    assert "Of 16." in found["spectra-ranks-gradients"]["summary"]
