"""The page of an analysis, and its main figures in words."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .._files import check_folder, replace_text
from ..experiments.result import plain
from .card import facts, number
from .pictures.analysis_pictures import pictures
from .pictures.figures import Picture, to_svg
from .templating import environment_and_style

if TYPE_CHECKING:
    from ..analysis import Analysis

__all__ = ["headlines", "render_analysis", "write_analysis"]

# The parts of the page in their order: a title, and what the part is about. ``Picture.part`` names one.
_PARTS = {
    "collapse": (
        "What depth does to directions",
        "A layer is its Jacobian from the residual stream before it to the one after it, {tokens} to {tokens}, the "
        "identity path included. Its singular values say by how much it stretches directions; those of the product of "
        "the first l layers, what is left of a change at the bottom. Where they fall apart by orders of magnitude, "
        "many directions have collapsed onto few.",
    ),
    "growth": (
        "Exponents, and the growth of the state",
        "An exponent is the logarithm of a singular value of the whole product over the number of layers: nats per "
        "layer. The state itself grows, too, so that a change that grows as fast does not grow in proportion; hence "
        "exponents are shown less the growth of the residual’s norm. Position 0 often has a norm that hides all "
        "others’, so that growth is shown without it as well.",
    ),
    "rank": (
        "How many directions are left",
        "Only the leading singular values are computed; the others lie between zero and the smallest of these, and "
        "their summed squares are estimated with random probes. What a rank can then be is an interval, not a number.",
    ),
    "spectra": (
        "Spectra of activations and gradients",
        "The covariance of a hook’s values over {tokens} of the text, and of the gradient of the summed next-token "
        "cross-entropy there, one row a token, centered. Any data has leading components, so the shares say little by "
        "themselves: what training did is the difference from the untrained model on the same text.",
    ),
    "masks": (
        "What is active, and by how little",
        "An active fraction is the share of entries that are not zero. A margin is how far, in one token’s row, the "
        "smallest magnitude that a TopK keeps lies above the largest that it drops: changes of entries that are all "
        "smaller than half of it leave that mask as it is.",
    ),
}


def write_analysis(folder: str | Path, analysis: "Analysis") -> Path:
    """Write the page ``report.html`` and the numbers ``analysis.json``.

    Each file is replaced in one move, the numbers first.

    Args:
        folder: It is created if need be.
        analysis: What :func:`scalpel.analysis.analyze` gave.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder can't be written.
    """
    folder = Path(folder)
    check_folder(folder)
    page, numbers = render_analysis(analysis), analysis.to_json(indent=2)
    replace_text(folder / "analysis.json", numbers + "\n")
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def render_analysis(analysis: "Analysis") -> str:
    """The page as text. The same analysis gives the same text."""
    environment, style = environment_and_style()
    model = {name: value for name, value in analysis.model.items() if value is not None}
    known, _ = facts(plain(_shortened(model)))
    drawn = pictures(analysis)
    tokens = "all tokens" if analysis.text["tokens that count"] == "all" else "the tokens that count"
    parts = [
        {
            "name": name,
            "title": title,
            "about": about.format(tokens=tokens),
            "pictures": _drawn([p for p in drawn if p.part == name]),
        }
        for name, (title, about) in _PARTS.items()
    ]
    return environment.get_template("analysis.html").render(
        style=Markup(style),
        name=str(analysis.model["name"]),
        lead=_lead(analysis),
        model=known,
        text=facts(plain(_shortened(analysis.text)))[0],
        notes=analysis.notes,
        parts=[part for part in parts if part["pictures"]],
        provenance={**analysis.model, **{f"text: {k}": v for k, v in analysis.text.items()}, **analysis.provenance}
        | {f"option: {k}": v for k, v in analysis.options.items()},
    )


def headlines(analysis: "Analysis") -> dict[str, str]:
    """The main figures in words, for a terminal: of the trained model, and of the untrained one if there is one."""
    lines = {"chunks": _lead(analysis)}
    lines |= {name: str(analysis.text[name]) for name in ("special tokens", "tokens that count")}
    if analysis.options["chat_template"]:
        lines["chat template"] = str(analysis.text["chat template"])
    named = {
        "largest exponent, nats per layer": ("exponents", 0),
        "the same, less the growth of the norm": ("exponents_less_growth", 0),
        "the same, less its growth without position 0": ("exponents_less_growth_without_first", 0),
        "frame growth of the first direction, nats per layer": ("mean_frame_growth", 0),
    }
    for words, (key, i) in named.items():
        if analysis.trained.get(key) is None or (key == "mean_frame_growth" and "exponents" in analysis.trained):
            continue
        sides = [("", analysis.trained), ("; untrained ", analysis.untrained)]
        lines[words] = "".join(before + _figure(side[key], i) for before, side in sides if side is not None)
    if analysis.spectra is not None:
        sides = [("", analysis.spectra["trained"]), ("; untrained ", analysis.spectra["untrained"])]
        streams = list(analysis.spectra["trained"])
        for stream in dict.fromkeys((next((s for s in streams if s == "final_resid"), streams[0]), streams[-1])):
            words = f"effective rank at {stream}, of {analysis.spectra['trained'][stream]['dim']}"
            lines[words] = "".join(before + _rank(side[stream]) for before, side in sides if side is not None)
    shares = [leaf["mean"] for leaf in analysis.trained["active"].values()]
    lines["active fractions"] = f"{min(shares):.3g} to {max(shares):.3g} at {len(shares)} hooks"
    margins = {name: leaf["relative_median"]["mean"] for name, leaf in analysis.trained["margins"].items()}
    if margins:
        least = min(margins, key=margins.__getitem__)
        lines["smallest median margin"] = f"{margins[least]:.2g} of the smallest magnitude kept, at {least}"
    return lines


def _rank(figures: dict[str, Any]) -> str:
    value, low, high = (figures["effective_rank"][part] for part in ("value", "low", "high"))
    return f"{value:.1f}" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")


def _figure(leaf: dict[str, Any], i: int) -> str:
    mean, low, high = (leaf[part][i] for part in ("mean", "low", "high"))
    if mean is None:
        return "−∞ in some chunk"
    return f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _lead(analysis: "Analysis") -> str:
    count, lengths = len(analysis.chunks), sorted({chunk["tokens"] for chunk in analysis.chunks}, reverse=True)
    chunk_lengths = " and ".join(map(str, lengths))
    where = "" if count == 1 else ", which was measured at the first of them"
    beside = f", beside an untrained model of the same shape{where}" if analysis.untrained else ""
    return (
        f"{count} {'chunk' if count == 1 else 'chunks'} of {chunk_lengths} tokens, "
        f"{analysis.options['tangents']} directions{beside}."
    )


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Hashes cut to twelve digits, which tell them apart; the provenance has all digits."""
    return {name: value[:12] if name.endswith(("sha256", "commit")) else value for name, value in values.items()}


def _drawn(placed: Sequence[Picture]) -> list[dict[str, Any]]:
    made = []
    for picture in placed:
        svg = Markup(to_svg(picture.figure, picture.name))
        made.append(
            {
                "title": picture.figure["title"],
                "summary": picture.figure.get("summary", ""),
                "svg": svg,
                "columns": ["", *(str(series["label"]) for series in picture.figure["series"])],
                "rows": _rows(picture.figure),
            }
        )
    return made


def _rows(figure: dict[str, Any]) -> list[list[str]]:
    """The numbers behind a picture as a table: a row for each x, a column for each curve."""
    points: dict[float, list[str]] = {}
    series = figure["series"]
    for column, curve in enumerate(series):
        low, high = curve.get("low") or curve["y"], curve.get("high") or curve["y"]
        for x, y, a, b in zip(curve["x"], curve["y"], low, high, strict=True):
            cells = points.setdefault(x, ["–"] * len(series))
            if y is not None:
                known = a is not None and b is not None and (a, b) != (y, y)
                cells[column] = f"{y:.4g}" + (f" [{a:.4g}, {b:.4g}]" if known else "")
    return [[number(x), *cells] for x, cells in sorted(points.items()) if math.isfinite(x)]
