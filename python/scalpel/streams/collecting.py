"""The covariance at many hooks, in as few passes over a corpus as memory allows."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._integers import integer
from .._native import runs_on
from ..covariance import StreamingCovariance
from ..covariance.on_device import OnDevice, Precision, update_all
from ..covariance.streaming import Method
from ..hooks.names import spells_pattern
from ..models.marks import model_mark
from .budget import bytes_of, groups_of
from .capture import Capture, Loss, Names
from .marks import batch_mark, corpus_mark, function_mark
from .rows import RowsAsGiven, key_of, read_rows
from .saved import WAY_OUT, Saved, States, Stored


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    hooks: Names,
    memory: str | int = "8GiB",
    *,
    rows: RowsAsGiven = None,
    rank: int | None = None,
    method: Method = "tracker",
    center: bool = True,
    precision: Precision = "accurate",
    loss: Loss | None = None,
    folder: str | Path | None = None,
    save_every: int = 64,
    fresh: bool = False,
    shard: bool = False,
    progress: bool | Callable[[int], None] = True,
) -> Mapping[str, StreamingCovariance]:
    """Compute the covariance of activations and gradients at a model's hooks over a corpus.

    Args:
        model: A :class:`scalpel.CircuitGPT`, a transformers model, or any nn.Module that takes token ids.
        batches: Token ids (B, L), int64, or transformers batches. Rows at padding, where ``attention_mask`` is 0, are
            left out.
        hooks: Names of hooks, a regular expression that matches whole names, or a function of a name. The name of a
            hook selects the activations there. With ``.grad`` after it, as in ``"0.resid_in.grad"``, it selects the
            gradient of the loss with respect to these activations, with one row for each token. Names may be
            Scalpel's, TransformerLens's, or module paths, with ``:in`` at the end for a module's input, in whatever
            :func:`scalpel.jacobian` finds a decoder. The weights of attention, ``"0.attn.pattern"``, are chosen by a
            list or by an expression that spells ``pattern``, of a CircuitGPT and of transformers' models whose hooks
            have Scalpel's names. They have a row for each query and a column for each head and key, heads side by side,
            so all batches need one length; a key is counted by its place in the batch, padding included. Their gradient
            is zero at keys that the query may not read.
        memory: How much memory the states may take while they are filled, in bytes or as a text such as "8GiB". If not
            all states fit, the hooks are divided into groups and the corpus is read once for each group, so ``batches``
            must be something that can be read again, such as a list. For a model on a GPU this is memory of the GPU.
        rows: Which tokens count as rows: :class:`scalpel.Rows`, or what its ``mask`` may be. The others are attended to
            as before, and the loss covers them. None counts all tokens that are not padding.
        rank: As for :class:`scalpel.StreamingCovariance`. A stream that is narrower takes its own width as the rank.
        method: As for :class:`scalpel.StreamingCovariance`.
        center: As for :class:`scalpel.StreamingCovariance`.
        precision: As for :class:`scalpel.StreamingCovariance`.
        loss: A function of (logits, batch) that returns one number. None takes the cross-entropy of each next token, in
            nats, summed over tokens.
        folder: A folder in which the states are saved every ``save_every`` batches. A call that was stopped, at
            whatever moment, continues from the last save, and the result has the same bits as without the stop.
        save_every: The number of batches between two saves.
        fresh: Whether to discard what ``folder`` holds and begin again.
        shard: Whether this is one process of a torch.distributed job. Each process then reads the batches rank,
            rank + world, rank + 2 · world and so on, and all processes return the merged states; see
            :meth:`scalpel.StreamingCovariance.all_reduce`.
        progress: Whether to show a progress bar on a terminal, or a function that is called with the number of batches
            done.

    Returns:
        The states by the names of their streams. If the hooks were divided into groups, this is a mapping that reads
        each state from disk when it is asked for. For a model on a GPU, exact states stay on the GPU; sketches, and
        states that are read from disk, are on the CPU.

    Raises:
        ValueError: If there is no such hook, a single state does not fit into ``memory``, several groups are needed but
            ``batches`` can be read only once, ``folder`` holds something else, or no token of the whole corpus counts.
        RuntimeError: If ``shard`` is set and there is no distributed job, or another process has ended.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids = torch.arange(64).reshape(2, 32)
        >>> states = scalpel.collect(model, [ids], ["final_resid", "final_resid.grad"], progress=False)
        >>> states["final_resid"].count, list(states)
        (64, ['final_resid', 'final_resid.grad'])
    """
    if integer(save_every, "save_every") < 1:
        raise ValueError(f"save_every is {save_every}; it must be 1 or more")
    bytes_of(memory)
    share = _Share.of_job() if shard else _Share(0, 1)
    choice = read_rows(rows)
    capture = Capture(model, hooks, loss, choice)
    share.check_equal(capture.streams)
    first, batches, once = _peek(batches)
    rows_of = capture(first, capture.streams)
    widths = {name: rows.shape[1] for name, rows in rows_of.items()}
    places = {name: _place(rows, rank) for name, rows in rows_of.items()}
    kinds = {place.partition(":")[0] for place in places.values()}
    del rows_of
    groups = groups_of(widths, memory, rank)
    if len(groups) > 1 and once:
        raise ValueError(
            f"{len(widths)} streams don't fit {memory} together, and batches can be read only once: give a list (or "
            "anything that can be read again), more memory, fewer hooks, or a rank"
        )

    def new(name: str) -> StreamingCovariance:
        dim = widths[name]
        return StreamingCovariance(dim, None if rank is None else min(rank, dim), method, center, precision=precision)

    if folder is not None and getattr(capture.model, "_interventions", None):
        raise ValueError(
            "the model has ablations in force, which states on disk would not show: collect without folder=, and "
            "save the states under names of your own"
        )
    key = {
        "model": None if folder is None else model_mark(capture.model),  # hashing all weights takes a while
        "loss": None if loss is None else function_mark(loss),
        "streams": widths,
        "rank": rank,
        "method": None if rank is None else method,
        "center": center,
        **({} if choice is None else {"rows": key_of(choice)}),
        **({} if precision == "accurate" else {"precision": precision}),
        **({} if kinds == {"cpu"} else {"places": sorted(kinds)}),  # other devices round differently
        "save_every": save_every,
        "share": [share.rank, share.world],
        "groups": groups,
    }
    temporary = tempfile.mkdtemp(prefix="scalpel-") if folder is None and len(groups) > 1 else None
    where = folder if temporary is None else temporary
    saved = None if where is None else Saved(share.folder(Path(where)), key, fresh)
    filled: States = {}
    corpus = ""
    if saved is not None and saved.corpus:
        corpus = corpus_mark(batches)
        if corpus != saved.corpus:
            raise ValueError(f"{saved.folder} holds states of another corpus: {WAY_OUT}")
    with _removed_on_error(temporary), _Bar(progress, len(groups), batches) as bar:
        for number, group in enumerate(groups):
            if saved is not None and saved.finished(group):
                bar.skip_group()
                continue
            filling = _Filling(capture, share, None if temporary else saved, number, save_every)
            states, read = filling.fill({name: new(name) for name in group}, batches, bar)
            if corpus and read != corpus:
                raise ValueError(
                    f"batches differed when they were read again, for group {number + 1} of {len(groups)}: give "
                    "something with a fixed order, such as a list, or memory for all streams at once"
                )
            corpus = read
            if choice is not None and not shard:
                _check_some(states)
            if saved is not None:
                saved.finish(states, corpus)
            if len(groups) == 1:
                filled = states
    if len(groups) > 1:
        assert saved is not None
        merged = _merged_on_disk(saved, widths, choice is not None) if shard else saved
        return Stored(merged, list(widths), temporary)
    if saved is not None and not filled:
        filled = {name: saved.load(name).to(places[name]) for name in widths}
    result = {name: filled[name].all_reduce() if shard else filled[name] for name in widths}
    if choice is not None:
        _check_some(result)
    return result


def _check_some(states: Mapping[str, StreamingCovariance]) -> None:
    """Raise ValueError for a state without rows."""
    for name, state in states.items():
        if state.count == 0:
            raise ValueError(
                f"no token of the whole corpus counts at {name}: rows= leaves all of them out; give longer texts, or "
                "leave out fewer tokens"
            )


@contextmanager
def _removed_on_error(folder: str | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class _Filling:
    """Fill one group of streams in one pass over the corpus."""

    def __init__(self, capture: Capture, share: _Share, saved: Saved | None, group: int, save_every: int) -> None:
        self.capture, self.share = capture, share
        self.saved, self.group, self.save_every = saved, group, save_every

    def fill(self, states: States, batches: Iterable[Any], bar: _Bar) -> tuple[States, str]:
        """Add all batches to the states, and return the states and the digest of the corpus."""
        skip, digest = 0, ""
        if self.saved is not None and (last := self.saved.last(self.group)) is not None:
            loaded, position = last
            for name, state in loaded.items():
                state._precision = states[name]._precision  # files do not store the precision of later additions
            states = loaded
            skip, digest = position["batches"], position["digest"]
        read, count = hashlib.sha256(), 0
        for batch in batches:
            read.update(batch_mark(batch))
            count += 1
            if count > skip:
                if (count - 1) % self.share.world == self.share.rank:
                    self._add(states, batch, count)
                if self.saved is not None and count % self.save_every == 0:
                    self.saved.save(states, self.group, count, read.hexdigest())
            elif count == skip and read.hexdigest() != digest:
                raise ValueError(
                    f"the first {skip} batches are not those that the saved states were made of: give the same "
                    "corpus, another folder, or fresh=True"
                )
            bar.step()
        if count == 0:
            raise ValueError("batches were empty when they were read again: give a list, or fresh=True")
        if count < skip:
            raise ValueError(f"there are {count} batches, and the saved states were made of the first {skip} of more")
        return states, read.hexdigest()

    def _add(self, states: States, batch: Any, number: int) -> None:
        """Add a batch to the states.

        States on a GPU are updated together, so that this process waits for the GPU only once.
        """
        together: dict[torch.device, list[tuple[str, OnDevice, Tensor]]] = {}
        for name, rows in self.capture(batch, states).items():
            if rows.shape[1] != states[name].dim:
                advice = "choose hooks whose width doesn't depend on the batch"
                if spells_pattern(name):
                    advice = (
                        "attention weights have a column for each head and key, so give batches of one length, cut or "
                        "padded to it"
                    )
                raise ValueError(
                    f"{name} is {rows.shape[1]} wide in batch {number}, and was {states[name].dim}: {advice}"
                )
            if not rows.dtype.is_floating_point:
                raise _refused(name, number, f"the values are {rows.dtype}")
            if _place(rows, states[name].rank) == "cpu":
                rows = rows.cpu()
            elif states[name].count:
                states[name] = states[name].to(rows.device)  # a state that was read from disk is on the CPU
            else:
                states[name]._be_on(rows.device)
            state = states[name]._state
            if isinstance(state, OnDevice):
                together.setdefault(rows.device, []).append((name, state, rows))
            elif (bad := state.update(rows)) >= 0:
                raise _refused(name, number, _not_finite(bad))
        for updates in together.values():
            bad_rows = update_all([state for _, state, _ in updates], [rows for _, _, rows in updates])
            for (name, _, _), bad in zip(updates, bad_rows, strict=True):
                if bad >= 0:
                    raise _refused(name, number, _not_finite(bad))


def _place(rows: Tensor, rank: int | None) -> str:
    """Name the device on which a stream's state is kept."""
    return str(rows.device) if rank is None and runs_on(rows.device) else "cpu"


def _refused(name: str, batch: int, reason: str) -> ValueError:
    return ValueError(f"{name}, batch {batch}: {reason}; states that were saved are kept")


def _not_finite(row: int) -> str:
    return f"row {row} is not finite, or beyond 1e150"


def _merged_on_disk(saved: Saved, names: Iterable[str], some: bool) -> Saved:
    """Merge the states of all processes, with one state at a time in memory, and save the results in a folder.

    Each process keeps its own states as well, so that the job can be restarted. With ``some``, a state without rows is
    an error.
    """
    merged = Saved(saved.folder / "merged", {"of": "merged"}, fresh=True)
    for name in names:
        state = saved.load(name).all_reduce()
        if some:
            _check_some({name: state})
        merged.finish({name: state}, "merged")
    return merged


class _Share:
    """The batches that this process reads: number ``rank`` and every ``world``-th after it."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def of_job(cls) -> _Share:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "shard=True needs a torch.distributed job: call init_process_group first, or use torchrun"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def check_equal(self, streams: list[str]) -> None:
        """Check that all processes were asked for the same streams, because their states are merged in this order.

        Raises:
            ValueError: If they were not.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, streams)
        if any(theirs != streams for theirs in everyone):
            raise ValueError(f"the processes were given different hooks: {everyone}")

    def folder(self, folder: Path) -> Path:
        return folder if self.world == 1 else folder / f"rank-{self.rank}-of-{self.world}"


class _Bar:
    """The progress bar, which counts the batches done in all groups."""

    def __init__(self, progress: bool | Callable[[int], None], groups: int, batches: Any) -> None:
        self._length = len(batches) if hasattr(batches, "__len__") else None
        total = None if self._length is None else self._length * groups
        self._report = progress if callable(progress) else None
        # With disable=None, tqdm shows no bar unless stderr is a terminal.
        self._bar: Any = tqdm(total=total, unit="batch", disable=None if progress is True else True)
        self._done = 0

    def skip_group(self) -> None:
        self.step(self._length or 0)

    def step(self, batches: int = 1) -> None:
        self._done += batches
        self._bar.update(batches)
        if self._report is not None:
            self._report(self._done)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any], bool]:
    """Return the first batch, all batches including the first, and whether they can be read only once."""
    iterator: Iterator[Any] = iter(batches)
    once = iter(batches) is iterator
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError("batches is empty; give at least one batch of token ids") from None
    return first, itertools.chain([first], iterator) if once else batches, once
