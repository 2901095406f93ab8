"""`scalpel lens fit`, `show` and `merge`, from a text to a page, against the library's own functions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scalpel
from command_line import invoke

OPTIONS = ("--max-tokens", "8", "--skip-first", "2", "--prompts", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("x = [1, 2, [3, 4], 5]\ny = [[1], 2, [3]]\nz = [[[1, 2], 3], [4]]\n" * 3)
    return path


@pytest.fixture(scope="module")
def fitted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens")
    done = invoke("lens", "fit", "bracket-mini", "--text", str(text), *OPTIONS, "--out", str(folder))
    assert done.exit_code == 0, done.stderr
    assert " to " not in done.stdout.partition("Lens:")[0]  # one layer is no range
    assert "prompts" in done.stdout and f"Lens: {folder / 'lens.pt'}" in done.stdout
    assert "prompt 3 of 3" in done.stderr
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from scalpel.cli.commands import app
for arguments in (["lens", "--help"], *(["lens", c, "--help"] for c in ("fit", "show", "merge"))):
    try:
        app(arguments)
    except SystemExit as done:
        assert not done.code, (arguments, done.code)
heavy = {"torch", "numpy", "matplotlib", "scipy", "jinja2", "scalpel._core"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--json") == 3


def test_another_fit_in_the_folder_is_refused_in_the_words_of_the_command(text: Path, fitted: Path) -> None:
    done = invoke("lens", "fit", "bracket-mini", "--text", str(text), "--skip-first", "3", "--out", str(fitted))
    assert done.exit_code == 2 and "another --out, or --fresh" in done.stderr and "fresh=True" not in done.stderr


def test_processes_of_torchrun_share_the_prompts(text: Path, fitted: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        if (child := os.fork()) == 0:  # starting a new process is slow
            try:
                os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                torch.set_num_threads(1)
                done = invoke("lens", "fit", "bracket-mini", "--text", str(text), *OPTIONS, "--out", str(tmp_path))
                (tmp_path / f"{rank}.txt").write_text(done.stderr)
                os._exit(done.exit_code)
            finally:
                os._exit(99)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("*.txt")]
    parts, whole = (scalpel.JacobianLens.from_folder(folder) for folder in (tmp_path, fitted))
    assert torch.equal(parts.J[0], whole.J[0]) and parts.n_prompts == 3 and (tmp_path / "lens.pt").is_file()


def test_fit_is_the_librarys(text: Path, fitted: Path) -> None:
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    ids = model.tokenizer.encode(text.read_text())
    prompts = [ids[:8], ids[8:16], ids[16:24]]
    lens = scalpel.jacobian_lens.fit(model, prompts, skip_first=2, max_tokens=8, progress=False)
    stored, exported = scalpel.JacobianLens.from_folder(fitted), scalpel.JacobianLens.load(fitted / "lens.pt")
    assert torch.equal(stored.J[0], lens.J[0]) and stored.error == lens.error == exported.error
    assert torch.equal(exported.J[0], lens.J[0].half().float())


def test_the_same_command_goes_on(text: Path, fitted: Path) -> None:
    again = ("lens", "fit", "bracket-mini", "--text", str(text), "--out", str(fitted), "--json")
    first = json.loads(invoke(*again, *OPTIONS).stdout)
    assert first["n_prompts"] == 3 and first["source_layers"] == [0] and first["error"]["0"] > 0
    refused = invoke(*again, "--max-tokens", "9", "--skip-first", "2")
    assert refused.exit_code == 2 and "max_tokens 8 there, 9 here" in refused.stderr


def test_show(text: Path, fitted: Path, tmp_path: Path) -> None:
    read = ("lens", "show", str(fitted), "x = [[1, 2 ", "--model", "bracket-mini", "--out", str(tmp_path))
    done = invoke(*read, "--prompts", str(text), "--most", "3", "-h")
    assert done.exit_code == 0
    done = invoke(*read, "--prompts", str(text), "--most", "3", "--last", "4", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stripped"] and len(found["positions"]) == 4
    assert found["intervals"]["n_prompts"] == 3 and len(found["intervals"]["ranks"][0]) == 4
    assert "<title>Jacobian lens: bracket-mini</title>" in (tmp_path / "lens.html").read_text()
    plain = invoke(*read)
    assert f"Page: {tmp_path / 'lens.html'}" in plain.stdout and "layer" in plain.stdout


def test_merge(text: Path, fitted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    more = tmp_path / "more.txt"
    more.write_text("for i in [1, 2]:\n    print([i])\n" * 4)
    assert invoke("lens", "fit", "bracket-mini", "--text", str(more), *OPTIONS, "--out", str(other)).exit_code == 0
    out = tmp_path / "merged.pt"
    done = invoke("lens", "merge", str(fitted), str(other), "--out", str(out), "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["n_prompts"] == 6 and "inexact" not in done.stderr
    each = [scalpel.JacobianLens.from_folder(folder) for folder in (fitted, other)]
    assert torch.equal(scalpel.JacobianLens.load(out).J[0], each[0].merge(each[1]).J[0].half().float())
    exports = invoke("lens", "merge", str(fitted / "lens.pt"), str(other / "lens.pt"), "--out", str(out))
    assert exports.exit_code == 0 and "inexact" in exports.stderr


def test_errors(text: Path, fitted: Path, tmp_path: Path) -> None:
    fit = ("lens", "fit", "bracket-mini", "--text", str(text), "--out", str(tmp_path))
    for arguments, message in (
        ((*fit, "--layers", "a"), "numbers and ranges"),
        ((*fit, "--layers", "7"), "no layer 7"),
        ((*fit, "--skip-first", "200"), "no prompt is long enough"),
        (("lens", "merge", str(fitted)), "two or more"),
        (("lens", "show", str(tmp_path / "nowhere.pt"), "x", "--model", "bracket-mini"), "nowhere.pt"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2 and message in done.stderr, (arguments, done.stderr)
