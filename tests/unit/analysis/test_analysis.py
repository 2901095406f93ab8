"""scalpel analyze: the figures against the library's own results, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from analysis_cases import SIZES, chunk, ids_of, invoke, lists
from circuitgpt_cases import build, one_thread  # noqa: F401
from decoder_cases import model_of
from scalpel import CircuitGPT, lyapunov
from scalpel.analysis import analyze, chunks
from scalpel.analysis.summary import summarise
from scalpel.report.analysis import render_analysis

# ---- figures -------------------------------------------------------------------------------------


def test_the_figures_of_a_circuitgpt_are_those_of_lyapunov(circuit: Path, text: Path, tmp_path: Path) -> None:
    analysis = analyze(circuit, text, tmp_path / "out", seed=3, **SIZES)
    model = CircuitGPT.from_pretrained(circuit)
    assert [c["start"] for c in analysis.chunks] == [0, 12, 24] and {c["tokens"] for c in analysis.chunks} == {12}
    for side, of, count in (("trained", model, 3), ("untrained", CircuitGPT(model.config, seed=3).double(), 1)):
        exponents = []
        for i in range(count):
            ids = ids_of(text, i, 12, 12)
            L, found = lyapunov(of, ids, 4, seed=3), chunk(tmp_path / "out", i)[side]
            assert [found["exponents"]] == lists(L.exponents)
            assert [found["exponents_less_growth_without_first"]] == lists(L.exponents_less_growth_without_first)
            assert found["layers"]["log_singular_values"] == lists(L.layers.log_values)
            assert L.cumulative is not None
            assert found["products"]["log_singular_values"] == lists(L.cumulative.log_values)
            assert found["products"]["stable_rank_estimated"] == lists(L.cumulative.stable_rank(certain=False))
            assert found["layers"]["effective_rank"] == lists(L.layers.effective_rank())
            assert [found["log_norms"]] == lists(L.log_norms)
            assert found["frame_growth"] == lists(L.frame_growth)
            assert found["lost"] == list(L.lost)
            assert found["products"]["depths"] == list(L.depths) == [1, 2]
            exponents.append(L.exponents)
        mean = getattr(analysis, side)["exponents"]["mean"]
        np.testing.assert_allclose(mean, torch.stack(exponents).mean(dim=0), rtol=1e-12)


def test_active_fractions_and_margins(circuit: Path, text: Path, tmp_path: Path) -> None:
    analyze(circuit, text, tmp_path / "out", untrained=False, **SIZES)
    found = chunk(tmp_path / "out", 1)["trained"]
    model = CircuitGPT.from_pretrained(circuit)
    _, acts = model.run_with_cache(ids_of(text, 1, 12, 12))
    assert found["active"] == {name: float((value != 0).double().mean()) for name, value in acts.items()}
    assert found["active"]["0.attn.act_in"] == 0.25
    read = model.transformer.h[1].ln_1(acts["1.resid_in"])[0].abs().sort(descending=True).values
    margin = found["margins"]["1.attn.act_in"]
    assert (margin["k"], margin["width"], margin["rows"], margin["ties"]) == (3, 12, 12, 0)
    gap = (read[:, 2] - read[:, 3]).detach().numpy()
    np.testing.assert_allclose(margin["median"], np.median(gap), rtol=1e-12)
    np.testing.assert_allclose(margin["quantile_5"], np.quantile(gap, 0.05), rtol=1e-12)
    relative = gap / read[:, 2].detach().numpy()
    np.testing.assert_allclose(margin["relative_median"], np.median(relative), rtol=1e-12)
    masked = sum(1 for name in acts if found["active"][name] <= 0.25)
    assert len(found["margins"]) == masked == 16


def test_a_folder_of_transformers(llama: Path, text: Path, tmp_path: Path) -> None:
    analysis = analyze(llama, text, tmp_path / "out", length=6, chunks=2, tangents=4, seed=1)
    model = model_of("llama")
    L, found = lyapunov(model, ids_of(text, 0, 6, 6), 4, seed=1), chunk(tmp_path / "out", 0)
    assert "untrained" not in chunk(tmp_path / "out", 1)
    assert "untrained model was measured at the first chunk alone" in " ".join(analysis.notes)
    np.testing.assert_allclose(found["trained"]["exponents"], L.exponents, rtol=1e-10)
    assert found["trained"]["exponents"] != found["untrained"]["exponents"]
    hooks = {"0.resid_in", "2.mlp.post_act", "final_resid"}
    assert hooks <= set(found["trained"]["active"]) and found["trained"]["margins"] == {}
    assert analysis.model["kind"] == "LlamaForCausalLM" and analysis.model["dtype"] == "float64"
    assert "No hook holds a zero" in " ".join(analysis.notes)


def test_a_streamed_folder_gives_the_same_layers(llama: Path, text: Path, tmp_path: Path) -> None:
    analyze(llama, text, tmp_path / "whole", length=6, chunks=2, tangents=4, untrained=False)
    analysis = analyze(llama, text, tmp_path / "streamed", length=6, chunks=2, tangents=4, stream=True)
    for i in range(2):
        whole, found = (chunk(tmp_path / name, i)["trained"] for name in ("whole", "streamed"))
        for name in ("log_singular_values", "effective_rank", "stable_rank"):
            np.testing.assert_allclose(found["layers"][name], whole["layers"][name], rtol=1e-7, err_msg=name)
        for name in ("frame_growth", "log_norms", "log_norms_without_first"):
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-7, err_msg=name)
        assert found["converged"] and found["layers"]["residual"] == pytest.approx([0, 0, 0], abs=1e-3)
        assert "exponents" not in found and "products" not in found
        assert found["active"] == {k: v for k, v in whole["active"].items() if k != "final_resid"}
    assert analysis.untrained is None and "frame growth is not the exponents" in " ".join(analysis.notes)
    assert "Growth of a random frame" in render_analysis(analysis)


def test_bfloat16_is_streamed_as_it_is(llama: Path, text: Path, tmp_path: Path) -> None:
    model_of("llama").bfloat16().save_pretrained(llama, max_shard_size="4KB")
    analysis = analyze(llama, text, tmp_path / "streamed", length=6, chunks=1, tangents=4, stream=True)
    whole = analyze(llama, text, tmp_path / "whole", length=6, chunks=1, tangents=4)
    logs = [each.trained["layers"]["log_singular_values"]["mean"] for each in (analysis, whole)]
    np.testing.assert_allclose(logs[0], logs[1], atol=0.03)
    assert analysis.model["dtype"] == "bfloat16" and whole.model["dtype"] == "float32, stored as bfloat16"
    assert any("bfloat16" in note for note in analysis.notes)


def test_means_and_intervals_over_chunks() -> None:
    records = [
        {"a": {"b": [float(i), 1.0]}, "c": i > 0, "d": "x", "e": None, "f": None if i == 2 else 1.0} for i in range(4)
    ]
    found = summarise(records)
    assert found["a"]["b"]["mean"] == [1.5, 1.0] and "undefined_in" not in found["a"]["b"]
    low, high = found["a"]["b"]["low"], found["a"]["b"]["high"]
    expected = stats.ttest_1samp([0.0, 1.0, 2.0, 3.0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([low[0], high[0]], expected, rtol=1e-12)
    assert (low[1], high[1]) == (1.0, 1.0)
    assert found["c"] == {"true": 3, "of": 4} and found["d"] == "x" and found["e"] is None
    assert found["f"] == {"mean": None, "low": None, "high": None, "undefined_in": 1}
    alone = summarise(records[:1])
    assert alone["a"]["b"] == {"mean": [0.0, 1.0], "low": [None, None], "high": [None, None]}


def test_intervals_cover_what_they_say() -> None:
    """For means of eight draws, 95 of 100 intervals contain the true mean; a percentile bootstrap reaches only 89."""
    drawn = np.random.default_rng(0).normal(size=(8, 20000))
    found = summarise([{"x": row.tolist()} for row in drawn])["x"]
    covered = np.mean((np.array(found["low"]) <= 0) & (np.array(found["high"]) >= 0))
    assert abs(covered - 0.95) < 0.005
    some = drawn[:, :2000].T
    picked = np.random.default_rng(1).integers(8, size=(1000, 8))
    low, high = np.percentile(some[:, picked].mean(axis=2), [2.5, 97.5], axis=1)
    assert abs(np.mean((low <= 0) & (high >= 0)) - 0.89) < 0.02


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_report(circuit: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--text", text, "--out", out, "--chunks", 3, "--tangents", 4)
    done = invoke(circuit, *options)
    assert done.exit_code == 0
    assert "largest exponent, nats per layer" in done.stdout and str(out / "report.html") in done.stdout
    assert "chunk 1 of 3, 12 tokens: untrained" in done.stderr and "chunk 1" not in done.stdout
    page = (out / "report.html").read_text()
    for words in (
        "Jacobian collapse",
        "identity path included",
        "σ₄ untrained",
        "Mean over 3 chunks",
        "95 % interval (Student’s t)",
        "Active fractions",
        "Margins",
        "Spectra of activations and gradients",
        "Gradients: in how many directions, by depth",
        "three standard errors",
    ):
        assert words in page, words
    assert page.count("<svg") == page.count("<figure>") == 17 and "http" not in page.replace("http-equiv", "")
    again = invoke(circuit, *options, "--json")
    assert again.stdout == (out / "analysis.json").read_text()
    found = json.loads(again.stdout)
    assert len(found["model"]["weights_sha256"]) == 64 and found["options"]["tangents"] == 4
    assert found["provenance"]["torch"] == torch.__version__ and len(found["trained"]["exponents"]["mean"]) == 4


def test_the_command_without_products(circuit: Path, text: Path, tmp_path: Path) -> None:
    done = invoke(circuit, "--text", text, "--out", tmp_path / "out", "--no-products", "--no-untrained", "--chunks", 1)
    assert done.exit_code == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["trained"]
    assert "products" not in found and "exponents" in found
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Jacobian collapse" not in page and "Singular values of each layer" in page


def test_the_command_streams(llama: Path, text: Path, tmp_path: Path) -> None:
    done = invoke(llama, "--stream", "--text", text, "--out", tmp_path / "out", "--length", 6, "--tangents", 3)
    assert done.exit_code == 0 and "frame growth" in done.stdout
    assert "read a layer at a time" in done.stderr and "chunk 4 of 4, 6 tokens: layer 1 of 3" in done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "read a layer at a time" in page and "Jacobian collapse" not in page


def test_the_commands_exit_codes(circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(circuit).exit_code == 2
    done = invoke(circuit, "--text", tmp_path / "nothing.txt", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "nothing.txt: No such file" in done.stderr and done.stdout == ""
    done = invoke("no-such-model", "--text", text, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "neither a shipped model" in done.stderr and "Traceback" not in done.stderr

    def measure(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(chunks, "measure", measure)
    done = invoke(circuit, "--text", text, "--out", tmp_path / "out")
    assert done.exit_code == 130 and "continues from the last finished chunk" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from scalpel.cli.commands import app
try:
    app(["analyze", "--help"])
except SystemExit as done:
    assert not done.code
assert not {"torch", "numpy", "matplotlib", "jinja2"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--stream" in done.stdout and "--json" in done.stdout, done.stderr
