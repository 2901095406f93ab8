"""What goes wrong on the command line: one message for what the user can mend, a traceback for what is broken."""

import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import scalpel.experiments
from command_line import command_line, invoke
from scalpel import _core
from scalpel.cli import bench
from scalpel.cli import commands as cli
from scalpel.experiments import suite
from scalpel.experiments.brackets import minimal_simulator
from scalpel.models.weight_files import CheckpointError
from scalpel.training import bracket_mini

WHERE = ((suite, "run_suite"), (scalpel.experiments, "run"), (bracket_mini, "train_model"), (bench, "run"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("model.safetensors lacks the tensor 'lm_head.weight'"), "lacks the tensor"),
        (scalpel.experiments.Refused("the model has no tokenizer"), "the model has no tokenizer"),
        (FileNotFoundError(2, "No such file or directory", "gone"), "gone: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["experiment", "dilution"], ["train", "bracket-mini"], ["bench"]])
def test_what_the_user_can_mend_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    for owner, name in WHERE:
        monkeypatch.setattr(owner, name, fail)
    done = invoke(*command, "--json")
    assert done.exit_code == 2 and done.stdout == ""
    assert f"error: {message}" in done.stderr or message in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(type(error), match=re.escape(str(error))):
        invoke(*command, "--debug")


def broken(*_: Any, **__: Any) -> None:
    np.zeros(3) + np.zeros(4)


@pytest.mark.parametrize("command", [["run"], ["experiment", "dilution"], ["train", "bracket-mini"], ["bench"]])
def test_an_error_of_the_librarys_own_is_no_fault_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for owner, name in WHERE:
        monkeypatch.setattr(owner, name, broken)
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1 and done.stdout == ""
    assert "operands could not be broadcast" in "".join(traceback.format_exception(done.exception))


def test_what_the_library_raises_is_told_from_what_is_raised_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option out of range gives a one-line message; the same type of error raised inside a function does not."""
    # The core raises it when the target is first chosen, which has already happened in this process.
    monkeypatch.setattr(_core, "active_target", lambda: _core.force_target("abacus"))
    monkeypatch.setenv("SCALPEL_TARGET", "abacus")
    wrong = invoke("bench", "--quick")
    assert wrong.exit_code == 2 and "'abacus'" in wrong.stderr and "portable" in wrong.stderr
    monkeypatch.delenv("SCALPEL_TARGET")
    option = invoke("experiment", "minimal_simulator", "-o", "k_max=0")
    assert option.exit_code == 2 and "'k_max' is 0" in option.stderr
    # Raised in a line of the library, but not by a raise statement of its own.
    monkeypatch.setattr(minimal_simulator, "ThresholdCounter", int)
    with pytest.raises(ValueError, match="invalid literal for int"):
        invoke("experiment", "minimal_simulator")


def test_an_option_of_an_experiment_in_the_suite_is_no_fault_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of ``scalpel run`` is passed to an experiment, so an error from there is a fault of the library."""
    monkeypatch.setattr(suite, "_accuracy", lambda _: {})
    monkeypatch.setattr(suite, "names", lambda: ["dilution"])
    monkeypatch.setattr(suite, "run", lambda name, model, **_: scalpel.experiments.run(name, model, prompts=0))
    with pytest.raises(RuntimeError, match="error of the library") as caught:
        invoke("run", "bracket-mini")
    assert isinstance(caught.value.__cause__, ValueError) and "'prompts' is 0" in str(caught.value.__cause__)
    assert "dilution" in caught.value.__cause__.__notes__[0]


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    done = command_line("experiment", "dilution", "--model", tmp_path / "none")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "none") in done.stderr and done.stdout == ""


def test_ctrl_c_says_that_training_resumes(tmp_path: Path) -> None:
    code = f"""
import sys, time
from scalpel.training import bracket_mini
def train_model(out, **_):
    print("started", flush=True)
    time.sleep(60)
bracket_mini.train_model = train_model
from scalpel.cli.commands import app
app(["train", "bracket-mini", "--out", {str(tmp_path)!r}])
"""
    # A process started in the background ignores Ctrl-C, and its children would inherit that.
    heard: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    heard |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **heard)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"  # in the group that a Ctrl-C interrupts
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in errors and "Traceback" not in errors


@pytest.mark.parametrize("n_max", [14, 4000])
def test_a_reader_that_leaves_is_no_error(n_max: int) -> None:
    code = f"""
import scalpel.experiments as e
from scalpel.experiments.brackets import minimal_simulator
e.run = lambda *a, **k: minimal_simulator.run(k_max=3, n_max={n_max}, samples=1)
from scalpel.cli.commands import app
app(["experiment", "minimal_simulator", "--json"])
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
