"""Merging the states of several processes through torch.distributed, in the order of their ranks."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .state import State


def all_reduce(state: State, group: Any = None) -> State:
    """Return the merged state in every process; see :meth:`StreamingCovariance.all_reduce`.

    The first rank receives the other states one at a time, merges them, and sends the result to all. That takes memory
    for one more state there, and makes the bits depend on the order of the ranks only. ``state`` is not changed.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialized: call torch.distributed.init_process_group first, or start the "
            "program with torchrun"
        )
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise RuntimeError("this process is not in the group; only its members call all_reduce")
    arrive(group)
    mine = state.tensors()
    description = (state.kind(), {name: (tuple(t.shape), t.dtype) for name, t in mine.items()})
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, description, group)
    kinds = [kind for kind, _ in everyone]
    if any(kind != kinds[0] for kind in kinds):
        by_rank = "; ".join(f"rank {r}: method, dim, center, rank = {kind}" for r, kind in enumerate(kinds))
        raise ValueError(f"states of different kinds cannot be merged: {by_rank}")
    nccl = dist.get_backend(group) == "nccl"
    where = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if rank:
        with _names_the_rank(ranks[0]):
            for name in sorted(mine):
                dist.send(_moved(mine[name], where), dst=ranks[0], group=group)
    else:
        total = copy.deepcopy(state)  # so that a connection that breaks halfway leaves this state unchanged
        for other, (_, shapes) in enumerate(everyone[1:], start=1):
            with _names_the_rank(ranks[other]):
                received = {}
                for name, (shape, dtype) in sorted(shapes.items()):
                    received[name] = torch.empty(shape, dtype=dtype, device=where)
                    dist.recv(received[name], src=ranks[other], group=group)
            theirs = state.empty()
            theirs.restore({name: tensor.cpu() for name, tensor in received.items()})
            total.merge(theirs)
        mine = total.tensors()
    return _shared(state, mine, rank, ranks[0], group, where)


_arrivals: Counter[tuple[int, ...]] = Counter()  # calls so far of each group, equally many in each of its processes


def arrive(group: Any = None) -> None:
    """Wait for every process of the group.

    Raises:
        RuntimeError: If some do not arrive; the message names their ranks.
    """
    import torch.distributed as dist

    if dist.get_backend(group) != "gloo":
        dist.barrier(group)  # NCCL's own watchdog reports missing ranks
        return
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    _arrivals[tuple(ranks)] += 1
    mark = f"scalpel/{'-'.join(map(str, ranks))}/{_arrivals[tuple(ranks)]}"
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{mark}/{dist.get_rank()}", "here")
    try:
        dist.monitored_barrier(group, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{_absent(error, store, mark, ranks)} is gone and its rows are missing, so nothing was merged. Start all "
            "processes again; they continue from what was saved"
        ) from error


def _absent(error: RuntimeError, store: Any, mark: str, ranks: list[int]) -> str:
    """Name the ranks that did not arrive.

    The barrier's own error names them, unless the connection broke before the barrier began.
    """
    named = re.search(r"Ranks? ([\d, ]+) failed", str(error))
    if named is not None:
        return f"rank {named.group(1).strip(' ,')}"
    try:
        time.sleep(1.0)  # wait for those that are merely late
        missing = [str(rank) for rank in ranks if not store.check([f"{mark}/{rank}"])]
    except RuntimeError:
        missing = [f"{ranks[0]} (which holds the store)"]
    return f"rank {', '.join(missing)}" if missing else "a rank"


def _shared(
    state: State,
    merged: dict[str, Tensor],
    rank: int,
    first: int,
    group: Any,
    where: torch.device,
) -> State:
    """Send the first rank's merged state to all processes."""
    import torch.distributed as dist

    shapes: list[Any] = [{name: (tuple(t.shape), t.dtype) for name, t in merged.items()}]
    received = {}
    with _names_the_rank(first):
        dist.broadcast_object_list(shapes, src=first, group=group)
        for name, (shape, dtype) in sorted(shapes[0].items()):
            tensor = torch.empty(shape, dtype=dtype, device=where) if rank else _moved(merged[name], where)
            dist.broadcast(tensor, src=first, group=group)
            received[name] = tensor
    fresh = state.empty()
    fresh.restore({name: tensor.cpu() for name, tensor in received.items()})
    return fresh


@contextmanager
def _names_the_rank(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"the connection to rank {rank} broke while states were merged: {error}") from error


def _moved(tensor: Tensor, where: torch.device) -> Tensor:
    return tensor.contiguous().to(where)
