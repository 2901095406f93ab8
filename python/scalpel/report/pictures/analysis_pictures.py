"""What an analysis shows: its figures as the data of curves."""

import math
from typing import TYPE_CHECKING, Any

from .figures import Picture
from .spectra_pictures import spectra_pictures

if TYPE_CHECKING:
    from ...analysis import Analysis

__all__ = ["pictures"]

Leaf = dict[str, Any]  # mean, low and high, lists of one shape
_PARTS = ("mean", "low", "high")
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_ONE = -1e-9  # log 1, but below zero: an axis from 0 to 1 is one of shares
_ALIKE = 0.005  # active fractions that no eye tells apart
_DENSE = 0.9995  # an active fraction above this is no sparsity worth a curve


def pictures(analysis: "Analysis") -> list[Picture]:
    """All that the analysis has figures for."""
    count = len(analysis.chunks)
    bands = (
        f" Mean over {count} chunks; bands: its 95 % interval (Student’s t)."
        if count > 1
        else " One chunk, no interval."
    )
    sides = [("", "line", analysis.trained)]
    if analysis.untrained is not None:
        sides.append((" untrained", "dashed", analysis.untrained))
    pictures = [
        *_collapse(sides, bands),
        *_growth(sides, bands),
        *_ranks(sides, count),
        *spectra_pictures(analysis.spectra),
        *_active(analysis.trained, bands),
        *_margins(analysis.trained, count),
    ]
    return [picture for picture in pictures if picture.figure["series"]]


Sides = list[tuple[str, str, dict[str, Any]]]


def _picture(name: str, part: str, title: str, summary: str, axes: tuple[str, str], **data: Any) -> Picture:
    if part in ("collapse", "growth") and any(y is None for curve in data["series"] for y in curve["y"]):
        summary += " A gap: in some chunk the value is zero to rounding, and its logarithm has no mean."
    figure = {"kind": "curves", "title": title, "summary": summary, "xlabel": axes[0], "ylabel": axes[1]}
    return Picture(name, part, figure | data)


def _curve(label: str, x: list[int], leaf: Leaf, style: str, group: str) -> dict[str, Any]:
    curve = {"label": label, "x": x, "y": leaf["mean"], "style": style, "group": group}
    known = any(value is not None for value in leaf["low"])
    return curve | ({"low": leaf["low"], "high": leaf["high"]} if known else {})


def _column(leaf: Leaf, i: int) -> Leaf:
    return {part: [row[i] for row in leaf[part]] for part in _PARTS}


def _log10(leaf: Leaf) -> Leaf:
    """From natural logarithms."""
    return {part: [None if v is None else v / math.log(10) for v in leaf[part]] for part in _PARTS}


def _after_nothing(leaf: Leaf) -> Leaf:
    """With depth 0 in front, where nothing is stretched yet: exact, and without an interval."""
    return {part: [0.0, *leaf[part]] for part in _PARTS}


def _sigma(i: int) -> str:
    return "σ" + str(i + 1).translate(_SUBSCRIPT)


def _shown(T: int) -> list[int]:
    """Which of T singular values are drawn: the first, the last, and one between."""
    return sorted({0, round(math.sqrt(T)) - 1, T - 1})


# ---- the parts -----------------------------------------------------------------------------------


def _collapse(sides: Sides, bands: str) -> list[Picture]:
    products: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for suffix, style, side in sides:
        T, D = len(side["layers"]["log_singular_values"]["mean"][0]), len(side["log_norms"]["mean"]) - 1
        for i in _shown(T):
            leaf = _log10(_column(side["layers"]["log_singular_values"], i))
            label = _sigma(i)
            layers.append(_curve(label + suffix, list(range(1, D + 1)), leaf, style, label))
            if "products" in side:
                leaf = _log10(_column(side["products"]["log_singular_values"], i))
                depths = [0, *side["products"]["depths"]]
                products.append(_curve(label + suffix, depths, _after_nothing(leaf), style, label))
        last_layer = {part: side["layers"]["log_singular_values"][part][-1] for part in _PARTS}
        last = (
            {part: side["products"]["log_singular_values"][part][-1] for part in _PARTS} if "products" in side else {}
        )
        name = suffix.strip() or "trained"
        if last:
            ends.append(_curve(f"all layers, {name}", list(range(1, T + 1)), _log10(last), style, "all"))
        ends.append(_curve(f"last layer, {name}", list(range(1, T + 1)), _log10(last_layer), style, "last"))
    kept = [{"y": _ONE, "label": "length kept"}]
    dashed = " Dashed: untrained." if len(sides) > 1 else ""
    return [
        _picture(
            "collapse-depth",
            "collapse",
            "Jacobian collapse: singular values of the first layers’ product, by depth",
            f"log₁₀ σᵢ of Jₗ … J₁{_at_depths(sides)}; at depth 0 every one is 1.{dashed}{bands}",
            ("layers passed", "log₁₀ of the singular value"),
            series=products,
            hlines=[{"y": _ONE, "label": ""}],  # a name would lie on the curves, which all start there
        ),
        _picture(
            "collapse-layers",
            "collapse",
            "Singular values of each layer by itself",
            f"log₁₀ σᵢ of one layer, its identity path included.{dashed}{bands}",
            ("layer", "log₁₀ of the singular value"),
            series=layers,
            hlines=kept,
        ),
        _picture(
            "collapse-spectrum",
            "collapse",
            "The leading spectrum in full",
            f"log₁₀ σᵢ against i{', of the product of all layers and of the last layer' if products else ''}."
            f"{dashed}{bands}",
            ("index i", "log₁₀ of the singular value"),
            series=ends,
            hlines=kept,
        ),
    ]


def _at_depths(sides: Sides) -> str:
    """Name the depths where they are not all depths."""
    depths = sides[0][2].get("products", {}).get("depths", [])
    if len(depths) == len(sides[0][2]["log_norms"]["mean"]) - 1:
        return ""
    return f", measured at l = {', '.join(map(str, depths))}"


def _growth(sides: Sides, bands: str) -> list[Picture]:
    exponents: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    norms: list[dict[str, Any]] = []
    turned: list[dict[str, Any]] = []
    for suffix, style, side in sides:
        name = suffix.strip() or "trained"
        pairs = (("log_norms", "all positions", "all"), ("log_norms_without_first", "without position 0", "rest"))
        for key, words, group in pairs:
            if side.get(key) is not None:
                leaf = _log10(side[key])
                norms.append(_curve(f"{words}, {name}", list(range(len(leaf["mean"]))), leaf, style, group))
        if "exponents" not in side:
            leaf = side["mean_frame_growth"]
            frames.append(_curve(name, list(range(1, len(leaf["mean"]) + 1)), leaf, style, "frame"))
            continue
        x = list(range(1, len(side["exponents"]["mean"]) + 1))
        for key, words, group in (
            ("exponents_less_growth", "less all positions’ growth", "all"),
            ("exponents_less_growth_without_first", "less growth without position 0", "rest"),
        ):
            if side.get(key) is not None:
                exponents.append(_curve(f"{words}, {name}", x, side[key], style, group))
        aligned = side["alignment"]
        for key, words in (("exponents", "vectors as they are"), ("null_exponents", "vectors at random")):
            turned.append(_curve(f"{words}, {name}", x, aligned[key], style, words))
    dashed = " Dashed: untrained." if len(sides) > 1 else ""
    return [
        _picture(
            "exponents",
            "growth",
            "Exponents of the product of all layers, less the growth of the residual’s norm",
            f"Above zero, a change grows faster than the state does.{dashed}{bands}",
            ("index i", "nats per layer"),
            series=exponents,
            hlines=[{"y": _ONE, "label": "grows as the state does"}],
        ),
        _picture(
            "frame-growth",
            "growth",
            "Growth of a random frame on its way through all layers",
            "Mean over the layers of log |Rᵢᵢ|, one forward pass. At a finite depth these are not the exponents, and "
            f"need not be near.{bands}",
            ("i, in the order of the frame", "nats per layer"),
            series=frames,
            hlines=[{"y": _ONE, "label": "length kept"}],
        ),
        _picture(
            "norms",
            "growth",
            "Norm of the residual stream",
            f"Over all tokens of a chunk.{dashed}{bands}",
            ("layers passed", "log₁₀ of the norm"),
            series=norms,
            hlines=_unless_shares(norms),
        ),
        _picture(
            "alignment",
            "growth",
            "Do successive layers stretch the same directions?",
            "Exponents of the layers cut to their leading directions, with singular vectors as they are, and with the "
            "same singular values and random vectors; cut layers are not the layers, and where the cut falls between "
            "values that are close, it matters. Random vectors are a weak null: residual paths alone align layers. "
            f"What training does is the step from the untrained model’s pair to the trained one’s.{dashed}{bands}",
            ("index i", "nats per layer"),
            series=turned,
        ),
    ]


def _ranks(sides: Sides, count: int) -> list[Picture]:
    pictures = []
    over = f"the mean over {count} chunks of either end" if count > 1 else "of one chunk"
    for kind, title in (("stable", "Stable rank"), ("effective", "Effective rank")):
        for where, words in (("products", "of the first layers’ product, by depth"), ("layers", "of each layer")):
            series = []
            for suffix, style, side in sides:
                if where not in side:
                    continue
                leaf = side[where][f"{kind}_rank_estimated"]["mean"]
                low, high = ([_log_of(row[end]) for row in leaf] for end in (0, 1))
                x = side[where]["depths"] if where == "products" else list(range(1, len(leaf) + 1))
                name = suffix.strip() or "trained"
                apart = max(
                    ((b - a) for a, b in zip(low, high, strict=True) if a is not None and b is not None), default=0
                )
                most = {"label": f"{name}, at most" if apart > 0.02 else name, "x": x, "y": high}
                series.append(most | {"style": style, "group": name})
                if apart > 0.02:
                    least = {"label": f"{name}, at least", "x": x, "y": low, "style": style, "group": name}
                    series.append(least)
            rule = (
                "Σσ² / σ₁²; both ends rest on the estimate of the unseen energy, three standard errors either side"
                if kind == "stable"
                else "exp of the entropy of σ / Σσ; the lower end is certain, the upper one rests on the estimate of "
                "the unseen energy plus three standard errors"
            )
            picture = _picture(
                f"rank-{kind}-{where}",
                "rank",
                f"{title} {words}",
                f"{rule}. Interval: {over}; ends less than 5 % apart are one curve, the upper.",
                ("layers passed" if where == "products" else "layer", "log₁₀ of the rank"),
                series=series,
                hlines=_unless_shares(series),
            )
            if where == "products" or "products" not in sides[0][2]:
                pictures.append(picture)
    return pictures


def _unless_shares(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line at 1 where the logarithms would be taken for shares of one."""
    known = [y for curve in series for y in curve["y"] if y is not None]
    return [{"y": _ONE, "label": "1"}] if known and min(known) >= 0 and max(known) <= 1 else []


def _log_of(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 else None


def _by_layer(hooks: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """{"attn.q": {0: …, 1: …}} of {"0.attn.q": …}; what belongs to no layer is left out."""
    by_kind: dict[str, dict[int, Any]] = {}
    for hook, value in hooks.items():
        layer, _, kind = hook.partition(".")
        if layer.isdecimal():
            by_kind.setdefault(kind, {})[int(layer)] = value
    return by_kind


def _at_layers(values: dict[int, Leaf]) -> Leaf:
    return {part: [values[layer][part] for layer in values] for part in _PARTS}


def _active(trained: dict[str, Any], bands: str) -> list[Picture]:
    alike: list[tuple[list[str], list[int], Leaf]] = []  # hooks whose curves would hide each other share one
    for kind, values in _by_layer(trained["active"]).items():
        x, leaf = [layer + 1 for layer in values], _at_layers(values)
        if min(leaf["mean"]) >= _DENSE:
            continue
        for kinds, known, other in alike:
            if x == known and all(abs(a - b) < _ALIKE for a, b in zip(leaf["mean"], other["mean"], strict=True)):
                kinds.append(kind)
                break
        else:
            alike.append(([kind], x, leaf))
    series, words = [], ["Hooks that are dense everywhere are left out."]
    for kinds, x, leaf in alike:
        label = kinds[0] if len(kinds) == 1 else f"{kinds[0]} and {len(kinds) - 1} more"
        series.append(_curve(label, x, leaf, "line", kinds[0]))
        if len(kinds) > 1:
            words.append(f"Within {_ALIKE} of {kinds[0]}, and drawn as it: {', '.join(kinds[1:])}.")
    axes = ("layer", "share of entries that are not zero")
    title = "Active fractions of the trained model"
    return [_picture("active", "masks", title, " ".join(words) + bands, axes, series=series)]


def _margins(trained: dict[str, Any], count: int) -> list[Picture]:
    pictures = []
    over = f", mean over {count} chunks" if count > 1 else ""
    kinds = (
        ("median", "relative_median", "in the median token row", "Half of the rows have less."),
        ("quantile", "relative_quantile_5", "in the tightest rows", "The 5 % quantile: one row in twenty has less."),
    )
    for name, key, title, words in kinds:
        series = []
        for kind, values in _by_layer(trained["margins"]).items():
            x = [layer + 1 for layer in values]
            y = [_log_of(value[key]["mean"]) for value in values.values()]
            series.append({"label": kind, "x": x, "y": y, "style": "line", "group": kind})
        words += (
            f" Over the smallest magnitude kept{over}; a margin of 0, a tie, leaves a gap. Absolute margins are in "
        )
        words += "analysis.json."
        axes = ("layer", "log₁₀ of the relative margin")
        title = f"Margins of the trained model’s TopKs, {title}"
        pictures.append(_picture(f"margins-{name}", "masks", title, words, axes, series=series))
    return pictures
