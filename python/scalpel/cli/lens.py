"""The commands about Jacobian lenses: ``scalpel lens fit``, ``show`` and ``merge``."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import check_folder
from . import show as display
from .application import Debug, Json, Seed, app, guarded, print_json

if TYPE_CHECKING:
    from ..jacobian_lens.lens import JacobianLens

__all__ = ["fit", "merge", "show"]

lens_app = typer.Typer(
    help="Fit a Jacobian lens, read a text through it, or merge lenses.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lens_app, name="lens")

_FILE = "lens.pt"

Model = Annotated[str, typer.Argument(help="A shipped model, a CircuitGPT, a folder of transformers, or a GGUF file.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="A tokenizer.json or a folder with a tokenizer; by default the model's own.")
]
Device = Annotated[str, typer.Option(help="Device on which the model runs: cpu, cuda, cuda:1.")]


class Targets(StrEnum):
    """Which positions of the target count for a token."""

    after = "after"
    same = "same"


class Estimator(StrEnum):
    """The rules of the backward pass."""

    jacobian = "jacobian"
    relevance = "relevance"


@lens_app.command()
@guarded("interrupted; the same command continues after the last finished prompt")
def fit(
    model: Model,
    text: Annotated[
        Path,
        typer.Option(
            help="The prompts: a text, cut into stretches of --max-tokens tokens; or a .jsonl file with one in a line."
        ),
    ],
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to read at most.")] = 100,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop when the relative error of every layer is at most this, such as 0.05."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help='Source layers: "all", or numbers and ranges such as "0,4,10-12".')
    ] = "all",
    target: Annotated[int | None, typer.Option(help="Number of the target layer; by default the last one.")] = None,
    skip_first: Annotated[
        int, typer.Option(min=0, help="How many tokens at the beginning of each prompt don't count.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of a prompt; what is longer is cut.")] = 128,
    targets: Annotated[
        Targets, typer.Option(help="Whether later positions of the target count too, or the same position alone.")
    ] = Targets.after,
    estimator: Annotated[
        Estimator, typer.Option(help="The Jacobian, or the relevance lens, which has other backward rules.")
    ] = Estimator.jacobian,
    precision: Annotated[
        str | None, typer.Option(help='"bfloat16" for matrix products in bfloat16; by default float32.')
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Hold one layer of the model in memory at a time, for models that don't fit."),
    ] = False,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the lens and for what was summed so far.")] = Path(
        "scalpel-lens"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what the folder holds, and begin again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit a Jacobian lens: for each layer, the mean Jacobian of the last residual stream with respect to its output.

    If it is stopped, the same command continues where it was. The folder holds the sums, and lens.pt, which other
    programs read.
    """
    check_folder(out)
    with display.Steps("lens") as steps:
        steps.stage("loading the model", 0.0)
        import itertools

        from ..analysis.job import job_of_environment
        from ..jacobian_lens import fit as fit_lens
        from ..jacobian_lens.fits.prompts import read_prompts
        from ..jacobian_lens.words import words_of

        subject, own = _model(model, device, stream)
        words = words_of(subject, own if tokenizer is None else tokenizer)
        given = list(itertools.islice(read_prompts(text, words, max_tokens), prompts))

        def step(done: int) -> None:
            steps.stage(f"prompt {done} of {len(given)}", done / len(given))

        with job_of_environment() as job:
            try:
                lens = fit_lens(
                    subject,
                    given,
                    layers=_numbers(layers),
                    target=target,
                    skip_first=skip_first,
                    max_tokens=max_tokens,
                    targets=targets.value,
                    estimator=estimator.value,
                    precision=precision,
                    tolerance=tolerance,
                    folder=out,
                    shard=job.world > 1,
                    progress=step,
                    tokenizer=words,
                    fresh=fresh,
                )
            except ValueError as error:
                if "fresh=True" not in str(error):
                    raise
                words_here = str(error).replace("another folder", "another --out").replace("fresh=True", "--fresh")
                raise ValueError(words_here) from error
        if job.rank:  # under torchrun, the first process writes for all
            return
        steps.stage("writing the lens", 1.0)
        lens.save(out / _FILE)
    _tell(lens, out / _FILE, as_json)


@lens_app.command()
@guarded()
def show(
    lens: Annotated[Path, typer.Argument(help="The folder of a fit, or a file as `lens fit` writes it.")],
    text: Annotated[str, typer.Argument(help="The text to read.")],
    model: Annotated[
        str,
        typer.Option(help="The model of the lens: a shipped one, a CircuitGPT, a folder of transformers, a GGUF file."),
    ],
    layers: Annotated[str, typer.Option(help='Layers to read: "all", or such as "0,4,10-12".')] = "all",
    last: Annotated[
        int | None, typer.Option(min=1, help="Read only so many tokens, the last ones; all by default.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many tokens are listed for a cell.")] = 10,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, as for `lens fit`: logits and ranks get 95 % intervals from these."),
    ] = None,
    most: Annotated[int, typer.Option("--most", min=2, help="How many of these prompts to read at most.")] = 16,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("scalpel-lens"),
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a text through a lens, beside the logit lens, and write a page of layers by tokens."""
    check_folder(out)
    with display.Steps("lens") as steps:
        steps.stage("loading the model", 0.0)
        import itertools

        from ..jacobian_lens.fits.prompts import read_prompts
        from ..jacobian_lens.words import words_of
        from ..report.lens import write_lens

        subject, own = _model(model, device, False)
        words = words_of(subject, own if tokenizer is None else tokenizer)
        found = _lens(lens).attach(subject, words)
        steps.stage("reading the text", 0.1)
        chosen = None if layers == "all" else _numbers(layers)
        readout = found.readout(text, layers=chosen, positions=None if last is None else slice(-last, None), k=k)
        intervals = None
        if prompts is not None:
            given = list(itertools.islice(read_prompts(prompts, words, int(found.about.get("max_tokens", 128))), most))

            def step(done: int) -> None:
                steps.stage(f"intervals, prompt {done} of {len(given)}", 0.1 + 0.9 * done / len(given))

            intervals = found.intervals(readout, text, given, seed=seed, progress=step).to_json()
        page = write_lens(out, found, readout, intervals, Path(model).stem if Path(model).exists() else model)
    if as_json:
        print_json(json.dumps({**readout.to_json(), "intervals": intervals}, indent=2, allow_nan=False))
    else:
        display.out().print(str(readout), soft_wrap=True)
        display.out().print(f"Page: {page}", soft_wrap=True)
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@lens_app.command()
@guarded()
def merge(
    lenses: Annotated[
        list[Path], typer.Argument(help="Folders of fits, which merge exactly, or files as `lens fit` writes them.")
    ],
    out: Annotated[Path, typer.Option(help="The file for the merged lens.")] = Path("merged-lens.pt"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge lenses that were fitted on different prompts into the lens of all prompts."""
    if len(lenses) < 2:
        raise ValueError("one lens was given; give two or more to merge")
    check_folder(out.parent)
    import warnings

    found = [_lens(path) for path in lenses]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = found[0].merge(*found[1:])
        merged.save(out)
    for warning in caught:
        display.err().print(f"note: {warning.message}", soft_wrap=True)
    _tell(merged, out, as_json)


def _tell(lens: JacobianLens, path: Path, as_json: bool) -> None:
    """Print what is known of a lens."""
    errors = {str(layer): None if math.isnan(error) else error for layer, error in lens.error.items()}
    if as_json:
        about = {"n_prompts": lens.n_prompts, "source_layers": lens.source_layers, "error": errors, "about": lens.about}
        print_json(json.dumps(about, indent=2, allow_nan=False))
        return
    known = {layer: error for layer, error in errors.items() if error is not None}
    facts: dict[str, Any] = {"prompts": lens.n_prompts, "layers": _spans(lens.source_layers), "width": lens.d_model}
    if known:
        worst = max(known, key=lambda layer: known[layer])
        span = f"{min(known.values()):.1%} to {known[worst]:.1%}, the largest at layer {worst}"
        facts["relative error"] = span if len(known) > 1 else f"{known[worst]:.1%}"
    stopped = lens.about.get("stopped")
    if stopped:
        facts["stopped"] = (
            f"at the tolerance of {stopped['tolerance']:.1%}, which layer {stopped['last_layer']} met last"
        )
    display.out().print(display.facts("Jacobian lens", facts))
    display.out().print(f"Lens: {path}", soft_wrap=True)


def _lens(path: Path) -> JacobianLens:
    """Read the lens in the folder of a fit, or in a file."""
    from ..jacobian_lens import JacobianLens

    return JacobianLens.from_folder(path) if path.is_dir() else JacobianLens.load(path)


def _model(name: str, device: str, stream: bool) -> tuple[Any, Any]:
    """The model that a name stands for, or the path of its folder where it is streamed, and its tokenizer."""
    from ..analysis.source import load

    source = load(name, stream, device)
    return (source.folder if stream else source.trained), source.tokenizer


def _numbers(text: str) -> list[int] | str:
    """The layers that a text such as "0,4,10-12" names; "all" stays."""
    if text == "all":
        return text
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f'--layers is {text!r}; give "all", or numbers and ranges such as "0,4,10-12"')
        found.extend(range(int(first), int(last if dash else first) + 1))
    return found


def _spans(layers: list[Any]) -> str:
    """Layers in words: the first and the last of a run of numbers."""
    if all(isinstance(layer, int) for layer in layers) and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ", ".join(map(str, layers))
