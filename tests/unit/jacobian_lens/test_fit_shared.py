"""Processes that share the prompts of a fit, against a single one: the same bits, the same stop, killed or not."""

from __future__ import annotations

import datetime
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from circuitgpt_cases import build
from scalpel.jacobian_lens.fitting import fit
from scalpel.jacobian_lens.lens import JacobianLens

WORLD = 2


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(0, 7) for _ in range(7)] for _ in range(count)]


def fitted(given: Any, **options: Any) -> JacobianLens:
    torch.set_num_threads(1)
    return fit(build("like_csp_yolo2"), given, **{"skip_first": 2, "progress": False} | options)


def job(folder: Path, task: Callable[[int], None]) -> list[int]:
    """Run ``task(rank)`` in forked processes of one job, and return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "met").unlink(missing_ok=True)
    children = []
    for rank in range(WORLD):
        if (child := os.fork()) == 0:  # starting a new process is slow
            code = 1
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder / 'met'}",
                    rank=rank,
                    world_size=WORLD,
                    timeout=datetime.timedelta(seconds=60),
                )
                task(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def bits(lens: JacobianLens) -> tuple[bytes, ...]:
    sums = lens.sums
    return sums.norms.tobytes(), sums.numbers.tobytes(), *(sums.total(layer).tobytes() for layer in lens.J)


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_processes_share_the_prompts(tmp_path: Path, tolerance: float | None) -> None:
    given = [*prompts(4), [1, 2], *prompts(9)[4:]]

    def task(rank: int) -> None:
        lens = fitted(given, shard=True, tolerance=tolerance, folder=tmp_path / "lens")
        torch.save((bits(lens), lens.about), tmp_path / f"{rank}.pt")

    assert job(tmp_path, task) == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    assert found[0] == found[1]
    read = found[0][1]["prompts_read"]
    with pytest.warns(UserWarning, match="fewer than 4 tokens"):
        whole = fitted(given[:read])
    assert found[0][0] == bits(whole)
    if tolerance is None:
        assert read == 10
    else:
        assert max(whole.error.values()) <= tolerance and read == 8
        with pytest.warns(UserWarning, match="fewer than 4 tokens"):
            before = fitted(given[: read - WORLD])
        assert max(before.error.values()) > tolerance
    assert bits(JacobianLens.from_folder(tmp_path / "lens")) == bits(whole)


def test_a_process_that_was_killed_goes_on(tmp_path: Path) -> None:
    given = prompts(8)

    def killed(rank: int) -> None:
        def die(done: int) -> None:
            if rank == 1 and done == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        fitted(given, shard=True, folder=tmp_path / "lens", progress=die)

    def task(rank: int) -> None:
        torch.save(bits(fitted(given, shard=True, folder=tmp_path / "lens")), tmp_path / f"{rank}.pt")

    assert -signal.SIGKILL in job(tmp_path, killed)
    assert job(tmp_path, task) == [0, 0]
    assert torch.load(tmp_path / "0.pt", weights_only=False) == bits(fitted(given))
