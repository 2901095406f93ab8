"""The command line: ``scalpel run``, ``experiment``, ``analyze``, ``lens``, ``train``, ``prune``, ``bench``.

Modules that need torch are imported inside the commands, so that ``--help`` answers at once. Results go to stdout, and
everything else goes to stderr. Exit codes: 0 if the command has done its work (whatever the verdicts are), 1 if
something is broken, 2 if the input is at fault, 130 if it was interrupted.
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .._files import check_folder, replace_text
from .._info import __version__
from ..experiments import names as experiment_names
from . import lens as lens  # registers its commands, and so does the next
from . import models as models
from . import show
from .application import Debug, Json, Seed, app, guarded, print_json

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app(prog_name="scalpel")


def _version(wanted: bool) -> None:
    if wanted:
        print_json(f"scalpel {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded()
def run(
    model: Annotated[
        str, typer.Argument(help="A shipped model, a checkpoint's folder, or an id on the hub.")
    ] = "bracket-mini",
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("scalpel-report"),
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Compute again what is stored: the model's accuracy, its circuit, and the study of collapse.",
        ),
    ] = False,
    seed: Seed = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every experiment on a model, print the table of verdicts, and write a report."""
    from ..report import write_report

    check_folder(out)  # first, so that nobody waits for a report that can't be written
    from ..experiments import Refused
    from ..experiments.suite import left_out, run_suite
    from ..models.circuitgpt.checkpoint import CheckpointError

    with show.Steps("loading") as steps:
        try:
            suite = run_suite(model, fresh=fresh, seed=seed, progress=steps.stage)
        except (Refused, CheckpointError):
            raise
        except ValueError as error:  # no option of the user's reaches an experiment, so the fault is ours
            raise RuntimeError("an experiment ended in an error of the library; please report it") from error
        steps.stage("writing the report", 1.0)
        page = write_report(out, suite)
    if as_json:
        print_json(suite.to_json(indent=2))
    else:
        show.out().print(show.results(suite.results))
        show.out().print(f"{suite.seconds:.0f} s. Report: {page}", soft_wrap=True)
    for note in left_out(suite):
        show.err().print(f"left out: {note}", soft_wrap=True)
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
@guarded()
def experiment(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(experiment_names())}.")],
    model: Annotated[
        str,
        typer.Option(
            help="A shipped model, a checkpoint's folder, or an id on the hub; for composition also a folder of "
            "transformers, or a GGUF file."
        ),
    ] = "bracket-mini",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--option",
            metavar="KEY=VALUE",
            help="An option of the experiment, such as -o seed=1; may be given several times.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write a report of this experiment, to this folder.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run one experiment and print its row of the table."""
    from .. import experiments

    options = _options(option or [])
    if "model" in options:
        raise ValueError("model is not an option of experiments; give it as --model")
    if name not in experiment_names():
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(experiment_names())}")
    if out is not None:
        check_folder(out)
    begun = time.monotonic()
    with show.Steps(name) as steps:
        steps.stage(name, 0.0)
        result = experiments.run(name, model, **options)
    if as_json:
        print_json(result.to_json(indent=2))
    else:
        show.out().print(show.results([result]))
    from ..experiments.suite import Suite, left_out

    suite = Suite([result], {"name": result.provenance.get("model", model)}, time.monotonic() - begun)
    for note in left_out(suite):
        show.err().print(f"left out: {note}", soft_wrap=True)
    if out is not None:
        from ..report import write_report  # matplotlib is slow to import

        page = write_report(out, suite)
        show.err().print(f"Report: {page}", soft_wrap=True)


def _options(pairs: list[str]) -> dict[str, Any]:
    """A dict from texts of the form ``key=value``. A value that is JSON is read as such; any other is text."""
    options: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"option {text!r} is not of the form key=value; an example is -o seed=1")
        if key in options:
            raise ValueError(f"option {key!r} is given twice; give it once")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


@app.command()
@guarded("interrupted; the same command without --fresh continues from the last finished chunk")
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            help="A shipped model, the folder or hub id of a CircuitGPT, a folder of transformers, or a GGUF file."
        ),
    ],
    text: Annotated[Path, typer.Option(help="The text to analyse, a file in UTF-8.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or an encoder.json with a vocab.bpe beside it; by default the model's."),
    ] = None,
    prepend_bos: Annotated[
        bool,
        typer.Option(
            "--bos",
            help="Put the token that begins a text in front of each chunk, unless it is there already. The chunk then "
            "holds one token less of the text.",
        ),
    ] = False,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Make each chunk the beginning of a conversation, with the text from there on as the user's message, "
            "by the tokenizer's own template.",
        ),
    ] = False,
    skip_first: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many tokens at the beginning of each chunk count in no figure. They are attended to, and "
            "Jacobians lead from the other tokens to the other tokens.",
        ),
    ] = 0,
    skip_special: Annotated[
        bool,
        typer.Option("--skip-special", help="Count the tokenizer's special tokens in no figure. They are attended to."),
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a chunk; by default 64, or the model's context if that is shorter."),
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="How many chunks to analyse, from the start of the text on.")] = 4,
    tangents: Annotated[
        int | None, typer.Option(min=1, help="How many singular values to compute; by default 16.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Hold one layer of the model in memory at a time, for models that don't fit."),
    ] = False,
    device: Annotated[str, typer.Option(help="Device on which the model runs: cpu, cuda, cuda:1.")] = "cpu",
    untrained: Annotated[
        bool,
        typer.Option(
            "--untrained/--no-untrained",
            help="Also analyse an untrained model of the same shape, for comparison, at the first chunk.",
        ),
    ] = True,
    products: Annotated[
        bool,
        typer.Option(
            "--products/--no-products",
            help="Also compute spectra of products of the first layers, which takes about half of the time.",
        ),
    ] = True,
    depths: Annotated[
        int,
        typer.Option(min=1, help="At how many depths, evenly spread over the layers, these products are measured."),
    ] = 12,
    spectra: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many chunks the spectra of activations and gradients are computed over; 0 for no such spectra.",
        ),
    ] = 256,
    hooks: Annotated[
        str,
        typer.Option(
            help="Regular expression of their hooks, NAME.grad for gradients; by default the residual stream."
        ),
    ] = r"(\d+\.resid_in|final_resid)(\.grad)?",
    memory: Annotated[
        str,
        typer.Option(
            help="Memory for these spectra's states. If it is too small for all, the text is read several times."
        ),
    ] = "4GiB",
    out: Annotated[Path, typer.Option(help="Folder for the report and for finished chunks.")] = Path(
        "scalpel-analysis"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what the folder holds, and begin again.")] = False,
    stop_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop after this time, such as 10m or 1h30m, with a report of what is finished; the same command goes "
            "on later. At least one chunk is finished.",
        ),
    ] = None,
    seed: Seed = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how a model's layers act on a text: spectra, ranks, active fractions and margins, with a report.

    The report is written after the first chunk, and replaced at the end. If it is stopped, the same command continues
    where it was.
    """
    check_folder(out)
    from ..analysis import analyze as measure
    from ..analysis.pace import seconds_of
    from ..report.analysis import headlines, write_analysis

    seconds = None if stop_after is None else seconds_of(stop_after)
    with show.Steps("analyze") as steps:
        analysis = measure(
            model,
            text,
            out,
            tokenizer=tokenizer,
            prepend_bos=prepend_bos,
            chat_template=chat_template,
            skip_first=skip_first,
            skip_special=skip_special,
            length=length,
            chunks=chunks,
            tangents=tangents,
            stream=stream,
            device=device,
            untrained=untrained,
            products=products,
            depths=depths,
            stretches=spectra,
            hooks=hooks,
            memory=memory,
            fresh=fresh,
            seed=seed,
            stop_after=seconds,
            progress=steps.stage,
            first=lambda found: steps.note(f"first picture: {write_analysis(out, found)}"),
        )
        if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process writes for all
            return
        page = write_analysis(out, analysis)
    if as_json:
        print_json(analysis.to_json(indent=2))
    else:
        show.out().print(show.facts(str(analysis.model["name"]), headlines(analysis)))
        show.out().print(f"Report: {page}", soft_wrap=True)
    for note in analysis.notes:
        show.err().print(f"note: {note}", soft_wrap=True)
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
@guarded()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small sizes and few rounds, only to see that it runs.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device to time on: cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the library against PyTorch, after checking that both give the same answers."""
    if out is not None:
        check_folder(out.parent)
    from . import bench as benchmark

    with show.Steps("bench") as steps:
        try:
            report = benchmark.run(quick=quick, device=device, progress=steps.stage)
        except benchmark.WrongAnswer as error:
            show.fail(str(error))
            raise typer.Exit(1) from None
    text = json.dumps(report, indent=2, allow_nan=False)
    if out is not None:
        replace_text(out, text + "\n")
    if as_json:
        print_json(text)
        return
    show.out().print(show.timings(report), show.contenders(report), sep="\n")
    machine = report["environment"]
    show.out().print(
        (f"{machine['gpu']}; " if machine["gpu"] else "")
        + f"{machine['threads']} threads, target {machine['target']}, torch {machine['torch']}; medians of "
        f"{report['rounds']} rounds in one process, in ms" + (", quick sizes: not for quoting" if quick else ""),
        soft_wrap=True,
    )
