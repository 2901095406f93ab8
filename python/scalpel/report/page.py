"""The page of a report: one HTML file that holds its pictures, its style and its numbers."""

import inspect
import math
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import experiments
from .._files import check_folder, replace_text
from .._json import plain
from ..experiments.result import Result
from ..experiments.suite import Suite, left_out
from ..experiments.verdicts import MARKS, VERDICTS
from .card import facts
from .pictures.figures import to_svg
from .templating import environment_and_style

__all__ = ["render", "write_report"]


def write_report(folder: str | Path, suite: Suite) -> Path:
    """Write the page ``index.html`` and the numbers ``results.json``.

    Each file is replaced in one move, the numbers first.

    Args:
        folder: It is created if need be.
        suite: The results, and what they are of.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder can't be written.
        ValueError: A figure is of an unknown kind, or its entries' lengths don't fit each other.

    Example:
        >>> import tempfile
        >>> from scalpel.report import Suite, write_report
        >>> result = scalpel.experiments.run("minimal_simulator", k_max=3, n_max=30, samples=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_report(folder, Suite([result], {"name": "none"}, 1.0))
        ...     page.name, page.stat().st_size > 10_000
        ('index.html', True)
    """
    folder = Path(folder)
    check_folder(folder)
    page, numbers = render(suite), suite.to_json(indent=2)
    replace_text(folder / "results.json", numbers + "\n")
    replace_text(folder / "index.html", page)
    return folder / "index.html"


def render(suite: Suite) -> str:
    """The page as text. The same suite gives the same text."""
    environment, style = environment_and_style()
    environment.filters["shape"] = shape
    environment.filters["brief"] = brief
    known, more = facts(plain(suite.model))
    counts = Counter(result.verdict for result in suite.results)
    return environment.get_template("index.html").render(
        style=Markup(style),
        model=known,
        more=more,
        name=str(suite.model.get("name", "") or ""),
        seconds=suite.seconds if math.isfinite(suite.seconds) else None,
        counts=[(v, counts[v]) for v in VERDICTS if counts[v]],
        left_out=left_out(suite),
        marks=MARKS,
        results=[_section(result) for result in suite.results],
    )


def _section(result: Result) -> dict[str, Any]:
    data: dict[str, Any] = plain(asdict(result))
    figures = []
    for key, figure in result.figures.items():
        spec = data["figures"][key]
        svg = to_svg(figure, f"{result.name}-{key}".replace("_", "-"))
        figures.append({"svg": Markup(svg), "title": spec.get("title", key), "summary": spec.get("summary", "")})
    numbers = {
        part: {k: v for k, v in data[part].items() if k not in ("summary", "rule")}
        for part in ("prediction", "measured", "interval", "null")
    }
    numbers["figures"] = {
        spec.get("title", key): {k: v for k, v in spec.items() if k not in ("kind", "title", "summary")}
        for key, spec in data["figures"].items()
    }
    return data | {
        "pictures": figures,
        "numbers": {k: v for k, v in numbers.items() if v},
        "rule": _rule(data),
    }


def _rule(result: dict[str, Any]) -> str:
    """How the verdict follows from the numbers: the rule stored with the prediction, or else the code's docstring."""
    stored = result["prediction"].get("rule") or result["provenance"].get("verdict_rule")
    if stored:
        return str(stored)
    try:
        function = getattr(experiments.module_of(result["name"]), "verdict", None)
    except ValueError:  # the result is of a version with other experiments
        return ""
    return inspect.getdoc(function) or "" if function is not None else ""


def brief(text: str, most: int) -> str:
    """The first clauses of a text, up to ``most`` characters or a word more, for a table beside the whole text."""
    if len(text) <= most:
        return text
    depth, strong, weak = 0, 0, 0  # of brackets; the last end of a clause; the last comma
    for i, (here, after) in enumerate(pairwise(text)):
        if i > most:
            break
        depth += (here in "([") - (here in ")]")
        if depth == 0 and after == " ":
            strong = i if here in ";." else strong
            weak = i if here == "," else weak
    end = strong if strong > most // 3 else max(strong, weak) or text.find(" ", most)
    return f"{text[:end]} …" if end > 0 else text


def shape(value: Any) -> str:
    """The way in which the page shows a value: scalar, empty, table, mapping, bits, list, records, matrix or items."""
    if isinstance(value, dict):
        rows = list(value.values())
        alike = len(rows) > 1 and all(isinstance(r, dict) and r and r.keys() == rows[0].keys() for r in rows)
        if alike and all(shape(v) in ("scalar", "list", "empty") for r in rows for v in r.values()):
            return "table"
        return "mapping" if value else "empty"
    if not isinstance(value, list):
        return "scalar"
    if not value:
        return "empty"
    if all(isinstance(v, bool) for v in value):
        return "bits"
    if all(not isinstance(v, list | dict) for v in value):
        return "list"
    if all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value):
        return "records"
    return "matrix" if all(isinstance(v, list) and shape(v) in ("list", "bits") for v in value) else "items"
