"""Files and copies of StreamingCovariance: they are complete and correct, or refused."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from covariance_states import correlated, same_bits, state_of
from scalpel import StreamingCovariance


@pytest.mark.parametrize("center", [True, False])
def test_save_and_load_keep_every_bit(tmp_path: Path, center: bool) -> None:
    state = StreamingCovariance(13, center=center, dtype=torch.float32).update(correlated(50, 13))
    path = tmp_path / "state.safetensors"
    state.save(path)
    loaded = StreamingCovariance.load(path)
    assert same_bits(loaded, state)
    assert (loaded.center, loaded.dtype, loaded.dim) == (center, torch.float32, 13)
    more = correlated(20, 13)
    assert same_bits(loaded.update(more), state.update(more))
    state.save(path)
    assert same_bits(StreamingCovariance.load(str(path)), state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    state_of(correlated(9, 4)).save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    old = state_of(correlated(9, 4))
    old.save(path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scalpel.covariance.file.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        state_of(correlated(30, 4)).save(path)
    assert same_bits(StreamingCovariance.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state_of(correlated(9, 4)).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or not a covariance state"):
            StreamingCovariance.load(path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state_of(correlated(9, 4)).save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        StreamingCovariance.load(path)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not one that StreamingCovariance.save wrote"):
        StreamingCovariance.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a covariance state"):
        StreamingCovariance.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        StreamingCovariance.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"dim": 5}, "dim is 5, and mean has shape"),
        ({"dim": 10**15}, "dim is 1000000000000000, and mean has shape"),
        ({"center": "no"}, "center is .no."),
        ({"crc32": ["mean"]}, "damaged header"),
        ({"count": -1}, "count is -1"),
        ({"count": "x"}, "count is 'x'"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"crc32": {}}, "mean"),
        ({"crc32": None}, "damaged header"),
    ],
)
def test_unsound_headers_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    state = state_of(correlated(9, 4))
    state.save(tmp_path / "state")
    from safetensors import safe_open

    with safe_open(str(tmp_path / "state"), framework="pt") as file:
        header = json.loads(file.metadata()["header"]) | change
    metadata = {"kind": "scalpel.StreamingCovariance", "header": json.dumps(header)}
    save_file(state._state.tensors(), tmp_path / "state", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        StreamingCovariance.load(tmp_path / "state")


def test_pickle_and_copy() -> None:
    state = state_of(correlated(9, 4))
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), copy.copy(state)):
        assert same_bits(other, state)
        other.update(correlated(3, 4))
        assert same_bits(state, state_of(correlated(9, 4)))
