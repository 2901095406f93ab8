"""The commands that produce a model or a circuit: ``scalpel train`` and ``scalpel prune``."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .._files import check_folder, replace_text
from . import show
from .application import Debug, Json, Seed, app, guarded, print_json

__all__ = ["prune", "train"]


class Control(StrEnum):
    """Which part of the recipe a control is trained without."""

    none = "none"
    no_positions = "no-positions"
    no_topk = "no-topk"


@app.command()
@guarded("interrupted; the same command continues from the last saved step")
def train(
    name: Annotated[
        str,
        typer.Argument(help="Model to train: bracket-mini, python-small, mod3-mini, flip-flop-mini or parity-mini."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the model; by default scalpel-runs/NAME[-CONTROL][-seedN]."),
    ] = None,
    control: Annotated[
        Control, typer.Option(help="Train a control, which lacks this part of the recipe.")
    ] = Control.none,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps; by default the recipe's.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small model to cut open. If it is stopped, the same command continues where it was."""
    machines = ("mod3-mini", "flip-flop-mini", "parity-mini")
    if name not in ("bracket-mini", "python-small", *machines):
        raise ValueError(
            f"there is no recipe named {name!r}; there are bracket-mini, python-small, {', '.join(machines)}"
        )
    if name in machines and control is not Control.none:
        raise ValueError(f"--control {control.value} is for the recipe of bracket-mini; {name} has none")
    folder = out or Path("scalpel-runs") / _run_name(name, control, seed)
    check_folder(folder)
    with show.Steps(folder.name) as progress:
        if name in machines:
            from ..training.machines import train_machine

            card = train_machine(name, folder, seed=seed, steps=steps, progress=progress.step)
        elif name == "python-small":
            from ..experiments.abilities import accuracies
            from ..training.python_small import train_python

            card = train_python(
                folder, accuracies, control=control.value, seed=seed, steps=steps, progress=progress.step
            )
        else:
            from ..training.bracket_mini import train_model

            card = train_model(folder, control=control.value, seed=seed, steps=steps, progress=progress.step)
    if as_json:
        from .._json import plain

        print_json(json.dumps(plain(card), indent=2, allow_nan=False))
    else:
        show.out().print(show.facts(folder.name, card))
        show.out().print(f"Model: {folder}", soft_wrap=True)


def _run_name(name: str, control: Control, seed: int) -> str:
    parts = [name]
    if control is not Control.none:
        parts.append(control.value)
    if seed:
        parts.append(f"seed{seed}")
    return "-".join(parts)


class Ablation(StrEnum):
    """What replaces the activation of a deleted node."""

    mean = "mean"
    zero = "zero"
    resample = "resample"


@app.command()
@guarded("interrupted; the same command continues from the last finished seed")
def prune(
    model: Annotated[str, typer.Argument(help="A shipped model, a checkpoint's folder, or an id on the hub.")],
    task: Annotated[str, typer.Option(help="Task for which to find the circuit.")] = "bracket_counting",
    ablation: Annotated[Ablation, typer.Option(help="What replaces the activation of a deleted node.")] = Ablation.mean,
    seeds: Annotated[int, typer.Option(min=1, help="How many searches to run, each with its own random start.")] = 10,
    target: Annotated[
        float, typer.Option(help="Task loss, in nats, that the circuit must reach with as few nodes as possible.")
    ] = 0.15,
    prompts: Annotated[
        int, typer.Option(min=8, help="How many prompts to search on; as many others are used to judge the circuit.")
    ] = 512,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result; by default scalpel-runs/prune-MODEL-TASK-ABLATION.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Also store the circuit in the model's folder, where `scalpel run` finds it.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the nodes that a task needs, and test against controls whether they are more than an artefact.

    If it is stopped, the same command continues where it was.
    """
    name = f"prune-{Path(model).name}-{task}-{ablation.value}" + (f"-seed{seed}" if seed else "")
    folder = out or Path("scalpel-runs") / name
    check_folder(folder)
    from ..circuits import prune as search
    from ..circuits.task import task_named
    from ..experiments.machine.circuit import FILE, examine
    from ..experiments.suite import Suite
    from ..models.circuitgpt.model import CircuitGPT
    from ..report import write_report

    task_named(task)  # before anything is loaded
    with show.Steps("prune") as steps:
        loaded = CircuitGPT.from_pretrained(model)
        if keep and loaded.folder is None:
            raise ValueError("the model has no folder of its own to keep the result in")
        pruning = search(
            loaded,
            task,
            ablation=ablation.value,
            seeds=seeds,
            target=target,
            prompts=prompts,
            folder=folder / "seeds",
            seed=seed,
            progress=steps.stage,
        )
        text = pruning.to_json(indent=1)
        replace_text(folder / FILE, text + "\n")
        if keep and loaded.folder is not None:
            replace_text(loaded.folder / FILE, text + "\n")
        steps.stage("judging it on new prompts", 1.0)
        result = examine(loaded, pruning, seed=seed)
        page = write_report(folder, Suite([result], loaded.card, pruning.seconds))
    if as_json:
        print_json(text)
    else:
        show.out().print(show.results([result]))
        show.out().print(f"{pruning.seconds:.0f} s. Report: {page}", soft_wrap=True)
    for note in pruning.notes:
        show.err().print(f"note: {note}", soft_wrap=True)
