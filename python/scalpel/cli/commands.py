"""The command line: ``scalpel run``, ``experiment``, ``analyze``, ``train``, ``prune``, ``bench``.

What needs torch is imported inside the commands, so that ``--help`` answers at once. Results go to stdout,
everything else to stderr; exit codes: 0 done (whatever the verdicts say), 1 something is broken, 2 the input
is at fault, 130 interrupted.
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
from . import models as models  # registers its commands
from . import show
from .app import Debug, Json, Seed, app, guarded, print_json

__all__ = ["app", "main"]


def main() -> None:
    """The entry point."""
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
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("scalpel-report"),
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Compute anew what is stored: the card's accuracy, the circuit, the study on collapse."
        ),
    ] = False,
    seed: Seed = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every experiment on a model; print the table of verdicts and write a report."""
    from ..report import write_report

    check_folder(out)  # first: nobody should wait for a report that can't be written
    from ..experiments import Refused
    from ..experiments.suite import left_out, run_suite
    from ..models.circuitgpt.checkpoint import CheckpointError

    with show.Steps("loading") as steps:
        try:
            suite = run_suite(model, fresh=fresh, seed=seed, progress=steps.stage)
        except (Refused, CheckpointError):
            raise
        except ValueError as error:  # no option of this command reaches an experiment, so none is at fault
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
        str, typer.Option(help="A shipped model, a checkpoint's folder, or an id on the hub.")
    ] = "bracket-mini",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", metavar="KEY=VALUE", help="An option of the experiment; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a report of this experiment to a folder.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run one experiment and print its row of the table."""
    from .. import experiments
    from ..report import write_report

    options = _options(option or [])
    if "model" in options:
        raise ValueError("the model is no option; give it as --model")
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
        page = write_report(out, suite)
        show.err().print(f"Report: {page}", soft_wrap=True)


def _options(given: list[str]) -> dict[str, Any]:
    """``key=value`` texts as a dict; a value is read as JSON where it is JSON, else it is text."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"option {text!r} is not of the form key=value; give for example -o seed=1")
        if key in options:
            raise ValueError(f"option {key!r} is given twice; give it once")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


@app.command()
@guarded("interrupted; the same command, without --fresh, goes on from what is finished")
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            help="A shipped model, a CircuitGPT's folder or hub id, a folder of transformers', or a GGUF file."
        ),
    ],
    text: Annotated[Path, typer.Option(help="The text, a UTF-8 file; its first chunks are analysed.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or encoder.json with vocab.bpe beside it; by default the model's own."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a chunk; by default 64, or the model's context.")
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="How many chunks, as far as the text goes.")] = 8,
    tangents: Annotated[
        int | None, typer.Option(min=1, help="How many directions, and so singular values; by default 16.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the model in its folder, one layer in memory at a time.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the model computes: cpu, cuda, cuda:1.")] = "cpu",
    untrained: Annotated[
        bool, typer.Option("--untrained/--no-untrained", help="Beside it an untrained model of the same shape.")
    ] = True,
    products: Annotated[
        bool, typer.Option("--products/--no-products", help="Spectra by depth: half the depth times the rest.")
    ] = True,
    spectra: Annotated[
        int,
        typer.Option(min=0, help="Stretches of the text that spectra of activations and gradients are over; 0: none."),
    ] = 256,
    hooks: Annotated[
        str,
        typer.Option(help="Where they are taken, a pattern; NAME.grad for gradients. By default the residual stream."),
    ] = r"(\d+\.resid_in|final_resid)(\.grad)?",
    memory: Annotated[
        str, typer.Option(help="For their states; where they don't fit, the text is read again.")
    ] = "4GiB",
    out: Annotated[Path, typer.Option(help="Folder of the report and of finished chunks.")] = Path("scalpel-analysis"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what the folder holds.")] = False,
    seed: Seed = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a text does to a model's layers: spectra, ranks, active fractions, margins; write a report.

    Stopped, the same command goes on where it was.
    """
    check_folder(out)
    from ..analysis import analyze as measure
    from ..report.analysis import headlines, write_analysis

    with show.Steps("analyze") as steps:
        analysis = measure(
            model,
            text,
            out,
            tokenizer=tokenizer,
            length=length,
            chunks=chunks,
            tangents=tangents,
            stream=stream,
            device=device,
            untrained=untrained,
            products=products,
            stretches=spectra,
            hooks=hooks,
            memory=memory,
            fresh=fresh,
            seed=seed,
            progress=steps.stage,
        )
        if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, the first writes for all
            return
        steps.stage("writing the report", 1.0)
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
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="Where to time: cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the JSON to a file, too.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the library against pure PyTorch, after checking that both give the same answer."""
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
