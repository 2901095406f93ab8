"""The report: every kind of picture, no external resources, everything escaped, and no half-written file."""

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_cases import FIGURES
from scalpel import _files as files
from scalpel import report
from scalpel.experiments.brackets import minimal_simulator
from scalpel.experiments.result import Result
from scalpel.experiments.suite import Suite
from scalpel.report import card, page
from scalpel.report.pictures import figures, naming
from scalpel.report.pictures.style import LEVELS, SERIES

EVIL = '<script>alert("$x$")</script> & [[1, 2],\n'


def suite_of(
    results: list[Result], model: dict[str, Any] | None = None, refused: dict[str, str] | None = None
) -> Suite:
    return Suite(results, model or {}, 1.5, refused or {})


@pytest.fixture(scope="module")
def result() -> Result:
    found = minimal_simulator.run(k_max=3, n_max=30, samples=3)
    return replace(found, figures={**found.figures, **FIGURES})


@pytest.mark.parametrize("kind", figures.KINDS)
def test_every_kind_is_drawn_with_gaps_where_nothing_is_known(kind: str) -> None:
    svg = figures.to_svg(FIGURES[kind], "p")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "nan" not in re.sub(r">[^<]*<", "><", svg).lower()  # no coordinate is NaN
    assert "never" not in svg and "nowhere" not in svg
    assert f'aria-label="{FIGURES[kind]["title"]}' in svg


@pytest.mark.parametrize("kind", figures.KINDS)
def test_a_picture_is_the_same_every_time_and_takes_arrays_too(kind: str) -> None:
    arrays = {k: np.array(v) if k in ("k", "x_edges") else v for k, v in FIGURES[kind].items()}
    assert figures.to_svg(FIGURES[kind], "p") == figures.to_svg(arrays, "p")


def test_ids_carry_their_prefix_so_that_pictures_can_share_a_page() -> None:
    svg = figures.to_svg(FIGURES["map"], "one")
    ids, used = re.findall(r' id="([^"]*)"', svg), re.findall(r'(?:url\(#|href="#)([^)"]*)', svg)
    assert ids and len(ids) == len(set(ids)) and all(i.startswith("one-") for i in ids)
    assert used and set(used) <= set(ids)


def test_colours_are_the_pages_variables_with_the_light_theme_as_fallback() -> None:
    svg = figures.to_svg(FIGURES["map"], "p")
    assert f"var(--level-10, {LEVELS[10]})" in svg and f"var(--level-0, {LEVELS[0]})" in svg
    assert f"var(--series-1, {SERIES[0]})" in figures.to_svg(FIGURES["curves"], "p")
    assert not re.search(r"(?<!, )#[0-9a-f]{6}\b", svg.replace("#000000", "")), "a colour outside the palette"


def test_the_style_sheet_knows_every_variable() -> None:
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text()
    dark = style[style.index("prefers-color-scheme: dark") : style.index("* { box-sizing")]
    for name in (
        "--ink",
        "--fails",
        *(f"--level-{i}" for i in range(11)),
        *(f"--series-{i}" for i in range(1, 7)),
    ):
        assert f"{name}:" in dark


def test_a_law_beyond_the_axis_is_said_to_be_there() -> None:
    assert "a law (→ beyond the axis)" in figures.to_svg(FIGURES["map"], "p")
    assert "no prompts" in figures.to_svg(FIGURES["map"], "p")


def test_a_missing_bar_is_said_in_words() -> None:
    assert "no measurement" in figures.to_svg(FIGURES["bars"], "p")


def test_the_failure_regions_edge_is_the_first_length_that_fails() -> None:
    svg = figures.to_svg(FIGURES["region"], "p")
    assert re.search(r"<text[^>]*>3</text>", svg) and "not known" in svg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pie"}, "figure kind is 'pie'; allowed: region, curves, map, bars"),
        ({"kind": None}, "figure kind is None"),
        ({"kind": "bars", "labels": ["a"]}, "no entry 'values'"),
        ({**FIGURES["bars"], "values": [1.0]}, "one entry for each of the 2 labels"),
        ({**FIGURES["digraph"], "edges": [{"src": 0, "dst": 3, "label": "a"}]}, "nodes are 0 to 2"),
        ({**FIGURES["eggbox"], "boxes": [{"cells": [[["a"]]], "group": [[]], "above": []}]}, "same rows and columns"),
        ({**FIGURES["layered"], "columns": []}, "stands in no column"),
        ({**FIGURES["region"], "n_max": 5}, r"shape \(2, 7\)"),
        ({**FIGURES["map"], "values": [[1.0, 0.5]]}, r"\(2, 3\) follows"),
        ({**FIGURES["map"], "values": [[1.0, 0.5, 1.5], [0, 0, 0]]}, r"must lie in \[0, 1\]"),
        ({**FIGURES["map"], "x_edges": [0, 10, 10, 40]}, "must ascend"),
        ({**FIGURES["map"], "overlays": [{"label": "a", "x": [1]}]}, "1 values for 2 rows"),
        ({**FIGURES["curves"], "series": [{"label": "a", "x": [1, 2], "y": [1]}]}, "series 'a'.*same length"),
        ({**FIGURES["curves"], "series": [{"label": "a", "x": [1], "y": [1], "style": "wavy"}]}, "'wavy'"),
    ],
)
def test_bad_figures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.to_svg(change, "p")


def test_empty_pictures_are_drawn() -> None:
    for change in ({"series": []}, {"series": [{"label": "", "x": [], "y": []}]}):
        assert "<svg" in figures.to_svg({"kind": "curves", "title": "", "xlabel": "", "ylabel": "", **change}, "p")
    bars = figures.to_svg({**FIGURES["bars"], "labels": [], "values": [], "low": None, "high": None}, "p")
    assert "<svg" in bars


def test_many_series_get_a_legend() -> None:
    series = [{"label": f"s{i}", "x": [0, 1], "y": [0, i]} for i in range(12)]
    svg = figures.to_svg({**FIGURES["curves"], "series": series}, "p")
    assert all(f">s{i}<" in svg for i in range(12))


def test_names_keep_their_distance_and_their_order() -> None:
    wanted = [0.0, 0.05, 0.04, 2.0, 2.0]
    placed = naming.spread(wanted, 0.2, 0.0, 2.0)
    assert min(np.diff(sorted(placed))) >= 0.2 - 1e-9
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert min(placed) >= 0 and max(placed) <= 2.0


class Page(HTMLParser):
    """Count opened and closed tags, and collect ids, links and text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [v for k, v in attrs if k in ("href", "src") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(result: Result) -> None:
    text = page.render(suite_of([result], {"name": "bracket-mini"}))
    read = Page(text)
    assert read.open == []
    assert len(read.ids) == len(set(read.ids))
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)", text), "an address of somewhere else"
    assert all(link == "results.json" or link[1:] in read.ids for link in read.links)
    assert read.tags.count("svg") == len(result.figures)
    assert "script" not in read.tags


def test_a_cell_of_the_table_ends_at_a_clause():
    assert page.brief("short", 10) == "short"
    text = "k=2: 120 [110, 130]; k=3: 153 [137, 172]. Best law: none, off by far"
    assert page.brief(text, 25) == "k=2: 120 [110, 130] …"
    assert page.brief(text, 45) == "k=2: 120 [110, 130]; k=3: 153 [137, 172] …"
    assert page.brief("a" * 50, 20) == "a" * 50  # there is no place to break it
    assert page.brief("one two three four", 5) == "one two …"


def test_the_page_shows_what_a_reader_needs_to_disagree(result: Result) -> None:
    text = Page(page.render(suite_of([result]))).text
    for part in (result.prediction, result.measured, result.null, result.interval):
        assert part["summary"] in text
    for word in (
        result.question,
        result.seed_figure,
        result.verdict,
        "wrong cells random theta",
        "stored",
        "seed",
    ):
        assert word in text
    assert result.provenance["predicted_at"][:10] in text


def test_a_rule_stored_with_the_prediction_is_shown(result: Result) -> None:
    text = page.render(suite_of([replace(result, prediction={"summary": "s", "rule": "Iff n* is met."})]))
    assert "Iff n* is met." in text


def test_everything_is_escaped(result: Result) -> None:
    evil = {"summary": EVIL, EVIL: [EVIL, {"a": EVIL}], "rule": EVIL}
    figure = {**FIGURES["bars"], "title": EVIL, "summary": EVIL, "labels": [EVIL, EVIL], "ylabel": EVIL}
    bad = Result(
        "evil",
        EVIL,
        evil,
        evil,
        evil,
        evil,
        "reproduced",
        EVIL,
        {"one": figure},
        {"model": EVIL, "predicted_at": EVIL},
    )
    text = page.render(suite_of([bad], {"name": EVIL, "commit": EVIL, "more": {EVIL: EVIL}}))
    read = Page(text)
    assert "<script" not in text and "script" not in read.tags
    assert read.open == []
    assert EVIL.strip() in read.text


def test_no_figure_no_fact_no_result(result: Result) -> None:
    bare = Result("bare", "Q?", {}, {}, {}, {}, "not testable here", "")
    assert "not testable here" in page.render(suite_of([bare]))
    assert "Nothing was run" in page.render(suite_of([]))


def test_write_report(result: Result, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    written = report.write_report(folder, suite_of([result]))
    assert written == folder / "index.html"
    assert sorted(p.name for p in folder.iterdir()) == ["index.html", "results.json"]
    stored = json.loads((folder / "results.json").read_text())
    assert stored["results"][0]["measured"]["min_distractors"] == 12
    assert written.stat().st_mode & 0o777 == 0o666 & ~_umask()
    first = written.read_bytes()
    report.write_report(str(folder), suite_of([result]))
    assert written.read_bytes() == first


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_that_cannot_be_written_is_named(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=re.escape(repr(str(folder)))):
            report.write_report(folder, suite_of([result]))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_old_report_survives_a_failure(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_report(tmp_path, suite_of([result]))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="figure kind"):
        report.write_report(tmp_path, suite_of([replace(result, figures={"a": {"kind": "pie"}})]))

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, suite_of([]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_facts_of_a_card() -> None:
    found, rest = card.facts(
        {
            "name": "m",
            "accuracy": {"all": 0.971, "all_interval": [0.95, 0.99], "prompts_depth_1": 300, "prompts_depth_2": 112,
                         "held_out": {"numpy": "2.4"}},
            "matrices": {"a": {"nonzero": 15_000, "size": 100_000, "density": 0.15}},
            "recipe": {"seed": 3},
            "longest_list_trained_on_elements": 40,
            "commit": "0123456789abcdef",
            "nothing": None,
            "empty": {},
        }
    )  # fmt: skip
    assert dict(found) == {
        "Model": "m",
        "Accuracy on real prompts": "97.1\N{THIN SPACE}% [95.0, 99.0] of 412 from numpy 2.4",
        "Non-zero weights": "15\N{THIN SPACE}000",
        "Density": "15.0\N{THIN SPACE}%",
        "Longest list trained on": "40 elements",
        "Training seed": "3",
        "Commit": "0123456789ab",
    }
    assert set(rest) == {"accuracy", "matrices", "recipe"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (9999, "9999"),
        (12345, "12\N{THIN SPACE}345"),
        (1 / 3, "0.333333"),
        ("a", "a"),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert card.number(value) == text


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        (1, "scalar"), ([], "empty"), ({}, "empty"), ({"a": 1}, "mapping"), ({"a": {"x": 1}, "b": {"x": [2]}}, "table"),
        ([True, False], "bits"), ([1, "a"], "list"),
        ([{"a": 1}, {"a": 2}], "records"), ([[1], [2]], "matrix"), ([{"a": 1}, {"b": 2}], "items"), ([[[1]]], "items"),
    ],
)  # fmt: skip
def test_layouts(value: Any, layout: str) -> None:
    assert page.shape(value) == layout


def test_graphs_too_large_to_follow_are_said_and_not_drawn() -> None:
    nodes = [{"label": str(i)} for i in range(200)]
    svg = figures.to_svg({"kind": "digraph", "title": "t", "nodes": nodes, "edges": []}, "p")
    assert "200 nodes and 0 arrows: too many to follow" in svg
    box = {"cells": [[["a"]] * 30] * 30, "group": [[False] * 30] * 30, "above": []}
    assert "900 H-classes in 1 D-classes" in figures.to_svg({"kind": "eggbox", "title": "t", "boxes": [box]}, "p")


def test_what_was_left_out_stands_on_the_page(result: Result) -> None:
    left = replace(result, measured={**result.measured, "left_out": ["the egg-box: <no library>"]})
    page_text = page.render(suite_of([left, left]))
    assert page_text.count("Left out.") == 1 and "the egg-box: &lt;no library&gt;" in page_text
    refused = page.render(suite_of([left], refused={"minimal_simulator": "no tokenizer"}))
    assert "minimal simulator: no tokenizer" in refused and "the egg-box" in refused
