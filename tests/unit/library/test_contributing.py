"""CONTRIBUTING.md only names files, functions and tests that exist."""

import re
from pathlib import Path

import pytest

from places import ROOT

PACKAGE = ROOT / "python" / "scalpel"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]
QUOTED = sorted({quoted for row in ROWS for quoted in re.findall(r"`([^`]+)`", row)})
PATHS = [quoted for quoted in QUOTED if re.fullmatch(r"[\w./<>]+(/|\.(py|cpp|h|inc|txt))(:\w+)?", quoted)]


def files_named(path: str) -> list[Path]:
    """The files that match a path of the tables, in which names in <…> stand for any name."""
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return [*ROOT.glob(pattern), *PACKAGE.glob(pattern)]


def test_the_tables_are_read():
    assert len(PATHS) > 80 and {"_moved.py", "csrc/<op>/<target>.cpp", "tests/unit/"} <= set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_tables_name_exists(path: str):
    path, _, name = path.partition(":")
    files = files_named(path)
    assert files
    if not name:
        return
    text = files[0].read_text()
    if path.endswith(".py"):
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE)
    else:
        assert re.search(rf"^\S.* {name}\(", text, re.MULTILINE)


@pytest.mark.parametrize("row", [row for row in ROWS if "PASSED_OVER" in row or "`judge`" in row])
def test_names_in_a_row_stand_in_the_file_that_it_names(row: str):
    *names, path = re.findall(r"`([^`]+)`", row)
    text = (PACKAGE / path).read_text()
    assert names and all(name in text for name in names if "/" not in name)


@pytest.mark.parametrize("command", re.findall(r"`pytest ([^`]*tests/[^`]+)`", TEXT))
def test_the_commands_name_tests_that_exist(command: str):
    path = next(word for word in command.split() if word.startswith("tests/"))
    assert (ROOT / path).exists()
    if " -k " in command:
        assert re.search(rf"def test_\w*{command.split()[-1]}", (ROOT / path).read_text())


def test_every_marker_is_described():
    declared = re.findall(r'^  "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and all(marker in TEXT for marker in declared)
