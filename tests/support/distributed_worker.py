"""One process of the torch.distributed tests, which :func:`work` runs.

Starting processes is slow, so one job runs several tasks, each in a folder of its own name below the job's. And they
are forked from a process that has imported this module and does nothing else.
"""

import datetime
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

import scalpel
from circuitgpt_cases import build, tokens
from covariance_states import correlated
from scalpel import StreamingCovariance

WIDTH, ROWS = 20, 500


def states(rank: int, world: int) -> dict[str, StreamingCovariance]:
    x = correlated(ROWS, WIDTH, shift=3.0).tensor_split(world)[rank]
    return {
        "exact": StreamingCovariance(WIDTH).update(x),
        "uncentered": StreamingCovariance(WIDTH, center=False).update(x),
        "tracker": StreamingCovariance(WIDTH, rank=4).update(x),
        "directions": StreamingCovariance(WIDTH, rank=4, method="frequent_directions").update(x),
        "one has none": StreamingCovariance(WIDTH).update(x if rank else x[:0]),
    }


def collected(folder: Path, rank: int, die: bool, memory: str = "1GiB") -> dict[str, StreamingCovariance]:
    model = build("like_csp_yolo2")

    def stop(done: int) -> None:
        if die and rank == 1 and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    batches = [tokens(model, 2, 7, seed=i) for i in range(9)]
    hooks = ["1.resid_in", "1.resid_in.grad"]
    found = scalpel.collect(model, batches, hooks, memory, folder=folder, save_every=2, shard=True, progress=stop)
    return dict(found)


def done(task: str, rank: int, world: int, folder: Path) -> dict[str, StreamingCovariance]:
    if task in ("merge", "again"):
        mine = states(rank, world)
        if world == 2:  # the stricter case: tensors go to meta unless the library names a device
            torch.set_default_device("meta")
        try:
            return {name: state.all_reduce() for name, state in mine.items()}
        finally:
            torch.set_default_device(None)
    if task == "differ":
        try:
            StreamingCovariance(3 + rank).update(torch.ones(2, 3 + rank)).all_reduce()
        except ValueError as error:
            (folder / f"error-{rank}").write_text(str(error))
        return {}
    if task == "pair":
        pair = dist.new_group([1, 2])
        mine = states(rank, world)["exact"]
        return {"exact": mine.all_reduce(pair) if rank in (1, 2) else mine}
    if task == "rows":  # only the first process reads texts that are long enough
        texts = [tokens(build("like_csp_yolo2"), 2, length, seed=length) for length in (7, 2, 6, 1)]
        options = {"memory": "60KiB", "rows": scalpel.Rows(skip_first=2), "folder": folder / "states", "shard": True}
        try:
            scalpel.collect(build("like_csp_yolo2"), texts[1::2], ["1.resid_in"], **options, fresh=True)
        except ValueError as error:
            (folder / f"error-{rank}").write_text(str(error))
        found = scalpel.collect(build("like_csp_yolo2"), texts, ["1.resid_in", "final_resid"], **options, fresh=True)
        return dict(found)
    assert task in ("collect", "groups", "die"), task
    return collected(folder / "states", rank, task == "die", "60KiB" if task == "groups" else "1GiB")


def work(rank: int, world: int, whole: Path, tasks: tuple[str, ...], stderr: Path) -> None:
    """Do the tasks as one of ``world`` processes; what goes to the standard error stream goes to a file."""
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    # The processes meet through a file, because a port that was free a moment ago may be taken.
    dist.init_process_group(
        "gloo", init_method=f"file://{whole / 'met'}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    for task in tasks:
        folder = whole / task
        folder.mkdir(exist_ok=True)
        for name, state in done(task, rank, world, folder).items():
            state.save(folder / f"{name}-{rank}")
        dist.barrier()
    dist.destroy_process_group()
