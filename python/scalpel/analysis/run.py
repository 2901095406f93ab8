"""An analysis: a text goes in chunks through a model and an untrained one; each chunk is kept once it is measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from .._info import __version__
from ..experiments.result import environment, plain
from ..streams.budget import bytes_of
from ..streams.capture import Capture
from .chunks import Progress, Task, measure_chunks
from .job import job_of_environment
from .notes import notes_of
from .source import Source, load, ran_out
from .spectra import RESIDUAL, Spectra
from .store import Store
from .summary import INTERVAL, summarise
from .text import read_text

LENGTH = 64  # tokens of a chunk, by default
TANGENTS = 16  # directions, by default
STRETCHES = 256  # of the text, for the spectra of hooks
_FORMAT = 2  # of the chunks' files: part of the key


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis, as plain data.

    Attributes:
        model: What is known of the model: its name, format, size and config.
        text: What is known of the text: the file, its tokens, and its tokenizer.
        options: How it was analysed: length, chunks, tangents, seed and streaming.
        chunks: Where each chunk begins in the text's tokens, and how many it has.
        shrunk: Each time that chunks were made shorter, because memory ran out or because runs were cut off from
            outside at the same chunk.
        notes: What a reader must know, in sentences.
        trained: The figures of :func:`.measure.measure`, summed up over chunks by :func:`.summary.summarise`.
        untrained: The same of the untrained model; None where there is none.
        spectra: Those of activations and gradients, by model and stream; see :mod:`.spectra`.
        provenance: The versions, the commit and the machine that the figures come from.

    Example:
        >>> from pathlib import Path
        >>> from scalpel.analysis import analyze
        >>> _ = Path("text.txt").write_text("abbaab" * 8)
        >>> analysis = analyze("parity-mini", "text.txt", "out", length=8, chunks=1, tangents=2, stretches=0)
        >>> analysis.to_json()[:10]
        '{"model": '
    """

    model: dict[str, Any]
    text: dict[str, Any]
    options: dict[str, Any]
    chunks: list[dict[str, int]]
    shrunk: list[dict[str, int]]
    notes: list[str]
    trained: dict[str, Any]
    untrained: dict[str, Any] | None
    spectra: dict[str, Any] | None
    provenance: dict[str, Any]

    def to_json(self, indent: int | None = None) -> str:
        """Write the results as JSON; a number that is not finite is null.

        Args:
            indent: Spaces by which nested values are indented; None for one line.

        Returns:
            The text.
        """
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
    device: str = "cpu",
    untrained: bool = True,
    products: bool = True,
    stretches: int = STRETCHES,
    hooks: str = RESIDUAL,
    memory: str = "4GiB",
    fresh: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Measure what a text does to a model's layers, chunk by chunk, each chunk kept in ``out``.

    The text's first ``chunks`` stretches of ``length`` tokens are measured one by one. A second call with the same
    model, text and options goes on where the first ended; a folder with anything else is refused, unless ``fresh``.
    When memory runs out, the chunks from there on have half as many tokens; so they do when two runs were cut off from
    outside at the same chunk, as the system does when memory is short. Started by torchrun, processes share chunks and
    stretches, and each returns all results.

    Args:
        model: A shipped name, a folder, a GGUF file or a hub id.
        text: A UTF-8 file.
        out: The folder of the finished chunks.
        tokenizer: A tokenizer.json, or encoder.json with vocab.bpe; by default the model's own.
        length: Tokens of a chunk, by default 64 or the model's context.
        chunks: How many chunks, as far as the text goes.
        tangents: How many directions, by default 16 or as many as a chunk has.
        stream: Whether the model stays in its folder, one layer in memory at a time.
        device: Where the models compute: "cpu", or a GPU such as "cuda". For torchrun's processes "cuda" is a GPU each.
        untrained: Whether a model of the same config, fresh from ``seed``, is measured on the same chunks; not with
            ``stream``.
        products: Whether the spectra of the first l layers' product are measured for each depth l, which costs half the
            depth times the rest; not with ``stream``.
        stretches: How many stretches of ``length`` tokens, as far as the text goes, the spectra of activations and
            gradients are over; 0 leaves them out; not with ``stream``.
        hooks: Where these are taken, a pattern as :func:`scalpel.collect` takes it.
        memory: How much memory their states may take at a time.
        fresh: Whether everything in ``out`` that an analysis left there is measured anew.
        seed: Seed of the starting frames, the probes, the nulls and the untrained model.
        progress: Called as ``progress(what, done)`` before each step, with ``done`` from 0 to 1.

    Returns:
        The figures of both models, means over chunks with intervals.

    Raises:
        ValueError: For input that doesn't fit.
        OSError: For what can't be read or written.

    Example:
        >>> from pathlib import Path
        >>> from scalpel.analysis import analyze
        >>> _ = Path("text.txt").write_text("abbaab" * 8)
        >>> analysis = analyze("parity-mini", "text.txt", "out", length=8, chunks=1, tangents=2, stretches=0)
        >>> len(analysis.trained["exponents"]["mean"])
        2
    """
    report = progress or (lambda what, done: None)
    for name, value, least in (("chunks", chunks, 1), ("tangents", tangents, 1), ("stretches", stretches, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    bytes_of(memory)
    report("loading the model", 0.0)
    source = load(model, stream, device)
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
    tokens = read_text(text, source, tokenizer, length)
    count = min(chunks, len(tokens.ids) // length)
    beside = untrained and source.untrained is not None
    key = {
        "format": _FORMAT,
        "model": source.facts.get("weights_sha256") or source.facts["weights_sampled_sha256"],
        "config": _config_mark(source),
        "text": tokens.facts["sha256"],
        "tokens": tokens.facts["tokens_sha256"],
        "length": length,
        "tangents": tangents,
        "seed": seed,
        "stream": stream,
        "untrained": beside,
        "products": products,
        "scalpel": __version__,
        "torch": torch.__version__,
        **({} if source.device.type == "cpu" else {"device": source.facts["device"]}),  # others round otherwise
    }
    if stretches and source.trained is not None:
        Capture(source.trained, hooks, None)  # raises for a hook that isn't there before anything is measured
    with job_of_environment() as job:
        if job.rank == 0 and not job.alone:
            Store(Path(out), key, length, fresh)  # refuses a folder of another analysis, for all
        job.gathered([])
        store = Store(job.folder(Path(out)), key, length, fresh)
        task = Task(source, tangents, seed, beside, products)
        mine, cut = measure_chunks(task, store, tokens, length, count, job, report if job.rank == 0 else _silent)
        records = sorted(job.gathered(mine), key=lambda record: int(record["chunk"]))
        cut_off, shrunk = job.gathered(cut), job.gathered(store.shrunk)
        spectra = None
        if stretches and source.trained is not None:
            part = Spectra(Path(out), tokens, length, stretches, hooks, memory, job, fresh, source.device)
            spectra = _spectra(part, task, f"{key['model']} {key['config']}", report if job.rank == 0 else _silent)
    report("done", 1.0)
    shrunk = [step for step in shrunk if step["chunk"] < count]  # an analysis of more chunks may have gone on
    sides = {side: [record[side] for record in records] for side in ("trained", "untrained") if side in records[0]}
    return Analysis(
        model=source.facts,
        text=tokens.facts,
        options={"length": length, "chunks": chunks, "tangents": tangents, "seed": seed, "stream": stream},
        chunks=[{"start": record["start"], "tokens": record["tokens"]} for record in records],
        shrunk=shrunk,
        notes=notes_of(source, records, chunks, shrunk, cut_off, beside, spectra),
        trained=summarise(sides["trained"]),
        untrained=summarise(sides["untrained"]) if "untrained" in sides else None,
        spectra=spectra,
        provenance={**environment(), "interval": INTERVAL},
    )


def _spectra(part: Spectra, task: Task, mark: str, report: Progress) -> dict[str, Any]:
    trained = task.source.trained
    assert trained is not None
    spectra: dict[str, Any] = {"stretches": part.stretches, "tokens": part.length, "hooks": part.hooks}
    try:
        spectra["trained"] = part.measure("trained", lambda: trained, mark, report)
        beside = task.beside
        spectra["untrained"] = (
            part.measure("untrained", task.untrained, f"{mark} {task.seed}", report) if beside else None
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        raise ValueError(
            "memory ran out over the spectra of hooks: give a smaller --memory, fewer --hooks, or --spectra 0"
        ) from error
    return spectra


def _silent(what: str, done: float) -> None:
    """The progress of processes other than the first."""


def _config_mark(source: Source) -> str | None:
    """SHA-256 of the model's config: the same weights are another model with other heads or another eps."""
    config: Any = getattr(source.trained, "config", None)  # a streamed model's is in the sample of its folder
    if config is None:
        return None
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config.to_dict()
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
