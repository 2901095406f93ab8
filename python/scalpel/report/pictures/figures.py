"""Pictures of a Result: from the data in ``Result.figures`` to SVG that stands inline in a page.

A figure is a dict with ``kind`` (one of those below), ``title``, optionally ``summary`` (one sentence
on what is to be seen), and the data of its kind:

- region: ``k`` list, ``n_max``, ``fails`` bool [len(k)][n_max + 1]
- curves: ``xlabel``, ``ylabel``, ``series`` [{label, x, y, low?, high?, style? line|dashed|points, group?}],
  ``hlines?`` [{y, label}], ``vlines?`` [{x, label}]
- map: ``xlabel``, ``ylabel``, ``x_edges``, ``y`` row labels, ``values`` [len(y)][len(x_edges) - 1] in [0, 1],
  ``overlays`` [{label, x one a row, style}]
- bars: ``ylabel``, ``labels``, ``values``, ``low?``, ``high?``, ``reference?`` [{y, label}]
- digraph: ``nodes`` [{label, note?}], ``edges`` [{src, dst, label}], ``start?``
- eggbox: ``boxes`` [{cells, group, above}]
- layered: ``columns`` [{label, nodes}], ``edges`` [{src, dst, kind, weight?}], ``sizes?``

None and NaN mean that there is no such measurement; they leave a gap and are never drawn as a value.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ...experiments.result import plain
from .bars import draw_bars
from .curves import draw_curves
from .digraphs import draw_digraph
from .eggbox import draw_eggbox
from .layered import draw_layered
from .maps import draw_map, draw_region
from .style import RC, VARIABLES

__all__ = ["KINDS", "Picture", "alt_text", "draw", "to_svg"]

_DRAW = {
    "region": draw_region,
    "curves": draw_curves,
    "map": draw_map,
    "bars": draw_bars,
    "digraph": draw_digraph,
    "eggbox": draw_eggbox,
    "layered": draw_layered,
}
KINDS = tuple(_DRAW)

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Picture:
    """A figure with its place on a page.

    Attributes:
        name: What its SVG's ids begin with, unique on the page.
        part: The part of the page in which it stands.
        figure: Its data, of one of the kinds above.
    """

    name: str
    part: str
    figure: dict[str, Any]


def draw(figure: Mapping[str, Any], *, title: bool = False) -> Figure:
    """The picture as a matplotlib Figure, in the light theme; ``title`` writes its title above it.

    Raises ValueError for an unknown kind, a missing entry, or lengths that don't fit.
    """
    data = plain(dict(figure))
    kind = data.get("kind")
    if kind not in _DRAW:
        raise ValueError(f"figure kind is {kind!r}; allowed: {', '.join(KINDS)}")
    with mpl.rc_context(RC):
        try:
            drawn = _DRAW[kind](data)
        except KeyError as missing:
            raise ValueError(f"a figure of kind {kind!r} has no entry {missing}") from None
        if title:
            drawn.text(0.0, 1.02, str(data.get("title", "")), size=10.5, weight="bold", va="bottom")
        return drawn


def to_svg(figure: Mapping[str, Any], prefix: str) -> str:
    """The picture as an ``<svg>`` element for a page: no prolog, no address of any other file.

    ``prefix`` goes in front of every id in it, since several pictures share a page. The same data give the
    same text. Raises ValueError as :func:`draw` does.
    """
    drawn = draw(figure)
    file = io.BytesIO()
    with mpl.rc_context(RC):
        FigureCanvasSVG(drawn).print_svg(file, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for child in list(root):
        if child.tag != f"{_SVG}g" and child.tag != f"{_SVG}defs":
            root.remove(child)
    for style in root.findall(f"./{_SVG}defs/{_SVG}style/.."):
        style.clear()
    for element in root.iter():
        _localise(element, prefix)
    root.attrib.update({"role": "img", "aria-label": alt_text(figure)})
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    return ElementTree.tostring(root, encoding="unicode")


def alt_text(figure: Mapping[str, Any]) -> str:
    """What a reader who can't see the picture is told: its title, its summary, and what is drawn in it."""
    parts = [str(figure.get("title", "")), str(figure.get("summary", ""))]
    named = [str(s["label"]) for s in (*figure.get("series", ()), *figure.get("overlays", ())) if s.get("label")]
    if named:
        parts.append("Shown: " + ", ".join(named))
    return ". ".join(part.rstrip(".") for part in parts if part) + "."


def _localise(element: ElementTree.Element, prefix: str) -> None:
    """One element as HTML knows it: no namespaces, ids of this picture's own, colours by name."""
    element.tag = element.tag.removeprefix(_SVG)
    for name in list(element.attrib):
        value = element.attrib.pop(name)
        name = name.removeprefix(_XLINK)
        if name == "id":
            value = f"{prefix}-{value}"
        elif name == "href":
            value = value.replace("#", f"#{prefix}-", 1)
        value = value.replace("url(#", f"url(#{prefix}-")
        if name == "style":
            value = re.sub(r"font-family: [^;]*;?", "", value)
            value = re.sub(r"font: (\d[^ ;]*) [^;]*", r"font-size: \1", value)
        element.attrib[name] = re.sub(r"#[0-9a-f]{6}\b", _variable, value)


def _variable(match: re.Match[str]) -> str:
    colour = match.group()
    return f"var({VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour
