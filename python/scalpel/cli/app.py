"""What every command shares: the application, common options, and errors as one message and an exit code."""

import dis
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from . import show

__all__ = ["Debug", "Json", "Seed", "app", "guarded", "print_json"]

_PACKAGE = Path(__file__).resolve().parents[1]

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
    """Turns errors that the user can mend into one message and exit code 2.

    Those are the errors of files and folders, and each ValueError that the library raises itself: a refusal, a
    checkpoint that can't be read, an option out of range. A ValueError that comes out of NumPy, PyTorch or Python is a
    mistake of the library's, as other errors are: it is raised, so that its traceback is shown and the exit code is 1.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                _check_target()
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                show.err().print(interrupted)
                raise typer.Exit(130) from None
            except BrokenPipeError:  # the reader of our output has gone; nothing is left to say to it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except (ValueError, OSError) as error:
                if kwargs.get("debug") or (isinstance(error, ValueError) and not _meant(error)):
                    raise
                show.fail(_message(error))
                raise typer.Exit(2) from None

        return guarded

    return decorate


def _meant(error: ValueError) -> bool:
    """Whether this package raised the error, by its kind or by a ``raise``, rather than something that it called."""
    if type(error).__module__.partition(".")[0] == _PACKAGE.name:
        return True
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return False
    code = at.tb_frame.f_code
    ours = _PACKAGE in Path(code.co_filename).resolve().parents
    return ours and code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _check_target() -> None:
    """The one ValueError of the compiled core that the user can mend, as one of this package."""
    if not os.environ.get("SCALPEL_TARGET"):
        return
    from .._native import cpu_core

    try:
        cpu_core.active_target()
    except ValueError as error:
        raise ValueError(str(error)) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def print_json(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, where a reader that has gone is noticed
