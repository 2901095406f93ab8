"""scalpel analyze: progress that moves within a chunk, a first picture, and a time after which it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis_cases import SIZES, invoke
from circuitgpt_cases import one_thread  # noqa: F401
from scalpel.analysis import analyze, pace
from scalpel.analysis.pace import Clock, Plan, Stopped, seconds_of
from scalpel.cli import show


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose time is the last entry."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[-1])
    return now


def test_progress_moves_within_a_chunk_and_never_back(circuit: Path, text: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    analyze(circuit, text, tmp_path / "out", progress=lambda *step: seen.append(step), **SIZES | {"stretches": 2})
    shares = [done for _, done in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and max(shares[:-1]) < 1
    # four measurements of a chunk (three of the trained model) and the spectra of two models share the bar
    for place, words in enumerate(
        ("chunk 1 of 3, 12 tokens: trained", "chunk 1 of 3, 12 tokens: untrained", "chunk 2 of 3", "chunk 3 of 3")
    ):
        within = [done for what, done in seen if what.startswith(words)]
        assert len(set(within)) >= 4 and place / 6 <= min(within) and max(within) < (place + 1) / 6, words
    whats = [what for what, _ in seen]
    assert "chunk 2 of 3, 12 tokens: trained: layer 2 of 2" in whats
    assert "chunk 2 of 3, 12 tokens: trained: product of 1 of 2 layers" in whats


def test_a_first_picture(circuit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalpel.report import analysis as report

    pages: list[tuple[int, str]] = []
    real = report.write_analysis

    def written(folder: Path, analysis: Any) -> Path:
        page = real(folder, analysis)
        pages.append((len(list((folder / "chunks").iterdir())), page.read_text()))
        return page

    monkeypatch.setattr(report, "write_analysis", written)
    done = invoke(circuit, "--text", text, "--out", tmp_path, "--chunks", 3, "--tangents", 4, "--spectra", 0, "--json")
    assert [count for count, _ in pages] == [1, 3]
    assert "first picture: 1 of 3 chunks is finished" in pages[0][1] and "first picture" not in pages[1][1]
    assert "Jacobian collapse" in pages[0][1] and "One chunk, no interval" in pages[0][1]
    assert "first picture" in done.stderr and done.stdout == (tmp_path / "analysis.json").read_text()
    assert json.loads(done.stdout)["options"]["depths"] == [1, 2]
    pages.clear()
    invoke(circuit, "--text", text, "--out", tmp_path, "--chunks", 3, "--tangents", 4, "--spectra", 0)
    assert len(pages) == 1  # nothing was measured, so there is nothing to show first


def test_it_stops_when_asked_and_goes_on(circuit: Path, text: Path, tmp_path: Path, hours: list[float]) -> None:
    whole = analyze(circuit, text, tmp_path / "whole", **SIZES)
    out = tmp_path / "out"

    def slow(what: str, done: float) -> None:
        hours.append(hours[-1] + 60)

    first = analyze(circuit, text, out, stop_after=1.0, progress=slow, **SIZES)
    assert len(first.chunks) == 1 and first.untrained is not None  # a run never achieves nothing
    assert first.notes[0].startswith("Stopped after 1 s, as asked: 1 of 3 chunks is finished. The same command goes on")
    assert sorted(path.name for path in (out / "chunks").iterdir()) == ["00000.json"]
    second = analyze(circuit, text, out, stop_after=1.0, progress=slow, **SIZES)
    assert len(second.chunks) == 2 and "cut off" not in " ".join(second.notes)
    again = analyze(circuit, text, out, stop_after=1e9, progress=slow, **SIZES)
    assert again.to_json() == whole.to_json()


def test_it_stops_within_a_chunk(circuit: Path, text: Path, tmp_path: Path, hours: list[float]) -> None:
    seen: list[str] = []

    def late(what: str, done: float) -> None:
        seen.append(what)
        if "chunk 2" in what and "layer 2" in what:
            hours.append(1e6)

    stopped = analyze(circuit, text, tmp_path / "out", stop_after=10.0, progress=late, **SIZES)
    assert len(stopped.chunks) == 1 and not any("product" in what for what in seen if "chunk 2" in what)
    assert "cut off" not in " ".join(analyze(circuit, text, tmp_path / "out", **SIZES).notes)


def test_it_stops_in_the_spectra(circuit: Path, text: Path, tmp_path: Path, hours: list[float]) -> None:
    sizes = {**SIZES, "chunks": 1, "stretches": 3}

    def in_spectra(what: str, done: float) -> None:
        if "spectra, untrained" in what:
            hours.append(1e6)

    some = analyze(circuit, text, tmp_path / "some", stop_after=10.0, progress=in_spectra, **sizes)
    assert some.spectra is None and "spectra of activations and gradients are not" in some.notes[0]
    rest = analyze(circuit, text, tmp_path / "some", **sizes)
    assert rest.to_json() == analyze(circuit, text, tmp_path / "once", **sizes).to_json()


def test_the_command_stops(circuit: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--out", tmp_path / "out", "--chunks", 3, "--tangents", 4, "--depths", 1)
    done = invoke(circuit, *options, "--stop-after", "0.000001s")
    assert done.exit_code == 0 and "Stopped after" in done.stderr and "1 chunk of 12 tokens" in done.stdout
    assert "Stopped after" in (tmp_path / "out" / "report.html").read_text()
    found = json.loads(invoke(circuit, *options, "--json").stdout)
    assert len(found["chunks"]) == 3 and found["trained"]["products"]["depths"] == [2]
    assert invoke(circuit, *options, "--stop-after", "soon").exit_code == 2


def test_times() -> None:
    assert [seconds_of(each) for each in ("10m", "90s", "1h30m", "45", " 1.5H ")] == [600, 90, 5400, 45, 5400]
    for bad in ("", "ten", "10x", "-5m", "0", "1h30", "5 m 3"):
        with pytest.raises(ValueError, match="is no time.*10m, 90s or 1h30m"):
            seconds_of(bad)


def test_a_plan_and_a_clock(hours: list[float]) -> None:
    clock, seen = Clock(5.0), []
    plan = Plan(["a", "b"], lambda *step: seen.append(step), clock)
    plan.of("b", "second")("half", 0.5)
    plan.of("a", "first")("again", 0.9)
    assert seen == [("second: half", 0.75), ("first: again", 0.75)]
    hours.append(6.0)
    assert not clock.over
    clock.achieved()
    with pytest.raises(Stopped):
        plan.of("b", "second")("more", 0.9)


def test_lines_say_how_long_the_rest_takes(capsys: pytest.CaptureFixture[str], hours: list[float]) -> None:
    steps = show.Steps("analyze")
    for now, what, done in ((0, "loading", 0.0), (10, "a: layer 1", 0.1), (12, "a: layer 2", 0.15), (70, "b: x", 0.4)):
        hours.append(now)
        steps.stage(what, done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  0% loading", " 10% a: layer 1", " 40% b: x, 2 min to go"]
