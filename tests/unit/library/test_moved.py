"""Modules that have moved still import by their old names, with a warning that names the new one."""

import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch

import scalpel
from places import ROOT
from scalpel._moved import MOVED, MovedModuleFinder, install

# Classes that a user may have pickled, with the modules in which they used to be.
PICKLED = {
    "scalpel.guard_crossings": "Crossings",
    "scalpel.jacobians.depth": "Alignment Spectra",
    "scalpel.jacobians.lyapunov": "Lyapunov",
    "scalpel.models.circuitgpt": "Attention Block CircuitGPT MLP _LayerNorm _Sink _Sparsifier",
    "scalpel.models.config": "CircuitGPTConfig",
    "scalpel.models.edges": "EdgeTable",
    "scalpel.models.logit_attribution": "LogitAttribution",
    "scalpel.ops": "AbsTopK",
    "scalpel.semigroup.extraction.extraction": "Extraction Growth",
}


@pytest.fixture
def old_names_unread():
    """Remove the old names from sys.modules, as in a process that has imported none of them."""
    for old in MOVED:
        name = f"scalpel.{old}"
        sys.modules.pop(name, None)
        parent, _, last = name.rpartition(".")
        vars(sys.modules.get(parent, scalpel)).pop(last, None)


@pytest.mark.usefixtures("old_names_unread")
@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_every_old_name_gives_the_new_module(old: str, new: str):
    with pytest.warns(DeprecationWarning) as caught:
        module = importlib.import_module(f"scalpel.{old}")
    assert module is importlib.import_module(f"scalpel.{new}")
    assert module.__name__ == module.__spec__.name == f"scalpel.{new}"
    ours = [warning for warning in caught if f"scalpel.{old} " in str(warning.message)]
    assert len(ours) == 1 and f"scalpel.{new} " in str(ours[0].message)
    assert ours[0].filename == __file__  # the importing line, not one inside importlib


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_no_file_bears_an_old_name_and_one_bears_the_new(old: str, new: str):
    package = ROOT / "python" / "scalpel"
    old_path, new_path = package / old.replace(".", "/"), package / new.replace(".", "/")
    assert not old_path.exists() and not old_path.with_suffix(".py").exists()
    assert new_path.with_suffix(".py").is_file() or (new_path / "__init__.py").is_file()


@pytest.mark.usefixtures("old_names_unread")
@pytest.mark.parametrize(
    "statement",
    ["import scalpel.ops", "import scalpel.ops as ops", "from scalpel.ops import keep_topk", "from scalpel import ops"],
)
def test_every_form_of_import(statement: str):
    names: dict = {}
    with pytest.warns(DeprecationWarning, match=r"scalpel\.ops .*scalpel\.topk "):
        exec(statement, names)
    assert scalpel.ops is scalpel.topk
    assert names.get("ops", scalpel.topk) is scalpel.topk
    assert names.get("keep_topk", scalpel.keep_topk) is scalpel.keep_topk


@pytest.mark.usefixtures("old_names_unread")
def test_a_line_that_imports_again_warns_no_more():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            importlib.import_module("scalpel.ops")
    assert [warning.category for warning in caught] == [DeprecationWarning]


@pytest.mark.parametrize("name", ["scalpel.nothing", "scalpel.ops_", "scalpel.topk.ops", "scalpel.models.ops", "ops"])
def test_an_unknown_module_is_still_unknown(name: str):
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)
    assert MovedModuleFinder().find_spec(name) is None


@pytest.mark.usefixtures("old_names_unread")
def test_find_spec_finds_an_old_name_and_imports_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = importlib.util.find_spec("scalpel.models.config")
    assert spec.name == "scalpel.models.config" and spec.origin == "scalpel.models.circuitgpt.config"
    assert "scalpel.models.config" not in sys.modules
    assert importlib.util.find_spec("scalpel.models.circuitgpt.config").origin.endswith("config.py")


def test_the_finder_is_asked_last_and_once():
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
    assert [type(finder) for finder in before].count(MovedModuleFinder) == 1
    fresh = "import sys, scalpel; print(type(sys.meta_path[-1]).__name__, 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["MovedModuleFinder", "False"]


@pytest.mark.usefixtures("old_names_unread")
@pytest.mark.filterwarnings("ignore:scalpel:DeprecationWarning")
@pytest.mark.parametrize(("module", "names"), PICKLED.items())
def test_classes_are_found_where_old_pickles_look_for_them(module: str, names: str):
    for name in names.split():
        cls = pickle.loads(f"c{module}\n{name}\n.".encode())
        assert isinstance(cls, type) and cls.__name__ == name


@pytest.mark.usefixtures("old_names_unread")
@pytest.mark.filterwarnings("ignore:scalpel:DeprecationWarning")
def test_a_model_pickled_before_the_move():
    model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
    stored = pickle.dumps(model, protocol=2)  # this pickle opcode names a class: its module, a newline, its name
    for old, cls in (("circuitgpt", scalpel.CircuitGPT), ("config", scalpel.CircuitGPTConfig)):
        today, before = f"c{cls.__module__}\n".encode(), f"cscalpel.models.{old}\n".encode()
        assert today in stored
        stored = stored.replace(today, before)
    assert b"models.circuitgpt.config" not in stored and b"models.circuitgpt.model" not in stored
    ids, _ = model.tokenizer.batch(["x = [[1, 2"])
    assert torch.equal(pickle.loads(stored)(ids), model(ids))


def test_the_changelog_lists_what_moved():
    rows = re.findall(r"\| `scalpel\.([\w.]+)` \| `scalpel\.([\w.]+)` \|", (ROOT / "CHANGELOG.md").read_text())
    assert dict(rows) == MOVED and len(rows) == len(MOVED)
