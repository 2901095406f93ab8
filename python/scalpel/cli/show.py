"""What the command line prints: tables on stdout, progress and errors on stderr.

Only text objects are printed, never rich's markup, since texts about this library are full of brackets.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..experiments.verdicts import MARKS, Verdict

if TYPE_CHECKING:
    from ..experiments.result import Result

COLUMNS = ("question", "seed's figure", "predicted", "measured", "null", "verdict")
WIDE = 118  # width of a terminal, in characters, from which on six columns side by side can be read

_STYLES: dict[Verdict, str] = {
    "reproduced": "bold green",
    "not reproduced": "bold red",
    "indistinguishable": "bold yellow",
    "not testable here": "dim",
}


def out() -> Console:
    """The console for results. It is made at each use, so that a redirected stdout is respected."""
    return Console(markup=False, emoji=False, highlight=False)


def err() -> Console:
    """The console for everything that isn't a result."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def fail(message: str) -> None:
    """Print an error's message on stderr."""
    err().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def verdict(name: Verdict) -> Text:
    """A verdict with its mark, so that no colour is needed to read it."""
    return Text(f"{MARKS[name]} {name}", style=_STYLES[name])


def results(rows: Sequence["Result"], width: int | None = None) -> Table:
    """The table of verdicts: six columns on a wide terminal, and on a narrow one a block for each experiment."""
    wide = (out().width if width is None else width) >= WIDE
    return _columns(rows) if wide else _blocks(rows)


def _cells(result: "Result") -> tuple[Text, ...]:
    measured = Text(_summary(result.measured))
    interval = _summary(result.interval)
    if interval:
        measured.append(f"\n{interval}", style="dim")
    return (
        Text(result.question),
        Text(result.seed_figure, style="dim"),
        Text(_summary(result.prediction)),
        measured,
        Text(_summary(result.null)),
        verdict(result.verdict),
    )


def _columns(rows: Sequence["Result"]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_lines=False, expand=True, padding=(0, 1, 1, 0))
    for name, ratio in zip(COLUMNS, (5, 4, 5, 5, 4, 3), strict=True):
        table.add_column(name, ratio=ratio, overflow="fold")
    for result in rows:
        table.add_row(*_cells(result))
    return table


def _blocks(rows: Sequence["Result"]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, expand=True, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    for result in rows:
        cells = _cells(result)
        cells[0].stylize("bold")
        for name, cell in zip(COLUMNS, cells, strict=True):
            table.add_row(name, cell)
        table.add_section()
    return table


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """A table of names and values. Nested values are left to --json."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping) and "summary" in value:
            value = value["summary"]
        if isinstance(value, str | int | float | bool):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(name.replace("_", " ") if name.isidentifier() else name, Text(shown))
    return table


def timings(report: Mapping[str, Any]) -> Table:
    """The table of `scalpel bench`: medians in milliseconds, and their ratios."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("operation", no_wrap=True)
    for name in ("ours, ms", "peer", "floor", "peer/ours", "ours/floor"):
        table.add_column(name, justify="right")
    for case in report["cases"]:
        low, high = case["speedup_quartiles"]
        table.add_row(
            Text.assemble((case["name"], "bold"), f"\non {case['device']}"),
            *(f"{case['median_ms'][who]:.3f}" for who in ("ours", "peer", "floor")),
            Text.assemble((f"{case['speedup']:.2f}×", "bold"), f"\n{low:.2f}–{high:.2f}"),
            f"{case['over_floor']:.2f}×",
        )
    return table


def contenders(report: Mapping[str, Any]) -> Text:
    """What each case of `scalpel bench` compares."""
    lines = Text()
    for case in report["cases"]:
        lines.append(f"{case['name']}: ", style="bold")
        lines.append(f"{case['shape']}\n  peer: {case['peer']}; floor: {case['floor']}\n")
        if case["note"]:
            lines.append(f"  {case['note']}\n")
    return lines


def _summary(part: Mapping[str, Any]) -> str:
    return str(part.get("summary", ""))


class Steps:
    """Progress on stderr: a bar on a terminal; elsewhere a line for each stage, and then one every ten seconds.

    It is a context manager. ``stage`` and ``step`` are callbacks for the library's functions.
    """

    EVERY_SECONDS = 10.0

    def __init__(self, description: str) -> None:
        self._console = err()
        self._terminal = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            speed_estimate_period=300,  # a step of an analysis may take minutes
            disable=not self._terminal,
        )
        self._task = self._bar.add_task(description, total=1.0)
        self._last = ("", 0.0)
        self._begun: tuple[float, float] | None = None  # the time and the share done when work began

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, name: str, fraction: float) -> None:
        """A callback for a suite or an analysis: what is being done, and the share of all work done, from 0 to 1."""
        self._bar.update(self._task, description=name, completed=fraction)
        stage, colon, within = name.rpartition(": ")  # "chunk 1 of 4: trained: layer 3 of 30" is part of one stage
        self._line(stage if colon and within else name, f"{fraction:4.0%} {name}{self._to_go(fraction)}")

    def note(self, text: str) -> None:
        """Show a line beside the progress."""
        self._console.print(text, soft_wrap=True)

    def _to_go(self, fraction: float) -> str:
        """How long the rest will take at the pace so far, in words; empty where nothing tells."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, fraction) if fraction > 0 else None
            return ""
        since, before = self._begun
        if fraction <= before or fraction >= 1:
            return ""
        seconds = (1 - fraction) * (now - since) / (fraction - before)
        return f", {seconds:.0f} s to go" if seconds < 90 else f", {seconds / 60:.0f} min to go"

    def step(self, done: int, total: int, loss: float) -> None:
        """A callback for training: the steps done, the number of all steps, and the smoothed loss in nats."""
        self._bar.update(self._task, description=f"step {done}/{total}  loss {loss:.3f}", completed=done / total)
        self._line("train", f"step {done}/{total} loss {loss:.3f}")

    def _line(self, key: str, text: str) -> None:
        if self._terminal:
            return
        last, when = self._last
        now = time.monotonic()
        if key != last or now - when >= self.EVERY_SECONDS:
            self._last = (key, now)
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
