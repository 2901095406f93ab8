"""The page of a text that was read through a Jacobian lens: layers by tokens, the whole list behind each cell."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .._files import check_folder, replace_text
from .templating import environment_and_style, text_of

if TYPE_CHECKING:
    from ..jacobian_lens.lens import JacobianLens
    from ..jacobian_lens.reading.readout import Readout

__all__ = ["render_lens", "write_lens"]

_LEVELS = 10  # of colour, beside the one for the least


def write_lens(
    folder: str | Path,
    lens: JacobianLens,
    readout: Readout,
    intervals: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Path:
    """Write the page ``lens.html`` and the numbers ``readout.json``.

    Args:
        folder: It is created if need be.
        lens: The lens.
        readout: What it reads of a text, beside the logit lens.
        intervals: Its intervals, ``lens.intervals(...).to_json()``.
        name: What the page calls the model; by default what the lens knows.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder can't be written.
        ValueError: The readout is of one lens alone.
    """
    folder = Path(folder)
    check_folder(folder)
    page = render_lens(lens, readout, intervals, name)
    numbers = {**readout.to_json(), **({} if intervals is None else {"intervals": intervals})}
    replace_text(folder / "readout.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "lens.html", page)
    return folder / "lens.html"


def render_lens(
    lens: JacobianLens,
    readout: Readout,
    intervals: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """The page as text; see :func:`write_lens`. The same arguments give the same text."""
    if readout.jacobian is None or readout.logit is None:
        raise ValueError("the page shows both lenses, and the readout is of one: read with lens='both'")
    environment, style = environment_and_style()
    style += text_of(environment, "lens.css")
    script = text_of(environment, "lens.js")
    found = _visible(readout.to_json())
    largest = max(2, _largest_rank(found))
    found["levels"] = _levels(found, largest)
    legend = {"rank": [f"rank {largest:,} or more", "rank 1"], "share": ["probability 0", "1"]}
    found["legend"] = legend
    if intervals is not None:
        found["intervals"] = dict(intervals)
    about = dict(lens.about)
    name = name or str(about.get("model_name") or about.get("model") or "a model")
    rows = [
        {
            "name": str(layer),
            "number": row,
            "cells": [
                {"text": top[0][1], "level": level}
                for top, level in zip(
                    found["jacobian"]["top"][row], found["levels"]["jacobian"]["rank"][row], strict=True
                )
            ],
        }
        for row, layer in enumerate(found["layers"])
    ]
    rows.append(
        {
            "name": "model",
            "number": len(rows),
            "cells": [{"text": top[0][1], "level": _LEVELS} for top in found["model"]["top"]],
        }
    )
    pairs = zip(found["tokens"], found["skipped"], strict=True)
    return environment.get_template("lens.html").render(
        style=Markup(style),
        script=Markup(script),
        policy=_policy(script),
        title=f"Jacobian lens: {name}",
        name=name,
        lead=_lead(lens, readout, found),
        legend=legend,
        heads=[{"text": text, "skipped": skipped} for text, skipped in pairs],
        rows=rows,
        outside=any(found["skipped"]),
        fitted_from=about.get("skip_first", 16),
        errors=[(layer, "unknown" if error is None else f"{error:.1%}") for layer, error in _errors(lens)],
        provenance={key: value for key, value in about.items() if value is not None},
        data=Markup(_escaped(found)),
    )


def _visible(found: dict[str, Any]) -> dict[str, Any]:
    """The same readout with texts of tokens in which spaces at the beginning and ends of lines can be seen."""

    def text(token: str) -> str:
        bare = token.lstrip(" ")
        shown = "·" * (len(token) - len(bare)) + bare
        return shown.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")

    def listed(top: Any) -> Any:
        if top and isinstance(top[0], int):
            number, token, logit, share = top  # all digits stand in readout.json
            return [number, text(token), round(logit, 4), float(f"{share:.4g}")]
        return [listed(part) for part in top]

    lenses = {name: {**found[name], "top": listed(found[name]["top"])} for name in ("model", "jacobian", "logit")}
    return {**found, **lenses, "tokens": [text(token) for token in found["tokens"]]}


def _lead(lens: JacobianLens, readout: Readout, found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    tokens, layers = len(found["positions"]), found["layers"]
    prompts = f"{lens.n_prompts or 'an unknown number of'} prompt{'' if lens.n_prompts == 1 else 's'}"
    known = [error for _, error in _errors(lens) if error is not None]
    of_error = ", of unknown error"
    if known:
        span = f"{min(known):.1%}" + (f" to {max(known):.1%} by layer" if len(known) > 1 else "")
        of_error = f", with a relative error of {span}"
    read = "1 token" if tokens == 1 else f"{tokens} tokens"
    at = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    sentences = [f"{read} of a text, read at {at} through a lens fitted on {prompts}{of_error}."]
    cells = [
        (ours, theirs)
        for ours_row, theirs_row in zip(found["jacobian"]["rank"], found["logit"]["rank"], strict=True)
        for ours, theirs in zip(ours_row, theirs_row, strict=True)
    ]
    ahead = sum(ours < theirs for ours, theirs in cells)
    behind = sum(ours > theirs for ours, theirs in cells)
    sentences.append(
        f"The lens ranks the model’s own next token higher than the logit lens does in {ahead} of {len(cells)} cells, "
        f"lower in {behind}, and the same in {len(cells) - ahead - behind}. One text says little: "
        "lens.evaluate compares them over many."
    )
    if readout.stripped:
        sentences.append(
            "Spaces at the end of the text were taken away, since a tokenizer joins them to the next word."
        )
    return sentences


def _errors(lens: JacobianLens) -> list[tuple[Any, float | None]]:
    return [(layer, None if math.isnan(lens.error[layer]) else lens.error[layer]) for layer in lens.source_layers]


def _largest_rank(found: Mapping[str, Any]) -> int:
    return max(rank for lens in ("jacobian", "logit") for row in found[lens]["rank"] for rank in row)


def _levels(found: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """The level of colour of each cell, 0 to 10: by rank, in equal steps of its logarithm; by probability, of its root.

    A square root lets small probabilities differ.
    """

    def by_rank(rank: int) -> int:
        return round(_LEVELS * (1 - math.log(rank) / math.log(largest)))

    def by_share(top: Sequence[Any]) -> int:
        return round(_LEVELS * math.sqrt(top[0][3]))

    levels: dict[str, Any] = {
        lens: {
            "rank": [[by_rank(rank) for rank in row] for row in found[lens]["rank"]],
            "share": [[by_share(top) for top in row] for row in found[lens]["top"]],
        }
        for lens in ("jacobian", "logit")
    }
    tops = found["model"]["top"]
    levels["model"] = {"rank": [_LEVELS] * len(tops), "share": [by_share(top) for top in tops]}
    return levels


def _escaped(value: Any) -> str:
    """JSON that may stand in a page: a token such as ``</script>`` must not end the script."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(script: str) -> str:
    """A content security policy that allows this page's own style and script, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
