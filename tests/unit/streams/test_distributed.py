"""States of several processes on this machine are merged through torch.distributed."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import distributed_worker
import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from covariance_states import assert_close, same_bits
from distributed_worker import states
from places import SUPPORT, TABLES
from scalpel import StreamingCovariance

PROCESSES = multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.slow


class Ended(NamedTuple):
    """How a process ended, and what it wrote to its standard error stream."""

    returncode: int | None
    stderr: str


TASKS = {
    2: ("merge", "again", "differ", "collect", "groups", "rows"),
    4: ("merge", "again", "pair", "collect", "groups"),
}


@pytest.fixture(scope="module", autouse=True)
def _imports() -> Iterator[None]:
    """What the process that others are forked from is told when the first of them starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(TABLES), os.environ.get("PYTHONPATH", "")]))
        PROCESSES.set_forkserver_preload([distributed_worker.__name__])
        yield


def run(world: int, folder: Path, *tasks: str) -> list[Ended]:
    (folder / "met").unlink(missing_ok=True)
    started = []
    for rank in range(world):
        stderr = folder / f"stderr-{rank}"
        process = PROCESSES.Process(target=distributed_worker.work, args=(rank, world, folder, tasks, stderr))
        process.start()
        started.append((process, stderr))
    ended = []
    for process, stderr in started:
        process.join(timeout=240)
        ended.append(Ended(process.exitcode, stderr.read_text()))
    return ended


def succeed(world: int, folder: Path, *tasks: str) -> None:
    for each in run(world, folder, *tasks):
        assert each.returncode == 0, each.stderr


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a job with the given number of processes."""
    folders = {world: tmp_path_factory.mktemp(f"job-of-{world}") for world in TASKS}
    for world, folder in folders.items():
        succeed(world, folder, *TASKS[world])
    return folders


def loaded(folder: Path, name: str, rank: int) -> StreamingCovariance:
    return StreamingCovariance.load(folder / f"{name}-{rank}")


@pytest.mark.parametrize("world", [2, 4])
def test_all_reduce(world: int, jobs: dict[int, Path]) -> None:
    whole = states(0, 1)
    for name in whole:
        found = [loaded(jobs[world] / "merge", name, rank) for rank in range(world)]
        again = loaded(jobs[world] / "again", name, 0)
        assert all(same_bits(each, found[0]) for each in (*found, again)), name
        if name != "one has none":
            assert found[0].count == 500
        if name in ("exact", "uncentered"):
            assert_close(found[0], whole[name], 1e-12)


def test_a_part_of_the_processes(jobs: dict[int, Path]) -> None:
    parts = [states(rank, 4)["exact"] for rank in range(4)]
    assert_close(loaded(jobs[4] / "pair", "exact", 0), parts[0])
    for rank in (1, 2):
        expected = parts[1].merge(parts[2]) if rank == 1 else parts[1]
        assert_close(loaded(jobs[4] / "pair", "exact", rank), expected)


def test_states_that_differ_are_refused_everywhere(jobs: dict[int, Path]) -> None:
    for rank in range(2):
        said = (jobs[2] / "differ" / f"error-{rank}").read_text()
        assert "states of different kinds cannot be merged: rank 0: method" in said


@pytest.mark.parametrize("task", ["collect", "groups"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_corpus_is_shared_out(world: int, task: str, jobs: dict[int, Path]) -> None:
    model = build("like_csp_yolo2")
    batches = [tokens(model, 2, 7, seed=i) for i in range(9)]
    whole = scalpel.collect(model, batches, ["1.resid_in", "1.resid_in.grad"])
    for name, expected in whole.items():
        found = [loaded(jobs[world] / task, name, rank) for rank in range(world)]
        assert all(same_bits(each, found[0]) for each in found)
        assert_close(found[0], expected, 1e-10)


def test_one_process_may_have_no_rows(jobs: dict[int, Path]) -> None:
    model = build("like_csp_yolo2")
    texts = [tokens(model, 2, length, seed=length) for length in (7, 6)]  # the others are of two tokens or fewer
    rows = torch.cat([model.run_with_cache(ids)[1]["1.resid_in"][:, 2:].flatten(0, 1) for ids in texts]).detach()
    for rank in range(2):
        said = (jobs[2] / "rows" / f"error-{rank}").read_text()
        assert "no token of the whole corpus counts at 1.resid_in" in said
        assert_close(
            loaded(jobs[2] / "rows", "1.resid_in", rank), StreamingCovariance(rows.shape[1]).update(rows), 1e-10
        )


def test_a_rank_that_dies_is_named_and_a_restart_goes_on(tmp_path: Path, jobs: dict[int, Path]) -> None:
    done = run(2, tmp_path, "die")
    assert done[1].returncode == -9
    assert done[0].returncode == 1
    assert "rank 1 is gone and its rows are missing, so nothing was merged" in done[0].stderr
    saved = sorted(path.name for path in (tmp_path / "die" / "states" / "rank-1-of-2").glob("at-*"))
    assert [name[-1] for name in saved] == ["2", "4"]
    (tmp_path / "die").rename(tmp_path / "collect")
    succeed(2, tmp_path, "collect")
    for name in ("1.resid_in", "1.resid_in.grad"):
        assert same_bits(loaded(tmp_path / "collect", name, 1), loaded(jobs[2] / "collect", name, 0))


def test_without_a_job() -> None:
    with pytest.raises(RuntimeError, match="torch.distributed is not initialized: call .*init_process_group"):
        StreamingCovariance(3).update(torch.ones(2, 3)).all_reduce()
