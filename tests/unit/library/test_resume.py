"""Folders of finished work: pieces they hold are resumed, and pieces of other work are refused by name."""

import json

import numpy as np
import pytest

from scalpel._resume import Pieces, WayOut, Work, differences
from scalpel.analysis.store import Store
from scalpel.circuits.effects import _FinishedHooks as FinishedHooks
from scalpel.streams.saved import Saved
from scalpel.training.loop import _fields
from scalpel.training.recipe import Recipe

WAY_OUT = WayOut("census", "give another --out", "--fresh to count anew there")


def census(folder, key=None, **options):
    return Work(folder, "census.json", key or {"year": 1900}, WAY_OUT, pieces=["towns/*.json"], **options)


def test_a_finished_piece_is_read_by_a_second_call(tmp_path):
    census(tmp_path).write("towns/a.json", {"people": 3})
    again = census(tmp_path)
    assert again.read("towns/a.json") == {"people": 3} and again.read("towns/b.json") is None


def test_another_key_is_refused_with_what_differs_and_the_way_out(tmp_path):
    census(tmp_path, {"year": 1900, "of": {"land": "A", "sea": 1}, "hash": 64 * "0"})
    with pytest.raises(ValueError) as raised:
        census(tmp_path, {"year": 1910, "of": {"land": "B", "sea": 1}, "hash": 64 * "1"})
    message = str(raised.value)
    for part in (str(tmp_path), "year 1900 there, 1910 here", "of.land 'A' there", "another hash", "--out", "--fresh"):
        assert part in message
    assert "sea" not in message and 64 * "1" not in message


def test_keys_are_compared_as_json_has_them(tmp_path):
    census(tmp_path, {"steps": (1, 2)})
    census(tmp_path, {"steps": [1, 2]})


def test_fresh_removes_the_works_own_files_and_no_other(tmp_path):
    census(tmp_path).write("towns/a.json", {"people": 3})
    (tmp_path / "mine.txt").write_text("kept")
    work = census(tmp_path, {"year": 1910}, fresh=True)
    assert work.read("towns/a.json") is None and (tmp_path / "mine.txt").read_text() == "kept"
    census(tmp_path, {"year": 1910})


@pytest.mark.parametrize("fresh", [False, True])
def test_pieces_of_an_unknown_work_are_neither_adopted_nor_removed(tmp_path, fresh):
    census(tmp_path).write("towns/a.json", {"people": 3})
    (tmp_path / "census.json").unlink()
    with pytest.raises(ValueError, match=r"holds towns.a\.json, but no census\.json"):
        census(tmp_path, fresh=fresh)
    assert (tmp_path / "towns" / "a.json").exists()


def test_fresh_leaves_a_folder_without_a_key_as_it_was(tmp_path):
    """Others' files may have the names of what such work leaves behind."""
    for name in ("states/mine.txt", "blocks-2024/mine.txt", "spectra-of-stars.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    Store(tmp_path, {"seed": 0}, 8, fresh=True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.read_text() == "mine"]) == 3


def test_names_that_only_such_work_uses_may_be_removed_without_a_key(tmp_path):
    census(tmp_path).write("towns/a.json", {"people": 3})
    (tmp_path / "census.json").unlink()
    with pytest.raises(ValueError, match="--fresh"):
        census(tmp_path, own_names=True)
    assert census(tmp_path, own_names=True, fresh=True).read("towns/a.json") is None


@pytest.mark.parametrize("fresh", [False, True])
def test_another_programs_file_stays(tmp_path, fresh):
    (tmp_path / "census.json").write_text('{"my": "config"}')
    with pytest.raises(ValueError, match=r"census\.json belongs to another program"):
        census(tmp_path, fresh=fresh)
    assert (tmp_path / "census.json").read_text() == '{"my": "config"}'


def test_damaged_files_are_named_and_fresh_replaces_them(tmp_path):
    census(tmp_path).write("towns/a.json", {"people": 3})
    (tmp_path / "towns" / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json can't be read .*--fresh"):
        census(tmp_path).read("towns/a.json")
    (tmp_path / "census.json").write_text("{")
    with pytest.raises(ValueError, match=r"census\.json can't be read .*--fresh"):
        census(tmp_path)
    assert census(tmp_path, fresh=True).read("towns/a.json") is None


def test_a_piece_that_could_not_be_written_whole_is_absent(tmp_path):
    pieces = Pieces(tmp_path)
    with pytest.raises(KeyboardInterrupt), pieces.writing("a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), pieces.writing_folder("b") as draft:
        (draft / "half").write_text("")
        raise KeyboardInterrupt
    assert not pieces.path("a.bin").exists() and not pieces.path("b").exists()
    with pieces.writing_folder("b") as draft:  # the remains of the first attempt neither block nor enter the second
        (draft / "whole").write_text("")
    assert [path.name for path in pieces.path("b").iterdir()] == ["whole"]


def test_numbers_that_are_not_finite_are_refused_unless_allowed(tmp_path):
    pieces = Pieces(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        pieces.write("a.json", {"loss": float("inf")})
    assert not pieces.path("a.json").exists()
    pieces.write("a.json", {"loss": float("inf")}, allow_nan=True)
    assert pieces.read("a.json") == {"loss": float("inf")}


def test_a_later_run_learns_that_one_was_ended_from_outside(tmp_path):
    for times in (0, 1, 2):
        work = census(tmp_path)
        assert work.cut_off(town="a") == times and work.cut_off(town="b") == 0
        work.begin(town="a")
    work.end()
    assert census(tmp_path).cut_off(town="a") == 0
    work.begin(town="a")
    work.finish("towns/a.json", {"people": 3})
    assert work.cut_off(town="a") == 0


def test_a_key_of_no_known_kind_differs(tmp_path):
    assert differences(None, {"year": 1}) == "of an unknown kind"
    assert differences({"year": 1}, {"month": 1}) == "month None there, 1 here; year 1 there, None here"


# ---- folders that earlier versions wrote ---------------------------------------------------------


def test_an_earlier_analysis_is_resumed(tmp_path):
    begun = {"chunk": 1, "length": 32, "times": 1}
    shrunk = [{"chunk": 0, "from": 64, "to": 32}]
    state = {"key": {"seed": 0}, "length": 32, "shrunk": shrunk, "begun": begun}
    (tmp_path / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "00000.json").write_text('{"chunk": 0}\n')
    store = Store(tmp_path, {"seed": 0}, 64, fresh=False)
    assert (store.length, store.shrunk, store.times_cut_off(1)) == (32, shrunk, 1)
    assert store.load(0) == {"chunk": 0} and store.load(1) is None
    with pytest.raises(ValueError, match="another analysis .seed 0 there, 1 here"):
        Store(tmp_path, {"seed": 1}, 64, fresh=False)


def test_an_earlier_analysis_without_a_note_of_what_was_begun_is_resumed(tmp_path):
    (tmp_path / "state.json").write_text('{"key": {"seed": 0}, "length": 32, "shrunk": []}')
    assert Store(tmp_path, {"seed": 0}, 64, fresh=False).times_cut_off(0) == 0


def test_an_earlier_collection_is_resumed(tmp_path):
    (tmp_path / "collect.json").write_text('{\n  "version": 1,\n  "key": {\n    "center": true\n  }\n}\n')
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "corpus.txt").write_text("abc\n")
    assert Saved(tmp_path, {"center": True}).corpus == "abc"
    (tmp_path / "collect.json").write_text('{"version": 2, "key": {"center": true}}')
    with pytest.raises(ValueError, match="another collection .version 2 there, 1 here"):
        Saved(tmp_path, {"center": True})


def test_earlier_effects_are_resumed(tmp_path):
    key = {"model": "a", "task": "b", "seed": 0}
    (tmp_path / "effects.json").write_text(json.dumps(key, indent=2, sort_keys=True))
    np.save(tmp_path / "0.attn.q.npy", np.ones(3))
    kept = FinishedHooks(tmp_path, key, ["0.attn.q", "0.attn.k"])
    stored = kept.load("0.attn.q")
    assert stored is not None and stored.tolist() == [1, 1, 1] and kept.load("0.attn.k") is None


def test_the_recipe_in_an_earlier_training_state_is_read():
    assert _fields(repr(Recipe(seed=3))) == Recipe(seed=3).to_dict() | {"betas": Recipe().betas}
