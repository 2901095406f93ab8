"""The analysis of a model on a text, chunk by chunk, next to an untrained model; each finished chunk is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from .._info import __version__
from ..experiments.result import environment, plain
from ..jacobians.depth.products import DEPTHS, depths_of
from ..streams.budget import bytes_of
from ..streams.capture import Capture
from .chunks import Task, measure_chunks
from .job import job_of_environment
from .notes import notes_of
from .pace import Clock, Plan, Progress, Stopped
from .source import Source, load, ran_out
from .spectra import RESIDUAL, Spectra
from .store import Store
from .summary import INTERVAL, summarise
from .text import Choice, read_text

LENGTH = 64  # the default number of tokens of a chunk
TANGENTS = 16  # the default number of directions
STRETCHES = 256  # the default number of stretches of text for the spectra of hooks
CHUNKS = 4  # the default number of chunks
_FORMAT = 3  # the format of the chunks' files, which is part of the key


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis, as plain data.

    Attributes:
        model: Facts about the model: its name, kind, size and dtype, and a hash of its weights.
        text: Facts about the text: its file, its tokens and its tokenizer.
        options: The options of the analysis: length, chunks, tangents, seed and streaming, the depths at which
            products of layers were measured, how the text is put to the model, and which tokens count.
        chunks: The first token of each chunk in the text, and the chunk's number of tokens.
        shrunk: The times that chunks were made shorter, because memory ran out or because runs were cut off from
            outside at the same chunk.
        notes: Sentences about what a reader of the figures must know.
        trained: The figures of :func:`.measure.measure`, summarised over chunks by :func:`.summary.summarise`.
        untrained: The same figures for the untrained model; None where there is none.
        spectra: The spectra of activations and gradients, by model and stream, as :mod:`.spectra` computes them; None
            where they were left out.
        provenance: The versions, the commit and the machine that produced the figures.

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
    prepend_bos: bool = False,
    chat_template: bool = False,
    skip_first: int = 0,
    skip_special: bool = False,
    length: int | None = None,
    chunks: int = CHUNKS,
    tangents: int | None = None,
    stream: bool = False,
    device: str = "cpu",
    untrained: bool = True,
    products: bool = True,
    depths: int = DEPTHS,
    stretches: int = STRETCHES,
    hooks: str = RESIDUAL,
    memory: str = "4GiB",
    fresh: bool = False,
    seed: int = 0,
    stop_after: float | None = None,
    progress: Progress | None = None,
    first: Callable[[Analysis], None] | None = None,
) -> Analysis:
    """Measure a model's layers on a text, chunk by chunk, and keep each finished chunk in the folder ``out``.

    The first ``chunks`` stretches of ``length`` tokens of the text are measured one by one. A second call with the same
    model, text and options continues where the first ended. A folder that holds a different analysis is refused, unless
    ``fresh`` is True. When memory runs out, the following chunks have half as many tokens; the same happens when two
    runs were cut off from outside at the same chunk, as a system may do when memory is short. Processes that torchrun
    starts share the chunks and stretches, and each returns all results.

    Args:
        model: The name of a shipped model, a folder, a GGUF file or a hub id.
        text: The path of a UTF-8 file.
        out: The folder that keeps the finished chunks.
        tokenizer: A tokenizer.json, or encoder.json with vocab.bpe; by default the model's own.
        prepend_bos: Whether the token that begins a text (BOS) is put in front of each chunk that doesn't begin with
            it; the chunk then holds one token less of the text. No special token is ever added otherwise.
        chat_template: Whether each chunk is the beginning of a conversation, whose first message, of the user, is the
            text from there on, written by the tokenizer's own chat template. A BOS that the template writes is not
            doubled.
        skip_first: How many tokens at the beginning of each chunk count in no figure. All tokens are attended to;
            Jacobians lead from the tokens that count to the tokens that count.
        skip_special: Whether the tokenizer's special tokens, such as BOS, count in no figure.
        length: Tokens of a chunk, by default 64 or the model's context.
        chunks: The number of chunks; fewer where the text is shorter.
        tangents: The number of directions, by default 16 or as many as a chunk has.
        stream: Whether the model stays in its folder, with one layer in memory at a time.
        device: The device of the models, "cpu" or a GPU such as "cuda". For processes that torchrun starts, "cuda" is a
            GPU of each process's own.
        untrained: Whether a model of the same config, initialised from ``seed``, is measured on the first chunk, and
            over the text for the spectra of activations and gradients; not with ``stream``.
        products: Whether the spectra of the product of the first l layers are measured; not with ``stream``.
        depths: At how many depths l they are, evenly spread over the layers, the last one included.
        stretches: The number of stretches of ``length`` tokens for the spectra of activations and gradients; fewer
            where the text is shorter. 0 leaves these spectra out; so does ``stream``.
        hooks: The hooks of these spectra, a pattern as :func:`scalpel.collect` takes it.
        memory: How much memory the states of these spectra may take at a time.
        fresh: Whether to remove what an earlier analysis left in ``out``, and to measure everything again.
        seed: Seed of the starting frames, the probes, the nulls and the untrained model.
        stop_after: Seconds after which this call returns what is finished, and a note says what isn't; another call
            goes on. A call finishes at least one chunk, or one block of the spectra. None stops at the end alone.
        progress: Called as ``progress(what, done)`` before each step, with ``done`` from 0 to 1, which never falls.
        first: Called once with the analysis of what is finished, after the first chunk that this call measures.

    Returns:
        The figures of both models, as means over chunks with intervals.

    Raises:
        ValueError: An argument is out of range, the model or the text can't be analysed, or ``out`` holds a different
            analysis.
        OSError: A file can't be read or written.

    Example:
        >>> from pathlib import Path
        >>> from scalpel.analysis import analyze
        >>> _ = Path("text.txt").write_text("abbaab" * 8)
        >>> analysis = analyze("parity-mini", "text.txt", "out", length=8, chunks=1, tangents=2, stretches=0)
        >>> len(analysis.trained["exponents"]["mean"])
        2
    """
    report = progress or (lambda what, done: None)
    for name, value, least in (
        ("chunks", chunks, 1),
        ("tangents", tangents, 1),
        ("depths", depths, 1),
        ("stretches", stretches, 0),
        ("skip_first", skip_first, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    if stop_after is not None and not stop_after > 0:
        raise ValueError(f"stop_after is {stop_after}; it must be a number of seconds above 0")
    clock = Clock(stop_after)
    bytes_of(memory)
    report("loading the model", 0.0)
    source = load(model, stream, device)
    if int(source.facts["layers"]) < 1:
        raise ValueError(f"{source.facts['name']} has no layer, so there is nothing to analyse")
    length = min(LENGTH, source.context) if length is None else length
    if not 1 <= length <= source.context:
        raise ValueError(f"length is {length}; the model's context holds {source.context} tokens: give 1 to that many")
    if skip_first >= length:
        raise ValueError(f"skip_first is {skip_first}, and a chunk has {length} tokens, so none counts: give less")
    report("reading the text", 0.0)
    choice = Choice(prepend_bos, chat_template, skip_first, skip_special)
    tokens = read_text(text, source, tokenizer, length, choice, max(chunks, stretches))
    count = min(chunks, len(tokens.chunks))
    counts = [tokens.counted(tokens.chunk(i, length)) for i in range(count)]
    fewest = min(length if counted is None else len(counted) for counted in counts)
    most = fewest * int(source.facts["width"])
    tangents = min(TANGENTS, most) if tangents is None else tangents
    if tangents > most:
        raise ValueError(f"tangents is {tangents}; {fewest} tokens of width {source.facts['width']} have {most}")
    beside = untrained and source.untrained is not None
    at_depths = depths_of(depths, int(source.facts["layers"])) if products and source.trained is not None else []
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
        "products": at_depths,
        "scalpel": __version__,
        "torch": torch.__version__,
        # other devices round differently
        **({} if source.device.type == "cpu" else {"device": source.facts["device"]}),
        **tokens.key,
    }
    if stretches and source.trained is not None:
        Capture(source.trained, hooks, None)  # raises an error for an unknown hook before anything is measured
    with job_of_environment() as job:
        if job.rank == 0 and not job.alone:
            Store(Path(out), key, length, fresh)  # refuses a folder of another analysis on behalf of all processes
        job.gathered([])
        store = Store(job.folder(Path(out)), key, length, fresh)
        task = Task(source, tangents, seed, beside, at_depths)
        wants_spectra = stretches > 0 and source.trained is not None
        pieces = [f"{side} {chunk}" for chunk in filter(job.mine, range(count)) for side in task.sides(chunk)]
        if wants_spectra:
            pieces += ["trained", "untrained"] if beside else ["trained"]
        plan = Plan(pieces, report if job.rank == 0 else _silent, clock)

        def analysis(
            records: list[dict[str, Any]],
            shrunk: list[dict[str, int]],
            cut_off: list[dict[str, int]],
            spectra: dict[str, Any] | None,
            unfinished: list[str],
        ) -> Analysis:
            # the folder may hold more chunks, from an analysis that asked for more
            shrunk = [step for step in shrunk if step["chunk"] < count]
            sides = {
                side: [record[side] for record in records if side in record]
                for side in ("trained", "untrained")
                if any(side in record for record in records)
            }
            return Analysis(
                model=source.facts,
                text=tokens.facts,
                options={
                    "length": length,
                    "chunks": chunks,
                    "tangents": tangents,
                    "seed": seed,
                    "stream": stream,
                    "depths": at_depths,
                    **asdict(choice),
                },
                chunks=[{"start": record["start"], "tokens": record["tokens"]} for record in records],
                shrunk=shrunk,
                notes=unfinished
                + notes_of(source, tokens, records, count, chunks, shrunk, cut_off, "untrained" in sides, spectra),
                trained=summarise(sides["trained"]),
                untrained=summarise(sides["untrained"]) if "untrained" in sides else None,
                spectra=spectra,
                provenance={**environment(), "interval": INTERVAL},
            )

        def first_chunk(records: list[dict[str, Any]]) -> None:
            if first is None or job.rank != 0 or (len(records) == count and not wants_spectra):
                return
            said = f"This is a first picture: {_finished(len(records), count)}. The analysis goes on"
            rest = ", and these pages are replaced when it ends; if it was stopped, the same command continues it."
            first(analysis(records, store.shrunk, [], None, [said + rest]))

        own, own_cut_off = measure_chunks(task, store, tokens, count, job, plan, clock, first_chunk)
        records = sorted(job.gathered(own), key=lambda record: int(record["chunk"]))
        cut_off, shrunk = job.gathered(own_cut_off), job.gathered(store.shrunk)
        spectra, stopped = None, len(records) < count
        if wants_spectra and not stopped:
            at_hooks = Spectra(Path(out), tokens, length, stretches, hooks, memory, job, fresh, source.device, clock)
            try:
                spectra = _spectra(at_hooks, task, f"{key['model']} {key['config']}", plan)
            except Stopped:
                stopped = True
    unfinished = []
    if stopped:
        left = "" if not wants_spectra else ", and the spectra of activations and gradients are not"
        unfinished = [
            f"Stopped after {stop_after:.0f} s, as asked: {_finished(len(records), count)}{left}. The same command "
            "goes on from there."
        ]
    else:
        report("done", 1.0)
    return analysis(records, shrunk, cut_off, spectra, unfinished)


def _finished(count: int, planned: int) -> str:
    return f"{count} of {planned} chunks {'is' if count == 1 else 'are'} finished"


def _spectra(at_hooks: Spectra, task: Task, mark: str, plan: Plan) -> dict[str, Any]:
    """Measure the spectra of the trained model and, where there is one, of the untrained model."""
    trained = task.source.trained
    assert trained is not None
    spectra: dict[str, Any] = {"stretches": at_hooks.stretches, "tokens": at_hooks.length, "hooks": at_hooks.hooks}
    try:
        spectra["trained"] = at_hooks.measure(
            "trained", lambda: trained, mark, plan.of("trained", "spectra, trained", stops=False)
        )
        beside = task.beside
        spectra["untrained"] = None
        if beside:
            step = plan.of("untrained", "spectra, untrained", stops=False)
            spectra["untrained"] = at_hooks.measure("untrained", task.untrained, f"{mark} {task.seed}", step)
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        raise ValueError(
            "memory ran out over the spectra of hooks: give a smaller --memory, fewer --hooks, or --spectra 0"
        ) from error
    return spectra


def _silent(what: str, done: float) -> None:
    """Ignore progress, which only the first process reports."""


def _config_mark(source: Source) -> str | None:
    """Return the SHA-256 of the model's config.

    The same weights are a different model where the config has, for example, another number of heads or another eps.
    """
    config: Any = getattr(source.trained, "config", None)  # the config of a streamed model is part of its sampled hash
    if config is None:
        return None
    settings = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config.to_dict()
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
