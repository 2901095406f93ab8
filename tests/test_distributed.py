"""States of several processes on the loopback interface, merged through torch.distributed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from covariance_states import assert_close, same_bits
from distributed_worker import states
from scalpel import StreamingCovariance

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(task: str, world: int, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), task, str(rank), str(world), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def succeed(task: str, world: int, folder: Path) -> None:
    for each in run(task, world, folder):
        assert each.returncode == 0, each.stderr


def loaded(folder: Path, task: str, name: str, rank: int) -> StreamingCovariance:
    return StreamingCovariance.load(folder / f"{task}-{name}-{rank}")


@pytest.mark.parametrize("world", [2, 4])
def test_all_reduce(world: int, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    succeed("merge", world, tmp_path)
    succeed("merge", world, tmp_path / "again")
    whole = states(0, 1)
    for name in whole:
        found = [loaded(tmp_path, "merge", name, rank) for rank in range(world)]
        again = loaded(tmp_path / "again", "merge", name, 0)
        assert all(same_bits(each, found[0]) for each in (*found, again)), name
        if name != "one has none":
            assert found[0].count == 500
        if name in ("exact", "uncentered"):
            assert_close(found[0], whole[name], 1e-12)


def test_a_part_of_the_processes(tmp_path: Path) -> None:
    succeed("pair", 4, tmp_path)
    parts = [states(rank, 4)["exact"] for rank in range(4)]
    assert_close(loaded(tmp_path, "pair", "exact", 0), parts[0])
    for rank in (1, 2):
        assert_close(loaded(tmp_path, "pair", "exact", rank), parts[1].merge(parts[2]) if rank == 1 else parts[1])


def test_states_that_differ_are_refused_everywhere(tmp_path: Path) -> None:
    for each in run("differ", 2, tmp_path):
        assert each.returncode and "states of different kinds can't be merged: rank 0: method" in each.stderr


@pytest.mark.parametrize("task", ["collect", "groups"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_corpus_is_shared_out(world: int, task: str, tmp_path: Path) -> None:
    succeed(task, world, tmp_path)
    model = build("like_csp_yolo2")
    batches = [tokens(model, 2, 7, seed=i) for i in range(9)]
    whole = scalpel.collect(model, batches, ["1.resid_in", "1.resid_in.grad"])
    for name, expected in whole.items():
        found = [loaded(tmp_path, task, name, rank) for rank in range(world)]
        assert all(same_bits(each, found[0]) for each in found)
        assert_close(found[0], expected, 1e-10)


def test_a_rank_that_dies_is_named_and_a_restart_goes_on(tmp_path: Path) -> None:
    done = run("die", 2, tmp_path)
    assert done[1].returncode == -9
    assert done[0].returncode == 1
    assert "rank 1 is gone: its rows are lacking, so nothing is merged" in done[0].stderr
    saved = sorted(path.name for path in (tmp_path / "states" / "rank-1-of-2").glob("at-*"))
    assert [name[-1] for name in saved] == ["2", "4"]
    succeed("collect", 2, tmp_path)
    (tmp_path / "whole").mkdir()
    succeed("collect", 2, tmp_path / "whole")
    for name in ("1.resid_in", "1.resid_in.grad"):
        assert same_bits(loaded(tmp_path, "collect", name, 1), loaded(tmp_path / "whole", "collect", name, 0))


def test_without_a_job() -> None:
    with pytest.raises(RuntimeError, match="torch.distributed isn't set up: call .*init_process_group"):
        StreamingCovariance(3).update(torch.ones(2, 3)).all_reduce()
