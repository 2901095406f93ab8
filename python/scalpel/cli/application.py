"""What all commands share: the application, the common options, and how an error becomes a message and an exit code."""

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

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]


def guarded(interrupted: str = "interrupted") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of commands that turns errors which the user can mend into one message and exit code 2.

    These are the errors of files and folders, and every ValueError that the library raises itself: a refusal, a
    checkpoint that can't be read, an option out of range. A ValueError from NumPy, PyTorch or Python is a fault of the
    library, as are all other errors. It is raised, so that its traceback is shown and the exit code is 1.

    Args:
        interrupted: What is said when the user presses Ctrl-C; the exit code is then 130.
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
            except BrokenPipeError:  # whoever read our output has closed it, so there is nobody left to tell
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
    """Whether this package raised the error itself, rather than a library that it called."""
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
    """Raise the compiled core's error for a bad SCALPEL_TARGET as this package's own, since the user can mend it."""
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
    """Write JSON, or any other text for programs, to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, so that a closed pipe is noticed inside the command
