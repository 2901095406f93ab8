"""The spectra of activations and gradients, as the data of curves."""

import math
import re
from typing import Any

from .figures import Picture

__all__ = ["spectra_pictures"]

Sides = list[tuple[str, str, dict[str, Any]]]  # the name of a model, the style of its curves, its figures by stream

_KINDS = ((False, "activations", "Activations"), (True, "gradients", "Gradients"))
_RANKS = (
    ("effective_rank", "effective rank", "effective"),
    ("participation_ratio", "participation ratio", "participation"),
)


def spectra_pictures(spectra: dict[str, Any] | None) -> list[Picture]:
    """Ranks by depth, shares by depth, and the leading spectrum where it is last."""
    if spectra is None:
        return []
    sides = [
        (name, style, spectra[name]) for name, style in (("trained", "line"), ("untrained", "dashed")) if spectra[name]
    ]
    pictures = []
    for gradient, word, title in _KINDS:
        by_kind = _by_kind(sides[0][2], gradient)
        if not by_kind:
            continue
        few = len(by_kind) > 2  # hooks of many kinds: the ranks of each are lines enough
        pictures.append(_ranks(sides, gradient, word, title, few, spectra))
        if not few:
            pictures.append(_shares(sides, gradient, word, title, spectra))
        pictures.append(_spectrum(sides, gradient, word, title))
    return [picture for picture in pictures if picture.figure["series"]]


def _by_kind(side: dict[str, Any], gradient: bool) -> dict[str, dict[int, str]]:
    """{"resid_in": {0: stream, 1: …}}; the final residual stream is what a next layer would read."""
    by_kind: dict[str, dict[int, str]] = {}
    last = max((int(stream.partition(".")[0]) for stream in side if stream.partition(".")[0].isdecimal()), default=-1)
    for stream in side:
        if stream.endswith(".grad") != gradient:
            continue
        name = stream.removesuffix(".grad")
        layer = re.fullmatch(r"(\d+)\.(.+)", name)
        if layer:
            by_kind.setdefault(layer[2], {})[int(layer[1])] = stream
        elif name == "final_resid":
            by_kind.setdefault("resid_in" if "resid_in" in by_kind else name, {})[last + 1] = stream
        else:
            by_kind.setdefault(name, {})[0] = stream
    return by_kind


def _basis(spectra: dict[str, Any], sides: Sides) -> str:
    first = next(iter(sides[0][2].values()))
    some = first["participation_ratio"]["low"] is not None  # of wide hooks, the only one with an interval
    bands = " Bands: 95 %, by leaving one of the text’s blocks out." if some else ""
    dashed = " Dashed: untrained." if len(sides) > 1 else ""
    return f" {first['count']} tokens in stretches of {spectra['tokens']}.{bands}{dashed}"


def _curve(side: dict[str, Any], streams: dict[int, str], key: str, log: bool) -> dict[str, Any]:
    def shown(value: float | None) -> float | None:
        if value is None or not log:
            return value
        return math.log10(value) if value > 0 else None

    leaves = [side[stream][key] for stream in streams.values()]
    curve: dict[str, Any] = {"x": list(streams), "y": [shown(leaf["value"]) for leaf in leaves]}
    if any(leaf["low"] is not None for leaf in leaves):
        curve |= {end: [shown(leaf[end]) for leaf in leaves] for end in ("low", "high")}
    return curve


def _ranks(sides: Sides, gradient: bool, word: str, title: str, few: bool, spectra: dict[str, Any]) -> Picture:
    side, by_kind = sides[0][2], _by_kind(sides[0][2], gradient)
    series = []
    for name, style, side in sides:
        for kind, streams in _by_kind(side, gradient).items():
            for key, label, group in _RANKS[: 1 if few else 2]:
                at = label if not few and kind == "resid_in" else f"{kind}, {label}"
                curve = _curve(side, streams, key, log=True)
                series.append(curve | {"label": f"{at}, {name}", "style": style, "group": f"{kind} {group}"})
    dims = " and ".join(map(str, sorted({side[s]["dim"] for streams in by_kind.values() for s in streams.values()})))
    return Picture(
        f"spectra-ranks-{word}",
        "spectra",
        {
            "kind": "curves",
            "title": f"{title}: in how many directions, by depth",
            "summary": f"Effective rank: exp of the entropy of λᵢ / Σλ. Participation ratio: (Σλ)² / Σλ². Of {dims}."
            + _basis(spectra, sides),
            "xlabel": "layers passed",
            "ylabel": "log₁₀ of the rank",
            "series": series,
            "hlines": [{"y": -1e-9, "label": "1"}],
        },
    )


def _shares(sides: Sides, gradient: bool, word: str, title: str, spectra: dict[str, Any]) -> Picture:
    series = []
    for name, style, side in sides:
        for kind, streams in _by_kind(side, gradient).items():
            for k in (1, 10):
                curve = _curve(side, streams, f"top_{k}", log=False)
                first = ("first" if k == 1 else f"first {k}") + ("" if kind == "resid_in" else f" at {kind}")
                series.append(curve | {"label": f"{first}, {name}", "style": style, "group": f"{kind} {k}"})
    return Picture(
        f"spectra-shares-{word}",
        "spectra",
        {
            "kind": "curves",
            "title": f"{title}: the share of the variance that the first components hold",
            "summary": "Explained variance of the first component, and of the first ten." + _basis(spectra, sides),
            "xlabel": "layers passed",
            "ylabel": "share of the variance",
            "series": series,
        },
    )


def _spectrum(sides: Sides, gradient: bool, word: str, title: str) -> Picture:
    series = []
    for name, style, side in sides:
        kinds = _by_kind(side, gradient)
        streams = kinds.get("resid_in") or next(iter(kinds.values()))
        for at in dict.fromkeys((min(streams), max(streams))):
            shares = side[streams[at]]["shares"]
            label = streams[at].removesuffix(".grad")
            y = [math.log10(share) if share > 0 else None for share in shares]
            series.append(
                {"label": f"{label}, {name}", "x": list(range(1, len(y) + 1)), "y": y, "style": style, "group": label}
            )
    return Picture(
        f"spectra-leading-{word}",
        "spectra",
        {
            "kind": "curves",
            "title": f"{title}: the leading spectrum, at the first hook and at the last",
            "summary": "log₁₀ of λᵢ / Σλ against i." + (" Dashed: untrained." if len(sides) > 1 else ""),
            "xlabel": "index i",
            "ylabel": "log₁₀ of the share",
            "series": series,
        },
    )
