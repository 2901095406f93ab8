"""What every command shares: the application, common options, and errors as one message and an exit code."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

from . import cli_show as show

__all__ = ["Debug", "Json", "Seed", "app", "guarded", "print_json"]

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="scalpel",
    help="Cut a neural network open, name the algorithm inside, and find where it breaks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show where it happened.")]
Seed = Annotated[int, typer.Option(min=0, help="Of every random choice.")]


def guarded(interrupted: str = "interrupted") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turns errors that the user can mend into one message and an exit code."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                show.err().print(interrupted)
                raise typer.Exit(130) from None
            except BrokenPipeError:  # the reader of our output has gone; nothing is left to say to it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except (ValueError, OSError) as error:  # CheckpointError is a ValueError
                if kwargs.get("debug"):
                    raise
                show.fail(_message(error))
                raise typer.Exit(2) from None

        return guarded

    return decorate


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def print_json(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, where a reader that has gone is noticed
