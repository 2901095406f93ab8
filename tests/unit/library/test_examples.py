"""The examples run unchanged and print what they promise."""

import runpy
from functools import partial
from importlib import import_module

import pytest

import scalpel
from places import ROOT
from scalpel.circuits.masks import Schedule

prune = import_module("scalpel.circuits.prune")
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(("name", "words"), [("mod3-mini", "Z_3"), ("flip-flop-mini", "aperiodic")])
def test_token_semigroup(name, words, capsys, monkeypatch):
    if name == "mod3-mini":  # README's example, which test_shipped.py runs, makes as many trials with it as usual
        monkeypatch.setattr(scalpel.semigroup, "extract", partial(scalpel.semigroup.extract, prefixes=64, pairs=112))
    runpy.run_path(str(EXAMPLES / "token_semigroup.py"))["main"](name)
    out = capsys.readouterr().out
    assert out.startswith("finite: ") and words in out and "shuffled_labels" in out


def test_cut_open(capsys, monkeypatch):
    monkeypatch.setattr(prune, "Schedule", lambda: Schedule(steps=8, batch=8))
    runpy.run_path(str(EXAMPLES / "cut_open.py"))["main"](seeds=1, prompts=32)
    out = capsys.readouterr().out
    assert out.count("the loss rises by") == 5 and "seed 0: " in out
    assert "letters whose action" in out or "nodes" in out


def test_guard_generation(capsys):
    runpy.run_path(str(EXAMPLES / "guard_generation.py"))["main"](prompts=8)
    out = capsys.readouterr().out
    assert out.count("alone:") == 3 and "guarded: …']]\\n'" in out and out.count("guarded: stopped") == 2


def test_spectra(capsys):
    runpy.run_path(str(EXAMPLES / "spectra.py"))["main"]()
    out = capsys.readouterr().out
    assert out.count("first component") == 4 and "exponents less growth" in out
