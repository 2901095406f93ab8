"""scalpel analyze: its figures against the library's own, what it keeps, and what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from circuitgpt_cases import build
from decoder_cases import model_of
from scalpel import CircuitGPT, cli, lyapunov
from scalpel.analysis import analyze, run
from scalpel.analysis.source import load
from scalpel.analysis.summary import summarise
from scalpel.analysis.text import read_text, read_tokenizer
from scalpel.models.tokenizer import Tokenizer
from scalpel.report.analysis import render_analysis, write_analysis

LETTERS = "abcdefghijklm"
CIRCUIT = 12  # the tiny CircuitGPT's context
SIZES: dict[str, int] = {"length": CIRCUIT, "chunks": 3, "tangents": 4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def letters(count: int) -> Tokenizer:
    """One token a letter."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS[:count])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner)


def text_of(count: int) -> str:
    drawn = np.random.default_rng(0).integers(len(LETTERS), size=count)
    return "".join(LETTERS[i] for i in drawn)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text_of(40))
    return path


@pytest.fixture
def circuit(tmp_path: Path) -> Path:
    model = build("like_csp_yolo2")
    model.tokenizer = letters(13)
    model.save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path / "llama"
    model_of("llama").save_pretrained(folder, max_shard_size="4KB")
    letters(13).save(folder)
    return folder


def ids_of(text: Path, number: int, step: int, length: int) -> torch.Tensor:
    ids = [LETTERS.index(letter) for letter in text.read_text()]
    return torch.tensor(ids[number * step : number * step + length])[None]


def chunk(out: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "chunks" / f"{number:05d}.json").read_text())
    return found


def lists(values: torch.Tensor | None) -> Any:
    assert values is not None
    return [[v if math.isfinite(v) else None for v in row] for row in values.reshape(-1, values.shape[-1]).tolist()]


def invoke(*arguments: Any) -> Result:
    done = CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"}).invoke(cli.app, ["analyze", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


# ---- figures -------------------------------------------------------------------------------------


def test_the_figures_of_a_circuitgpt_are_those_of_lyapunov(circuit: Path, text: Path, tmp_path: Path) -> None:
    analysis = analyze(circuit, text, tmp_path / "out", seed=3, **SIZES)
    model = CircuitGPT.from_pretrained(circuit)
    assert [c["start"] for c in analysis.chunks] == [0, 12, 24] and {c["tokens"] for c in analysis.chunks} == {12}
    for side, of in (("trained", model), ("untrained", CircuitGPT(model.config, seed=3).double())):
        exponents = []
        for i in range(3):
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
    L, found = lyapunov(model, ids_of(text, 1, 6, 6), 4, seed=1), chunk(tmp_path / "out", 1)
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
    found = summarise(records, 0)
    assert found["a"]["b"]["mean"] == [1.5, 1.0] and "undefined_in" not in found["a"]["b"]
    low, high = found["a"]["b"]["low"], found["a"]["b"]["high"]
    drawn = np.random.default_rng(1).integers(4, size=(20000, 4)).mean(axis=1)
    np.testing.assert_allclose([low[0], high[0]], np.percentile(drawn, [2.5, 97.5]), atol=0.26)
    assert (low[1], high[1]) == (1.0, 1.0)
    assert found["c"] == {"true": 3, "of": 4} and found["d"] == "x" and found["e"] is None
    assert found["f"] == {"mean": None, "low": None, "high": None, "undefined_in": 1}
    alone = summarise(records[:1], 0)
    assert alone["a"]["b"] == {"mean": [0.0, 1.0], "low": [None, None], "high": [None, None]}


# ---- what is kept --------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ids of every chunk that is measured."""
    calls: list[tuple[int, ...]] = []
    real = run.measure

    def measure(model: Any, ids: torch.Tensor, T: int, seed: int) -> Any:
        calls.append(tuple(ids[0].tolist()))
        return real(model, ids, T, seed)

    monkeypatch.setattr(run, "measure", measure)
    return calls


def test_a_stopped_analysis_goes_on(
    circuit: Path, text: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(circuit, text, tmp_path / "whole", **SIZES)
    counting = run.measure
    measured.clear()

    def stopped(*given: Any) -> Any:
        if len(measured) == 3:  # the trained model at the second chunk is measured, the untrained is not
            raise KeyboardInterrupt
        return counting(*given)

    monkeypatch.setattr(run, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        analyze(circuit, text, tmp_path / "out", **SIZES)
    assert sorted(path.name for path in (tmp_path / "out" / "chunks").iterdir()) == ["00000.json"]
    monkeypatch.setattr(run, "measure", counting)
    first = measured[0]
    measured.clear()
    again = analyze(circuit, text, tmp_path / "out", **SIZES)
    assert len(measured) == 4 and first not in measured
    assert again.to_json() == whole.to_json()
    for name in ("analysis.json", "report.html"):
        for each, folder in ((whole, "whole"), (again, "out")):
            write_analysis(tmp_path / folder, each)
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    measured.clear()
    assert analyze(circuit, text, tmp_path / "out", **SIZES | {"chunks": 2}).trained != again.trained
    assert measured == []  # fewer chunks of the same analysis are there already


def test_another_analysis_is_not_mixed_in(circuit: Path, text: Path, tmp_path: Path, measured: list[Any]) -> None:
    out = tmp_path / "out"
    analyze(circuit, text, out, **SIZES)
    (out / "mine.txt").write_text("kept")
    measured.clear()
    with pytest.raises(ValueError, match="out holds another analysis .seed 0 there, 1 here.: .*--out, or --fresh"):
        analyze(circuit, text, out, seed=1, **SIZES)
    text.write_text(text_of(41))
    with pytest.raises(ValueError, match="another text; another tokens"):
        analyze(circuit, text, out, **SIZES)
    assert measured == []
    assert len(analyze(circuit, text, out, fresh=True, **SIZES | {"chunks": 1}).chunks) == 1
    assert [path.name for path in (out / "chunks").iterdir()] == ["00000.json"]
    assert (out / "mine.txt").read_text() == "kept"
    (out / "chunks" / "00000.json").write_text("{")
    with pytest.raises(ValueError, match="00000.json can't be read .*--fresh measures anew"):
        analyze(circuit, text, out, **SIZES)


def test_another_config_of_the_same_weights_is_another_model(circuit: Path, text: Path, tmp_path: Path) -> None:
    analyze(str(circuit), text, tmp_path / "out", chunks=1, tangents=2, untrained=False)
    path = circuit / "beeg_config.json"
    config = json.loads(path.read_text())
    holder = next(part for part in (config, *config.values()) if isinstance(part, dict) and "n_head" in part)
    holder["n_head"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config"):
        analyze(str(circuit), text, tmp_path / "out", chunks=1, tangents=2, untrained=False)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_chunks_shrink_when_memory_runs_out(
    circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, seen = run.measure, []

    def measure(model: Any, ids: torch.Tensor, T: int, seed: int) -> Any:
        seen.append(ids.shape[1])
        if len(seen) > 2 and ids.shape[1] > 8:
            raise error
        return real(model, ids, T, seed)

    monkeypatch.setattr(run, "measure", measure)
    analysis = analyze(circuit, text, tmp_path / "out", **SIZES)
    assert seen == [12, 12, 12, 8, 8, 8, 8]
    assert analysis.chunks == [{"start": 0, "tokens": 12}, {"start": 12, "tokens": 8}, {"start": 24, "tokens": 8}]
    assert analysis.shrunk == [{"chunk": 1, "from": 12, "to": 8}]
    assert "at chunk 2 from 12 to 8 tokens" in " ".join(analysis.notes)
    assert "Means mix chunks of 12 and 8 tokens" in render_analysis(analysis)
    L = lyapunov(CircuitGPT.from_pretrained(circuit), ids_of(text, 1, 12, 8), 4)
    assert [chunk(tmp_path / "out", 1)["trained"]["exponents"]] == lists(L.exponents)
    # a later run knows
    seen.clear()
    assert analyze(circuit, text, tmp_path / "out", **SIZES).to_json() == analysis.to_json() and seen == []


def test_memory_that_no_chunk_fits(circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(ValueError, match="memory ran out at chunks of 8 tokens.*fewer --tangents, or --stream"):
        analyze(circuit, text, tmp_path / "out", **SIZES)

    def broken(*_: Any) -> Any:
        raise RuntimeError("another kind")

    monkeypatch.setattr(run, "measure", broken)
    with pytest.raises(RuntimeError, match="another kind"):
        analyze(circuit, text, tmp_path / "other", **SIZES)


# ---- text and tokenizers -------------------------------------------------------------------------


def byte_pair(folder: Path, names: tuple[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    table = {letter: i for i, letter in enumerate([*LETTERS, "Ġ"])} | {"ab": 14}
    (folder / names[0]).write_text(json.dumps(table))
    (folder / names[1]).write_text("#version: 0.2\na b\n")
    return folder


def test_tokenizers_of_the_users(llama: Path, text: Path, tmp_path: Path) -> None:
    letters(13).save(tmp_path)
    pair = byte_pair(tmp_path / "pair", ("encoder.json", "vocab.bpe"))
    for given in (tmp_path / "tokenizer.json", tmp_path):
        assert read_tokenizer(given, None).encode("abc") == [0, 1, 2]
    for given in (pair, pair / "encoder.json", pair / "vocab.bpe"):
        assert read_tokenizer(given, "tinypython").encode("ab cab") == [14, 13, 2, 14]
        assert read_tokenizer(given, "gpt2").encode("ab cab") == [14, 13, 2, 14]
    with pytest.raises(ValueError, match="two files don't say how text is cut.*give a tokenizer.json"):
        read_tokenizer(pair, None)
    (pair / "vocab.bpe").unlink()
    with pytest.raises(ValueError, match="lacks vocab.bpe, which goes with encoder.json"):
        read_tokenizer(pair / "encoder.json", "gpt2")
    with pytest.raises(ValueError, match="there is no tokenizer at .*nowhere"):
        read_tokenizer(tmp_path / "nowhere", None)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json can't be read"):
        read_tokenizer(tmp_path / "broken.json", None)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="llama comes without a tokenizer.json; give --tokenizer"):
        read_text(text, load(llama), None, 6)
    found = read_text(text, load(llama), tmp_path / "tokenizer.json", 6)
    assert found.facts["tokens"] == 40 and torch.equal(found.chunk(1, 6, 3), ids_of(text, 1, 6, 3))


def test_texts_that_are_refused(circuit: Path, text: Path, tmp_path: Path) -> None:
    source = load(circuit)

    def refused(content: bytes, match: str, tokenizer: Path | None = None) -> None:
        text.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_text(text, source, tokenizer, 6)

    refused(b"", "text.txt is empty")
    refused(b" \n", "text.txt is empty")
    refused(b"abc\xff", "no UTF-8 text: byte 3 is 0xff")
    refused(b"zzzzz", "the model's own. has no token for the text")
    refused(b"abc", "has 3 tokens and a chunk needs 6: give a longer text, or --length 3")
    beyond = byte_pair(tmp_path / "pair", ("vocab.json", "merges.txt"))
    refused(b"abcdefgh", "token 14 .'ab'. of .*text.txt is beyond the model's vocabulary of 13", beyond)
    with pytest.raises(OSError):
        read_text(tmp_path / "nothing", source, None, 6)


def test_arguments_that_are_refused(circuit: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    def refused(model: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            analyze(model, text, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(circuit, "length is 13; the model's context holds 12", length=13)
    refused(circuit, "length is 0", length=0)
    refused(circuit, "chunks is 0; it must be 1 or more", chunks=0)
    refused(circuit, "tangents is 145; 12 tokens of width 12 have 144", tangents=145)
    build("no_layer").save_pretrained(tmp_path / "flat")
    refused(tmp_path / "flat", "has no layer")
    refused("no-such-model", "neither a shipped model .*config.json and weights.*LlamaForCausalLM")
    refused(circuit, "can't be streamed; these can: GPT2LMHeadModel", stream=True)
    refused("bracket-mini", "'bracket-mini' is no folder; what is streamed is a folder", stream=True)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    for stream in (False, True):
        refused(llama, "holds a BertModel, which (is not supported|can't be streamed).*LlamaForCausalLM", stream=stream)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_report(circuit: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--text", text, "--out", out, "--chunks", 3, "--tangents", 4)
    done = invoke(circuit, *options)
    assert done.exit_code == 0
    assert "largest exponent, nats per layer" in done.stdout and str(out / "report.html") in done.stdout
    assert "note: A bootstrap over 3 chunks" in done.stderr
    assert "chunk 3 of 3, 12 tokens: untrained" in done.stderr and "chunk 3" not in done.stdout
    page = (out / "report.html").read_text()
    for words in (
        "Jacobian collapse",
        "identity path included",
        "σ₄ untrained",
        "Mean over 3 chunks",
        "95 % bootstrap",
        "Active fractions",
        "Margins",
        "three standard errors",
    ):
        assert words in page, words
    assert page.count("<svg") == page.count("<figure>") == 11 and "http" not in page.replace("http-equiv", "")
    again = invoke(circuit, *options, "--json")
    assert again.stdout == (out / "analysis.json").read_text()
    found = json.loads(again.stdout)
    assert len(found["model"]["weights_sha256"]) == 64 and found["options"]["tangents"] == 4
    assert found["provenance"]["torch"] == torch.__version__ and len(found["trained"]["exponents"]["mean"]) == 4


def test_the_command_streams(llama: Path, text: Path, tmp_path: Path) -> None:
    done = invoke(llama, "--stream", "--text", text, "--out", tmp_path / "out", "--length", 6, "--tangents", 3)
    assert done.exit_code == 0 and "frame growth" in done.stdout
    assert "read a layer at a time" in done.stderr and "chunk 6 of 6, 6 tokens: layer 3 of 3" in done.stderr
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

    monkeypatch.setattr(run, "measure", measure)
    done = invoke(circuit, "--text", text, "--out", tmp_path / "out")
    assert done.exit_code == 130 and "goes on from the last finished chunk" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from scalpel.cli import app
try:
    app(["analyze", "--help"])
except SystemExit as done:
    assert not done.code
assert not {"torch", "numpy", "matplotlib", "jinja2"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--stream" in done.stdout and "--json" in done.stdout, done.stderr
