"""The page of a reading: what it says against the readout, and what a user can do with it in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import scalpel
from scalpel.report.lens import render_lens, write_lens

TEXT = "x = [[1, 2"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reading:
    """A lens of the shipped model, what it reads of a text, and the intervals."""

    def __init__(self) -> None:
        self.model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        prompts = [torch.arange(i, i + 12)[None] for i in range(4)]
        self.lens = scalpel.jacobian_lens.fit(self.model, prompts, skip_first=2, progress=False)
        self.readout = self.lens.readout(TEXT, k=4)
        self.intervals = self.lens.intervals(self.readout, TEXT, prompts).to_json()


@pytest.fixture(scope="module")
def reading() -> Reading:
    return Reading()


class Cells(HTMLParser):
    """The texts of the buttons of a page, by row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[tuple[int, int], str] = {}
        self._at: tuple[int, int] | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "button":
            found = dict(attributes)
            self._at = int(found["data-row"] or 0), int(found["data-column"] or 0)
            self.texts[self._at] = ""

    def handle_endtag(self, tag: str) -> None:
        self._at = None if tag == "button" else self._at

    def handle_data(self, data: str) -> None:
        if self._at is not None:
            self.texts[self._at] += data


def seen(token: str) -> str:
    bare = token.lstrip(" ")
    return ("·" * (len(token) - len(bare)) + bare).replace("\n", "↵")


def test_cells_are_the_readouts_first_tokens(reading: Reading) -> None:
    page = render_lens(reading.lens, reading.readout)
    cells = Cells()
    cells.feed(page)
    for column, position in enumerate(reading.readout.positions):
        assert cells.texts[0, column] == seen(reading.readout.top(0, position)[0][0])
        assert cells.texts[1, column] == seen(reading.readout.top(0, position, "model")[0][0])
    assert len(cells.texts) == 2 * len(reading.readout.positions)
    ranks = reading.readout.jacobian.ranks.flatten(), reading.readout.logit.ranks.flatten()
    ahead = int((ranks[0] < ranks[1]).sum())
    assert f"higher than the logit lens does in {ahead} of {len(ranks[0])} cells" in page
    assert f"relative error of {reading.lens.error[0]:.1%}" in page
    assert page == render_lens(reading.lens, reading.readout)
    assert "http" not in re.sub(r"http-equiv", "", page)  # no request leaves the page


def test_a_long_text_makes_no_page_of_full_digits(reading: Reading) -> None:
    page = render_lens(reading.lens, reading.readout)
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    _, _, logit, share = data["jacobian"]["top"][0][-1][0]
    exact = reading.readout.to_json()["jacobian"]["top"][0][-1][0]
    assert logit == pytest.approx(exact[2], abs=1e-4) and share == pytest.approx(exact[3], rel=1e-3)
    assert len(str(logit)) <= 9 and len(str(share)) <= 9 < len(str(exact[2]))


def test_a_token_cannot_end_the_script(reading: Reading) -> None:
    found = reading.readout
    pieces = dict.fromkeys(found.pieces, "</script><b>")
    hostile = type(found)(**{**vars(found), "pieces": pieces, "tokens": tuple("<i>" for _ in found.tokens)})
    page = render_lens(reading.lens, hostile)
    assert page.count("</script>") == 2 and "<b>" not in page and "<i>" not in page


def test_a_readout_of_one_lens_has_no_page_and_unknown_numbers_are_called_so(reading: Reading) -> None:
    for kind in ("jacobian", "logit"):
        with pytest.raises(ValueError, match="read with lens='both'"):
            render_lens(reading.lens, reading.lens.readout(TEXT, lens=kind))
    unknown = scalpel.JacobianLens({0: torch.eye(128)}, 0, model=reading.model)
    page = render_lens(unknown, unknown.readout(TEXT))
    assert "fitted on an unknown number of prompts, of unknown error" in page
    assert "positions below 16, counted from 0" in page  # as others' fits leave out


def test_the_numbers_are_beside_the_page(reading: Reading, tmp_path: Path) -> None:
    page = write_lens(tmp_path / "out", reading.lens, reading.readout, reading.intervals)
    stored = json.loads((page.parent / "readout.json").read_text())
    assert stored["intervals"] == reading.intervals
    assert stored["jacobian"]["top"][0][-1][0][1] == reading.readout.top(0, -1)[0][0]


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_in_a_browser(browser: Any, reading: Reading, tmp_path: Path) -> None:
    path = write_lens(tmp_path, reading.lens, reading.readout, reading.intervals)
    page = browser.new_page()
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    last = len(reading.readout.positions) - 1
    cell = page.locator(f'button[data-row="0"][data-column="{last}"]')
    cell.click()
    detail = page.locator("#detail")
    top = reading.readout.top(0, -1)
    for token, share in top:
        assert seen(token) in detail.inner_text()
        assert f"{share:.3f}" in detail.inner_text() or share < 0.001
    low, high = reading.intervals["logits"][0][-1][0]
    assert f"[{low:.1f}, {high:.1f}]" in detail.inner_text()
    low_rank, high_rank = reading.intervals["ranks"][0][-1]
    rank = int(reading.readout.jacobian.ranks[0, -1, 0])
    assert f"has rank {rank} (95 %: {low_rank} to {high_rank})" in detail.inner_text()
    page.keyboard.press("ArrowLeft")
    assert f"at position {reading.readout.positions[-2]}" in detail.inner_text()
    assert page.evaluate("document.activeElement.dataset.column") == str(last - 1)
    page.get_by_label("the logit lens").check()
    for column, position in enumerate(reading.readout.positions):
        text = page.locator(f'button[data-row="0"][data-column="{column}"]').inner_text()
        assert text.strip() == seen(reading.readout.top(0, position, "logit")[0][0]).strip()
    before = cell.get_attribute("class")
    page.get_by_label("probability of the token shown").check()
    share = reading.readout.top(0, -1, "logit")[0][1]
    assert cell.get_attribute("class") == f"s{round(10 * share**0.5)}" and before is not None
    assert requests == [path.as_uri()] and not problems
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # the table scrolls inside the page
