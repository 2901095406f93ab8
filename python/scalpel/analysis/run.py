"""An analysis: a text in chunks through a model and an untrained one, each chunk kept as soon as it is measured."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._info import __version__
from ..experiments.result import environment, plain
from .measure import Figures, measure
from .source import Source, load, ran_out
from .store import Store
from .streamed import measure_streamed
from .summary import INTERVAL, summarise
from .text import read_text

LENGTH, LEAST = 64, 8  # tokens of a chunk: by default, and what memory may shrink it to
TANGENTS = 16  # directions, by default
_CUT_OFF = 2  # runs cut off at one chunk after which memory is taken to be the reason
_FORMAT = 2  # of the chunks' files: part of the key

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Analysis:
    """All that was found, as plain data.

    ``trained``, ``untrained``: the figures of :func:`.measure.measure` as :func:`.summary.summarise` gives them;
    ``untrained`` is None where there is no such model. ``chunks``: where each begins in the text's tokens, and how
    many it has. ``shrunk``: when memory ran out, or runs were
    cut off from outside again and again. ``notes``: what a reader must know, in sentences.
    """

    model: dict[str, Any]
    text: dict[str, Any]
    options: dict[str, Any]
    chunks: list[dict[str, int]]
    shrunk: list[dict[str, int]]
    notes: list[str]
    trained: dict[str, Any]
    untrained: dict[str, Any] | None
    provenance: dict[str, Any]

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(plain(asdict(self)), indent=indent, allow_nan=False)


def analyze(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    length: int | None = None,
    chunks: int = 8,
    tangents: int | None = None,
    stream: bool = False,
    untrained: bool = True,
    products: bool = True,
    fresh: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse ``model`` (a shipped name, a folder, a hub id) on the file ``text``, and keep each chunk in ``out``.

    ``tokenizer``: a tokenizer.json, or encoder.json with vocab.bpe; by default the model's own. The text's first
    ``chunks`` stretches of ``length`` tokens (by default 64, or the model's context) are measured one by one, with
    ``tangents`` directions (by default 16, or as many as a chunk has). ``stream``: the model stays in its
    folder, a layer at a time. ``untrained``: also a model of the same config, fresh from ``seed``, on the same chunks;
    not with ``stream``.
    ``products``: also the spectra of the first l layers' product for each depth l, which cost half the depth times the
    rest; not with ``stream``.

    A second call with the same model, text and options goes on where the first ended; a folder with anything else is
    refused, unless ``fresh``. When memory runs out, the chunks from there on have half as many tokens; so they do when
    two runs were cut off from outside (as the system does when memory is short) at the same chunk.
    ``progress(what, done)``: before each step, ``done`` from 0 to 1.

    ValueError for input that doesn't fit, OSError for what can't be read or written.
    """
    report = progress or (lambda what, done: None)
    for name, value in (("chunks", chunks), ("tangents", tangents)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    report("loading the model", 0.0)
    source = load(model, stream)
    if int(source.facts["layers"]) < 1:
        raise ValueError(f"{source.facts['name']} has no layer, so there is nothing to analyse")
    length = min(LENGTH, source.context) if length is None else length
    if not 1 <= length <= source.context:
        raise ValueError(f"length is {length}; the model's context holds {source.context} tokens: give 1 to that many")
    most = length * int(source.facts["width"])
    tangents = min(TANGENTS, most) if tangents is None else tangents
    if tangents > most:
        raise ValueError(f"tangents is {tangents}; {length} tokens of width {source.facts['width']} have {most}")
    report("reading the text", 0.0)
    given = read_text(text, source, tokenizer, length)
    count = min(chunks, len(given.ids) // length)
    beside = untrained and source.untrained is not None
    key = {
        "format": _FORMAT,
        "model": source.facts.get("weights_sha256") or source.facts["weights_sampled_sha256"],
        "config": _config_mark(source),
        "text": given.facts["sha256"],
        "tokens": given.facts["tokens_sha256"],
        "length": length,
        "tangents": tangents,
        "seed": seed,
        "stream": stream,
        "untrained": beside,
        "products": products,
        "scalpel": __version__,
        "torch": torch.__version__,
    }
    store = Store(out, key, length, fresh)
    task = _Task(source, tangents, seed, beside, products)
    records, cut_off = [], []
    for i in range(count):
        record = store.load(i)
        while record is None:
            if times := store.cut_off(i):
                cut_off.append({"chunk": i, "tokens": store.length, "times": times})
                if times >= _CUT_OFF:
                    store.shrink(i, _smaller(store.length, source))
            ids = given.chunk(i, length, store.length)
            step = _Step(report, f"chunk {i + 1} of {count}, {ids.shape[1]} tokens", i, count)
            store.begin(i)
            try:
                figures = _within_memory(task, ids, step)
            except BaseException:
                store.give_up()
                raise
            if figures is None:
                store.give_up()
                store.shrink(i, _smaller(store.length, source))
                continue
            record = plain({"chunk": i, "start": i * length, "tokens": ids.shape[1], **figures})
            store.save(i, record)
        records.append(record)  # as it is on disk, so that a resumed analysis is the same to the bit
    report("done", 1.0)
    shrunk = [each for each in store.shrunk if each["chunk"] < count]  # an analysis of more chunks may have gone on
    sides = {side: [record[side] for record in records] for side in ("trained", "untrained") if side in records[0]}
    return Analysis(
        model=source.facts,
        text=given.facts,
        options={"length": length, "chunks": chunks, "tangents": tangents, "seed": seed, "stream": stream},
        chunks=[{"start": record["start"], "tokens": record["tokens"]} for record in records],
        shrunk=shrunk,
        notes=_notes(source, records, chunks, shrunk, cut_off, beside),
        trained=summarise(sides["trained"]),
        untrained=summarise(sides["untrained"]) if "untrained" in sides else None,
        provenance={**environment(), "interval": INTERVAL},
    )


class _Task:
    """What is measured of each chunk; the untrained model is made when it is first needed."""

    def __init__(self, source: Source, T: int, seed: int, beside: bool, products: bool) -> None:
        self.source = source
        self.T = T
        self.seed = seed
        self.beside = beside
        self.products = products
        self._untrained: nn.Module | None = None

    def __call__(self, ids: Tensor, step: Progress) -> dict[str, Figures]:
        source = self.source
        if source.trained is None:
            assert source.folder is not None
            narrow = "bfloat16" in str(source.facts["dtype"])
            return {"trained": measure_streamed(source.folder, ids, self.T, self.seed, narrow, step)}
        step("trained", 0.0)
        found = {"trained": measure(source.trained, ids, self.T, self.seed, self.products)}
        if self.beside and source.untrained is not None:
            if self._untrained is None:
                self._untrained = self._fresh(source.untrained)
            step("untrained", 0.5)
            found["untrained"] = measure(self._untrained, ids, self.T, self.seed, self.products)
        return found

    def _fresh(self, make: Callable[[int], nn.Module]) -> nn.Module:
        try:
            return make(self.seed)
        except (MemoryError, RuntimeError, OSError) as error:
            if not ran_out(error):
                raise
            raise ValueError(
                "memory ran out while the untrained model was made beside the trained one, whatever the chunks: give "
                "--no-untrained"
            ) from error


@dataclass(frozen=True)
class _Step:
    """Progress within a chunk, as progress of everything."""

    report: Progress
    chunk: str
    number: int
    count: int

    def __call__(self, what: str, done: float) -> None:
        self.report(f"{self.chunk}: {what}", (self.number + done) / self.count)


def _config_mark(source: Source) -> str | None:
    """SHA-256 of the model's config: the same weights are another model with other heads or another eps."""
    config: Any = getattr(source.trained, "config", None)  # a streamed model's is in the sample of its folder
    if config is None:
        return None
    said = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config.to_dict()
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _within_memory(task: _Task, ids: Tensor, step: _Step) -> dict[str, Figures] | None:
    """What ``task`` gives; None where memory ran out."""
    try:
        return task(ids, step)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
    gc.collect()  # out of the except block, or the error's frames would hold what did not fit
    return None


def _smaller(length: int, source: Source) -> int:
    if length <= LEAST:
        way = "fewer --tangents" + (", or --stream" if source.kind == "decoder" else "")
        raise ValueError(f"memory ran out at chunks of {length} tokens, and shorter ones say little: try {way}")
    return max(LEAST, length // 2)


def _notes(
    source: Source,
    records: list[dict[str, Any]],
    asked: int,
    shrunk: list[dict[str, int]],
    cut_off: list[dict[str, int]],
    beside: bool,
) -> list[str]:
    count = len(records)
    notes = []
    if count < asked:
        notes.append(f"The text holds {count} whole chunks of the {asked} asked for.")
    if count == 1:
        notes.append("One chunk has no interval: nothing here says how much another stretch of this text would change.")
    if shrunk:
        steps = "; ".join(f"at chunk {s['chunk'] + 1} from {s['from']} to {s['to']} tokens" for s in shrunk)
        lengths = sorted({record["tokens"] for record in records}, reverse=True)
        notes.append(
            f"Memory ran out, or the system ended the program, and chunks were shortened: {steps}. "
            + (f"Means mix chunks of {' and '.join(map(str, lengths))} tokens." if len(lengths) > 1 else "")
        )
    for each in cut_off:
        times = "an earlier run was" if each["times"] == 1 else f"{each['times']} earlier runs were"
        notes.append(
            f"In the middle of chunk {each['chunk'] + 1} of {each['tokens']} tokens {times} cut off from outside. "
            "Systems that are short of memory do that: --length and --tangents make a chunk smaller."
        )
    if source.kind == "stream":
        notes.append(
            "The model was read a layer at a time. The exponents of the product, its spectra by depth and the "
            "alignment of layers need the layers in reverse order, too, and are not here; frame growth is not the "
            "exponents. There is no untrained model beside it."
        )
        if "bfloat16" in str(source.facts["dtype"]):
            notes.append("Products are bfloat16: singular values are good to about one per cent of the largest.")
    elif not beside:
        notes.append("There is no untrained model beside it, so nothing says which of this is due to training.")
    if all(share == 1 for record in records for share in record["trained"]["active"].values()):
        notes.append("No hook holds a zero: active fractions are 1 throughout, and no TopK has a margin.")
    for side in ("trained", "untrained"):
        stuck = sum(not record[side]["converged"] for record in records if side in record)
        if stuck:
            worst = max(record[side]["residual"] for record in records if side in record)
            notes.append(
                f"{side.capitalize()}: in {stuck} of {count} chunks some singular values did not converge (largest "
                f"residual {worst:.1e}); they may be too small."
            )
    return [note.strip() for note in notes]
