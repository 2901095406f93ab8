"""The command line: its output and streams, and help that loads no library."""

import json
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import scalpel.experiments
from command_line import command_line, invoke
from scalpel.circuits import Schedule
from scalpel.cli import bench
from scalpel.cli import models as cli_models
from scalpel.cli import show as cli_show
from scalpel.experiments import result, suite
from scalpel.experiments.brackets import minimal_simulator
from scalpel.training import bracket_mini, machines

COMMANDS = ("run", "experiment", "train", "prune", "bench")


@pytest.fixture(scope="module")
def found() -> result.Result:
    return minimal_simulator.run(k_max=3, n_max=30, samples=3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, found: result.Result) -> list[dict[str, Any]]:
    """Record what the commands request of the library, and answer without computing."""
    calls: list[dict[str, Any]] = []

    def run_suite(model: str, **options: Any) -> suite.Suite:
        options["progress"]("measuring", 0.5)
        calls.append({"model": model, **options})
        return suite.Suite([found], {"name": model}, 1.5)

    def run(name: str, model: str, **options: Any) -> result.Result:
        calls.append({"name": name, "model": model, **options})
        return found

    def train_model(out: Path, **options: Any) -> dict[str, Any]:
        options["progress"](1, 2, 3.5)
        calls.append({"out": out, **options})
        summary = {"summary": "97 %"}
        return {"name": "bracket-mini", "loss_nats": float("nan"), "recipe": {"seed": 0}, "accuracy": summary}

    monkeypatch.setattr(suite, "run_suite", run_suite)
    monkeypatch.setattr(scalpel.experiments, "run", run)
    monkeypatch.setattr(bracket_mini, "train_model", train_model)
    return calls


# ---- help ---------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy() -> None:
    code = """
import sys
from scalpel.cli.commands import app
for arguments in (["--help"], ["--version"], *([c, "--help"] for c in sys.argv[1:])):
    try:
        app(arguments)
    except SystemExit as done:
        assert not done.code, (arguments, done.code)
heavy = {"torch", "numpy", "matplotlib", "scipy", "jinja2", "scalpel._core"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)
    assert done.stdout.count("--json") == len(COMMANDS)


def test_version() -> None:
    assert invoke("--version").stdout == f"scalpel {scalpel.__version__}\n"


def test_without_a_command_there_is_help() -> None:
    done = command_line()
    assert "Usage" in done.stdout + done.stderr and "Traceback" not in done.stderr


# ---- run ----------------------------------------------------------------------------------------


def test_run_prints_the_table_and_writes_the_report(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    done = invoke("run", "--out", tmp_path / "report", "--seed", "3", "--fresh")
    assert done.exit_code == 0
    assert asked[0]["model"] == "bracket-mini" and asked[0]["seed"] == 3 and asked[0]["fresh"] is True
    for word in (*cli_show.COLUMNS, "n* = 14 and d = 12", "1[k/n > θ]", "✓ reproduced"):
        assert word in done.stdout
    assert str(tmp_path / "report" / "index.html") in done.stdout
    assert "measuring" in done.stderr and "measuring" not in done.stdout
    assert json.loads((tmp_path / "report" / "results.json").read_text())["seconds"] == 1.5


def test_run_as_json_prints_what_results_json_holds(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    done = invoke("run", "other-model", "--out", tmp_path, "--json")
    assert done.exit_code == 0 and asked[0]["model"] == "other-model"
    assert done.stdout == (tmp_path / "results.json").read_text()
    assert json.loads(done.stdout)["results"][0]["verdict"] == "reproduced"


def test_run_checks_the_folder_before_it_computes(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke("run", "--out", tmp_path / "file")
    assert done.exit_code == 2 and asked == []
    assert "cannot write to the folder" in done.stderr and "a file has that name" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_a_narrow_terminal_gets_a_block_an_experiment(found: result.Result) -> None:
    def shown(width: int) -> list[str]:
        console = cli_show.out()
        console.width = width
        with console.capture() as capture:
            console.print(cli_show.results([found], width))
        return capture.get().splitlines()

    narrow, wide = shown(60), shown(140)
    assert max(map(len, narrow)) <= 60 and max(map(len, wide)) <= 140
    assert sum("verdict" in line for line in narrow) == 1
    assert any(all(name in line for name in cli_show.COLUMNS) for line in wide)


# ---- experiment ---------------------------------------------------------------------------------


def test_experiment_reads_options_as_json_else_as_text(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    done = invoke(
        "experiment", "minimal_simulator", "--model", "m", "-o", "k_max=3", "-o", "ks=[1, 2]", "-o", "x=a=b",
        "--out", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0
    assert asked == [{"name": "minimal_simulator", "model": "m", "k_max": 3, "ks": [1, 2], "x": "a=b"}]
    assert "✓ reproduced" in done.stdout
    assert (tmp_path / "index.html").exists()


def test_experiment_as_json(asked: list[dict[str, Any]]) -> None:
    done = invoke("experiment", "minimal_simulator", "--json")
    assert json.loads(done.stdout)["measured"]["min_distractors"] == 12


def test_an_unknown_experiment_lists_those_that_exist() -> None:
    done = invoke("experiment", "astrology")
    assert done.exit_code == 2
    assert "unknown experiment 'astrology'" in done.stderr
    assert all(name in done.stderr for name in scalpel.experiments.names())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["k_max"], "not of the form key=value"),
        (["=3"], "not of the form key=value"),
        (["k_max=1", "k_max=2"], "'k_max' is given twice"),
    ],
)
def test_malformed_options(given: list[str], message: str) -> None:
    done = invoke("experiment", "minimal_simulator", *(a for text in given for a in ("-o", text)))
    assert done.exit_code == 2 and message in done.stderr


# ---- train --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "bracket-mini"),
        (["--control", "no-topk"], "bracket-mini-no-topk"),
        (["--control", "no-positions", "--seed", "2"], "bracket-mini-no-positions-seed2"),
    ],
)
def test_train_names_its_folder_after_what_it_trains(
    asked: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    folder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train", "bracket-mini", *arguments)
    assert done.exit_code == 0
    assert asked[0]["out"] == Path("scalpel-runs") / folder
    assert asked[0]["steps"] is None
    assert asked[0]["control"] == (arguments[1] if arguments else "none")
    assert "97 %" in done.stdout and "loss 3.500" in done.stderr


def test_train_as_json(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    done = invoke("train", "bracket-mini", "--out", tmp_path, "--steps", "5", "--json")
    card = json.loads(done.stdout)
    assert card["loss_nats"] is None and asked[0]["steps"] == 5


@pytest.mark.parametrize(
    "arguments", [["tetris"], ["bracket-mini", "--control", "no"], ["bracket-mini", "--steps", "0"]]
)
def test_train_refuses_what_it_does_not_know(asked: list[dict[str, Any]], arguments: list[str]) -> None:
    done = invoke("train", *arguments)
    assert done.exit_code == 2 and asked == [] and done.stdout == ""


def test_controls_are_those_of_the_library() -> None:
    assert {c.value for c in cli_models.Control} == set(bracket_mini.CONTROLS)


def test_train_knows_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def train(name: str, out: Path, **options: Any) -> dict[str, Any]:
        asked.append((name, out, options["seed"], options["steps"]))
        return {"name": name}

    monkeypatch.setattr(machines, "train_machine", train)
    for name in machines.MACHINES:
        assert invoke("train", name, "--out", tmp_path / name, "--seed", "2", "--steps", "5").exit_code == 0
    assert asked == [(name, tmp_path / name, 2, 5) for name in machines.MACHINES]
    refused = invoke("train", "mod3-mini", "--control", "no-topk", "--out", tmp_path)
    assert refused.exit_code == 2 and "mod3-mini has none" in refused.stderr
    unknown = invoke("train", "mod4-mini", "--out", tmp_path)
    assert (
        unknown.exit_code == 2
        and "bracket-mini, python-small, mod3-mini, flip-flop-mini, parity-mini" in unknown.stderr
    )


# ---- prune --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prune_writes_its_result_and_keeps_it_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(import_module("scalpel.circuits.prune"), "Schedule", lambda: Schedule(steps=8, batch=8))
    judge = import_module("scalpel.experiments.machine.circuit")
    monkeypatch.setattr(judge, "examine", partial(judge.examine, prompts=48, draws=2))
    folder, out = tmp_path / "model", tmp_path / "out"
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    del model.card["text"]  # the training text is slow to generate
    model.save_pretrained(folder)
    words = ("--seeds", "1", "--prompts", "64", "--target", "0.6", "--out", out)
    done = invoke("prune", folder, *words, "--keep")
    assert done.exit_code == 0, done.stderr
    assert "nodes" in done.stdout and str(out / "index.html") in done.stdout
    assert "training text can't be made again" in done.stderr
    assert (folder / "pruning.json").read_text() == (out / "pruning.json").read_text()
    again = invoke("prune", folder, *words, "--json")
    read = json.loads(again.stdout)
    assert read["circuits"] == json.loads((out / "pruning.json").read_text())["circuits"]
    other = invoke("prune", folder, *words, "--ablation", "zero")
    assert other.exit_code == 2 and "another search" in other.stderr
    judged = invoke("experiment", "circuit", "--model", folder, "-o", "prompts=64", "-o", "draws=2")
    assert judged.exit_code == 0 and "of 2816" in judged.stdout


def test_prune_refuses_what_can_not_be_done(tmp_path: Path) -> None:
    unknown = invoke("prune", "bracket-mini", "--task", "chess", "--out", tmp_path)
    assert unknown.exit_code == 2 and "there are bracket_counting" in unknown.stderr
    splits = invoke("prune", "mod3-mini", "--out", tmp_path)
    assert splits.exit_code == 2 and "splits an answer" in splits.stderr


# ---- bench --------------------------------------------------------------------------------------


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    case = {
        "name": "keep_topk",
        "shape": "(2, 3)",
        "device": "cuda",
        "peer": "torch",
        "floor": "copy_",
        "note": "",
        "median_ms": {"ours": 1.0, "peer": 2.0, "floor": 0.5},
        "speedup": 2.0,
        "speedup_quartiles": [1.9, 2.1],
        "over_floor": 2.0,
    }
    report = {
        "quick": True,
        "rounds": 5,
        "seed": 0,
        "cases": [case],
        "environment": {"threads": 2, "target": "avx2", "torch": "2", "gpu": "a GPU"},
    }
    monkeypatch.setattr(bench, "run", lambda *, device, **_: report | {"device": device})
    return report


def test_bench(timings: dict[str, Any], tmp_path: Path) -> None:
    done = invoke("bench", "--quick", "--out", tmp_path / "times.json")
    assert done.exit_code == 0
    for word in ("keep_topk", "ours, ms", "1.000", "2.00×", "on cuda", "a GPU", "peer: torch", "not for quoting"):
        assert word in done.stdout
    assert json.loads((tmp_path / "times.json").read_text()) == timings | {"device": "cpu"}
    assert json.loads(invoke("bench", "--json", "--device", "cuda").stdout) == timings | {"device": "cuda"}


def test_a_wrong_answer_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**_: Any) -> None:
        raise bench.WrongAnswer("keep_topk and torch differ in 3 of 9 entries; nothing was timed")

    monkeypatch.setattr(bench, "run", wrong)
    done = invoke("bench", "--quick")
    assert done.exit_code == 1 and "differ in 3 of 9" in done.stderr and done.stdout == ""
