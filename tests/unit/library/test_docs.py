"""The pages of figures in docs/ equal what their benches write from the stored numbers."""

import importlib
import json

import pytest

from places import ROOT

# Each page, with the bench and the function that write it.
PAGES = {
    "algebra": ("bench_algebra", "markdown"),
    "covariance": ("bench_covariance", "table"),
    "dense_jacobian": ("bench_dense_jacobian", "table"),
    "evidence": ("evidence", "page"),
    "generation": ("bench_generation", "table"),
    "jacobian": ("bench_jacobian", "table"),
    "lens": ("bench_lens", "table"),
    "stream": ("bench_stream", "table"),
    "topk": ("bench_topk", "table"),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_from_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    bench, function = PAGES[name]
    numbers = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    page = getattr(importlib.import_module(bench), function)(numbers)
    assert page == (ROOT / "docs" / f"{name}.md").read_text()


def test_every_file_of_numbers_has_a_page():
    assert {path.stem for path in (ROOT / "docs").glob("*.json")} == set(PAGES)
