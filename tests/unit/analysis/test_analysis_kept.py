"""scalpel analyze: what it keeps in its folder, the effect of the memory limit, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis_cases import SIZES, byte_pair, chunk, ids_of, letters, lists, text_of
from circuitgpt_cases import build, one_thread  # noqa: F401
from scalpel import CircuitGPT, lyapunov
from scalpel.analysis import analyze, chunks, run
from scalpel.analysis.source import load
from scalpel.analysis.text import read_text, read_tokenizer
from scalpel.report.analysis import render_analysis, write_analysis

# ---- what is kept --------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the ids of every chunk that is measured."""
    calls: list[tuple[int, ...]] = []
    real = chunks.measure

    def measure(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        calls.append(tuple(ids[0].tolist()))
        return real(model, ids, *rest)

    monkeypatch.setattr(chunks, "measure", measure)
    return calls


def test_a_stopped_analysis_goes_on(
    circuit: Path, text: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(circuit, text, tmp_path / "whole", **SIZES)
    counting = chunks.measure
    measured.clear()

    def stopped(*given: Any) -> Any:
        if len(measured) == 2:  # killed after the first chunk of both models
            raise KeyboardInterrupt
        return counting(*given)

    monkeypatch.setattr(chunks, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        analyze(circuit, text, tmp_path / "out", **SIZES)
    assert sorted(path.name for path in (tmp_path / "out" / "chunks").iterdir()) == ["00000.json"]
    monkeypatch.setattr(chunks, "measure", counting)
    first = measured[0]
    measured.clear()
    again = analyze(circuit, text, tmp_path / "out", **SIZES)
    assert len(measured) == 2 and first not in measured
    assert again.to_json() == whole.to_json()
    for name in ("analysis.json", "report.html"):
        for each, folder in ((whole, "whole"), (again, "out")):
            write_analysis(tmp_path / folder, each)
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    measured.clear()
    assert analyze(circuit, text, tmp_path / "out", **SIZES | {"chunks": 2}).trained != again.trained
    assert measured == []  # the folder already holds fewer chunks of the same analysis


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
    with pytest.raises(ValueError, match="00000.json can't be read .*--fresh to measure anew"):
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
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_chunks_shrink_when_memory_runs_out(
    circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, seen = chunks.measure, []

    def measure(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        seen.append(ids.shape[1])
        if len(seen) > 2 and ids.shape[1] > 8:
            raise error
        return real(model, ids, *rest)

    monkeypatch.setattr(chunks, "measure", measure)
    analysis = analyze(circuit, text, tmp_path / "out", **SIZES)
    assert seen == [12, 12, 12, 8, 8]
    assert analysis.chunks == [{"start": 0, "tokens": 12}, {"start": 12, "tokens": 8}, {"start": 24, "tokens": 8}]
    assert analysis.shrunk == [{"chunk": 1, "from": 12, "to": 8}]
    assert "at chunk 2 from 12 to 8 tokens" in " ".join(analysis.notes)
    assert "Means mix chunks of 12 and 8 tokens" in render_analysis(analysis)
    L = lyapunov(CircuitGPT.from_pretrained(circuit), ids_of(text, 1, 12, 8), 4)
    assert [chunk(tmp_path / "out", 1)["trained"]["exponents"]] == lists(L.exponents)
    # A later run reuses the lengths that were found.
    seen.clear()
    assert analyze(circuit, text, tmp_path / "out", **SIZES).to_json() == analysis.to_json() and seen == []


def test_memory_that_no_chunk_fits(circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(chunks, "measure", measure)
    with pytest.raises(ValueError, match="memory ran out at chunks of 8 tokens.*try fewer --tangents$"):
        analyze(circuit, text, tmp_path / "out", **SIZES)

    def broken(*_: Any) -> Any:
        raise RuntimeError("another kind")

    monkeypatch.setattr(chunks, "measure", broken)
    with pytest.raises(RuntimeError, match="another kind"):
        analyze(circuit, text, tmp_path / "other", **SIZES)


def test_no_memory_for_the_untrained_model(
    circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load(circuit)

    def made(seed: int) -> Any:
        raise MemoryError

    source.untrained = made
    monkeypatch.setattr(run, "load", lambda *_: source)
    with pytest.raises(ValueError, match="while the untrained model was made.*--no-untrained"):
        analyze(circuit, text, tmp_path / "out", **SIZES)
    analysis = analyze(circuit, text, tmp_path / "out2", untrained=False, **SIZES)
    assert analysis.shrunk == []


# Each run that is killed is a forked process, because starting a new process is slow.
KILLED = """
import os, signal, sys
from scalpel.analysis import analyze, chunks
real, seen = chunks.measure, []
for at in sys.argv[4:]:
    def measure(*given):
        seen.append(1)
        if len(seen) > int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    child = os.fork()
    if child == 0:
        chunks.measure = measure
        try:
            analyze(*sys.argv[1:4], length=12, chunks=3, tangents=4, untrained=False, stretches=0)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_run_that_is_killed_goes_on_and_then_shrinks(circuit: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def killed(*at: int) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, circuit, text, out, *map(str, at)],
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr

    whole = analyze(circuit, text, tmp_path / "whole", untrained=False, **SIZES)
    killed(1)
    assert [path.name for path in (out / "chunks").iterdir()] == ["00000.json"]
    again = analyze(circuit, text, out, untrained=False, **SIZES)
    assert again.trained == whole.trained and again.shrunk == []
    assert "In the middle of chunk 2 of 12 tokens an earlier run was cut off" in " ".join(again.notes)
    assert "cut off" not in " ".join(analyze(circuit, text, out, untrained=False, **SIZES).notes)
    analyze(circuit, text, out, untrained=False, fresh=True, **SIZES | {"chunks": 1})
    killed(0, 0)
    found = analyze(circuit, text, out, untrained=False, **SIZES)
    assert [each["tokens"] for each in found.chunks] == [12, 8, 8]
    assert "2 earlier runs were cut off" in " ".join(found.notes)


def test_a_folder_that_holds_something_else(circuit: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    analyze(circuit, text, out, **SIZES)
    (out / "state.json").unlink()
    for fresh in (False, True):
        with pytest.raises(ValueError, match="holds chunks.00000.json, but no state.json that says of what"):
            analyze(circuit, text, out, fresh=fresh, **SIZES)
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"holds report.html, but no state.json"):
        analyze(circuit, text, other, fresh=True, **SIZES)
    assert (other / "report.html").read_text() == "mine"


# ---- text and tokenizers -------------------------------------------------------------------------


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
    assert found.facts["tokens"] == 40 and torch.equal(found.chunk(1, 3), ids_of(text, 1, 6, 3))


def test_what_a_tokenizer_asks_of_batches_is_not_done(circuit: Path, text: Path, tmp_path: Path) -> None:
    given = letters(13)
    given.inner.enable_truncation(5)
    given.inner.enable_padding(length=64)
    given.save(tmp_path)
    found = read_text(text, load(circuit), tmp_path / "tokenizer.json", 6)
    assert found.facts["tokens"] == 40 and found.facts["special tokens"] == "none added"


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
