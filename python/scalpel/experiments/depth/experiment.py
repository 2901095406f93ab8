"""Does TopK make the product of the layers' Jacobians irreversible, so that at most k directions survive?

The seed argues in steps: at most k channels are live, so rank(J) ≤ k, so the product of the layers' Jacobians is
irreversible, so the state collapses onto span(v_1 … v_k). Each step is measured by itself.

Predicted: at most k directions survive the product J_D … J_1, where k is the fewest channels that a TopK keeps.
Measured: the ranks of each layer, with and without the residual path, since a TopK bounds only what a sublayer adds;
all singular values of the product from the last token to the last; and the leading exponents (1/D) log σ_i from all
tokens to all, by alternating sweeps.
Null: "untrained" repeats the measurement on an untrained model; "rotated" gives each layer's singular values random
singular vectors (Haar), which shows what is lost if layers meet at random; "shuffled" puts the same layers in another
order. The same weights with every TopK off are shown beside them.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ...jacobians.depth.spectra import rank_bound
from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ..nulls import NULLS, check_nulls, only_beside
from ..provenance import at_least, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import bootstrap
from .cascade import (
    Cascade,
    cascades,
    effective_ranks,
    live_channels,
    product_values,
    reordered,
    rotated,
    rounding,
    short_prompts,
    stream,
    survive,
    sweep_exponents,
    without_topk,
)

QUESTION = "Does TopK make the product of the layers' Jacobians irreversible, so that at most k directions survive?"
SEED_FIGURE = "rank(h) ≤ k → irreversible Jacobian cascade → collapse h → span(v₁…v_k); no figure is given"
TOLERANCE = 1e-3  # a direction survives the product where its singular value is above this times the largest
RULE = (
    "A direction survives if its singular value in the whole product, from the last token to the last and with the "
    f"residual path, exceeds {TOLERANCE} times the largest. Let k be the fewest channels that a TopK keeps of what a "
    "block writes or of the residual. Reproduced iff at most k directions survive (upper end of the 95 % interval of "
    "the mean over prompts) and more survive in the untrained null and, with more than one layer, in the rotated null "
    "(95 % interval of the paired difference above 0); not testable if these nulls were not asked for. Not reproduced "
    "if more than k survive. Indistinguishable if at most k survive but no more do in one of these nulls: then the "
    "loss is due to the architecture, or to layers that meet at random. The shuffled null is shown and decides "
    "nothing, since the claim says nothing about the order. Not testable if no TopK acts where a block writes."
)
_TOLERANCES = (1e-1, 1e-2, TOLERANCE, 1e-6)
_FEW = 4  # prompts on which the untrained model's exponents are taken


def run(
    model: CircuitGPT,
    *,
    prompts: int = 16,
    tokens: int = 12,
    directions: int = 4,
    draws: int = 4,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """Measure ranks, surviving directions and exponents by depth, beside those of the nulls.

    Args:
        model: A CircuitGPT. Without a tokenizer, or with one that splits an answer, it gets random token ids.
        prompts: How many prompts, 2 or more.
        tokens: The most tokens in a prompt, 2 or more.
        directions: How many leading exponents are taken from all tokens to all.
        draws: Random products for each prompt, for the rotated null.
        nulls: "untrained", "rotated" and "shuffled", as the module describes them.
        seed: Seed of the prompts, of the nulls and of the resampling.

    Returns:
        A Result; ``measured["layers"]`` is the table of ranks, layer by layer.

    Raises:
        Refused: The context holds fewer than two tokens.
        ValueError: An option is out of range, or a null is unknown.
    """
    at_least(2, prompts=prompts, tokens=tokens)
    at_least(1, directions=directions, draws=draws)
    at_least(0, seed=seed)
    nulls = check_nulls(nulls)
    texts, left_out = short_prompts(model, prompts, seed, tokens)
    depth, width = model.config.n_layer, model.config.d_model
    k = live_channels(model)
    options = {"prompts": prompts, "tokens": tokens, "directions": directions, "draws": draws, "nulls": nulls}
    protocol = Protocol("depth", QUESTION, SEED_FIGURE, model_provenance(model, **options, seed=seed))
    predicted = f"at most k = {k} of {width} directions survive" if k else "nothing: no TopK acts where a block writes"
    protocol.predict({"summary": predicted, "survivors_at_most": k, "of": width, "depth": depth, "rule": RULE})
    protocol.measuring()

    rng = np.random.default_rng([seed, 71])
    own = cascades(model, texts)
    spectra = {"model": np.stack([cascade.values for cascade in own])}
    controls = {}
    if "untrained" in nulls:
        controls["untrained"] = untrained(model)
    if k is not None or model.config.afrac is not None:
        controls["topk_off"] = without_topk(model)
    of_controls = {name: cascades(other, texts, ranks=False) for name, other in controls.items()}
    for name, control_cascades in of_controls.items():
        spectra[name] = np.stack([cascade.values for cascade in control_cascades])
    if "rotated" in nulls and depth > 1:
        spectra["rotated"] = np.stack([rotated(cascade, draws, rng) for cascade in own])
    if "shuffled" in nulls and depth > 1:
        spectra["shuffled"] = np.stack([product_values(reordered(cascade.layers, rng)) for cascade in own])
    if depth == 1:
        left_out.append("The model has one layer: there is no order to shuffle, and rotating it changes no rank.")
    if k is None:
        left_out.append("No TopK acts where a block writes, so there is no k that could bound what survives.")
    survivors = {name: survive(values, TOLERANCE) for name, values in spectra.items()}
    identity = np.eye(width)
    added = np.stack([product_values([layer - identity for layer in cascade.layers]) for cascade in own])
    alone = float(survive(added, TOLERANCE).mean())
    others = {name: survivors[name] for name in nulls if name in survivors}
    interval = bootstrap(lambda at: float(survivors["model"][at].mean()), prompts, rng)
    beyond = {}
    for name, null_survivors in others.items():
        more = null_survivors - survivors["model"]
        beyond[name] = bootstrap(lambda at, more=more: float(more[at].mean()), prompts, rng)  # type: ignore[misc]

    swept = sweep_exponents(model, texts, directions, seed)
    # An untrained model's singular values are clustered near 1, so its sweeps converge slowly; fewer prompts are used.
    few = texts[:_FEW]
    swept_null = sweep_exponents(controls["untrained"], few, directions, seed) if "untrained" in controls else None
    layers = _layers_table(model, own)
    deciding = ("untrained", "rotated") if depth > 1 else ("untrained",)
    verdict = only_beside(deciding, nulls, _verdict(k, interval, beyond))
    figures = _figures(spectra, depth, swept, swept_null, layers, k, width)
    volume = np.array([cascade.log_volume for cascade in own]) / depth
    left_out.append(
        "Ranks and whole spectra are from the last token to the last; matrices from all tokens to all are never formed."
    )
    if "rotated" in spectra:
        left_out.append("The rotated null has the model's own log-volume by construction, so the two are not compared.")
    ranks = f"layers' ranks {_span(layers, 'rank')} of {width} with the residual path, {_span(layers, 'rank_added')} "
    ranks += "without it" + (f" (bound {layers[0]['bound_added']})" if layers[0]["bound_added"] else "")
    first = swept["all"]
    growth = float(swept["growth"].mean())
    return protocol.conclude(
        measured={
            "summary": f"{survivors['model'].mean():.1f} of {width} directions survive {depth} layers "
            f"(effective rank {effective_ranks(spectra['model']).mean():.1f}; {alone:.1f} without the residual path); "
            f"{ranks}; leading exponent "
            f"{first[:, 0].mean():+.2f} nats a layer, {first[:, 0].mean() - growth:+.2f} after subtracting the "
            "residual's growth",
            "k": k,
            "width": width,
            "depth": depth,
            "prompts": prompts,
            "survivors": {f"{t:g}": float(survive(spectra["model"], t).mean()) for t in _TOLERANCES},
            "share_lost": {f"{t:g}": 1 - float(survive(spectra["model"], t).mean()) / width for t in _TOLERANCES},
            "share_of_directions_that_shrink": float((spectra["model"] < 1).mean()),
            "zero_to_rounding": float((spectra["model"] <= rounding(model) * spectra["model"][:, :1]).sum(1).mean()),
            "survivors_without_the_residual_path": alone,
            "effective_rank": float(effective_ranks(spectra["model"]).mean()),
            "log_volume_per_direction_and_layer": _mean(volume / width),
            "layers": layers,
            **_exponents(swept),
            "left_out": left_out,
        },
        interval={
            "summary": f"survivors 95 % [{interval[0]:.1f}, {interval[1]:.1f}], bootstrap by prompt",
            "survivors": interval,
            "effective_rank": bootstrap(lambda at: float(effective_ranks(spectra["model"])[at].mean()), prompts, rng),
            "log_volume_per_direction_and_layer": bootstrap(lambda at: _mean(volume[at] / width), prompts, rng),
            "first_exponent_all_to_all": bootstrap(lambda at: float(first[at, 0].mean()), prompts, rng),
            "first_exponent_less_growth": bootstrap(
                lambda at: float((first[at, 0] - swept["growth"][at]).mean()), prompts, rng
            ),
            "null_minus_model": beyond,
        },
        null={
            "summary": "survivors: "
            + (
                ", ".join(
                    f"{name.replace('_', ' ')} {survivors[name].mean():.1f}" for name in survivors if name != "model"
                )
                or "no null was asked for"
            ),
            "survivors": {name: float(counts.mean()) for name, counts in survivors.items() if name != "model"},
            "effective_rank": {
                name: float(effective_ranks(v).mean()) for name, v in spectra.items() if name != "model"
            },
            "log_volume_per_direction_and_layer": {
                name: _mean(np.array([cascade.log_volume for cascade in control_cascades]) / depth / width)
                for name, control_cascades in of_controls.items()
            },
            **({"untrained_exponents": {"prompts": len(few), **_exponents(swept_null)}} if swept_null else {}),
        },
        verdict=verdict,
        figures=figures,
    )


# ---- helpers ---------------------------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float:
    """The mean; -inf if a layer is singular."""
    return float(values.mean()) if np.isfinite(values).all() else -np.inf


def _verdict(k: int | None, interval: tuple[float, float], beyond: dict[str, tuple[float, float]]) -> Verdict:
    """The verdict that RULE gives."""
    if k is None:
        return "not testable here"
    if not interval[1] <= k:
        return "not reproduced"
    deciding = [low > 0 for name, (low, _) in beyond.items() if name != "shuffled"]
    return "reproduced" if all(deciding) else "indistinguishable"


def _layers_table(model: CircuitGPT, own: list[Cascade]) -> list[dict[str, Any]]:
    """Mean ranks of each layer over the prompts, the bounds that the TopKs set, and whether these always held."""
    rows = []
    for i, (source, target) in enumerate(pairwise(stream(model))):
        ranks = {name: [cascade.ranks[i][name] for cascade in own] for name in own[0].ranks[i]}
        within = all(
            rank <= live
            for part in ("attention", "mlp")
            for rank, live in zip(ranks[f"rank_{part}"], ranks[f"live_{part}"], strict=True)
        )
        rows.append(
            {
                "layer": i,
                **{name: float(np.mean(values)) for name, values in ranks.items()},
                "bound_added": rank_bound(model, source, target, 1, False),
                "bound_with_residual_path": rank_bound(model, source, target, 1, True),
                "ranks_within_live_channels": within,
            }
        )
    return rows


def _span(rows: list[dict[str, Any]], name: str) -> str:
    low, high = (f(row[name] for row in rows) for f in (min, max))
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}–{high:.0f}"


def _exponents(swept: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over prompts of what the sweeps gave, for a Result."""
    growth, without = swept["growth"], swept["growth_without_first"]
    mean: Callable[[np.ndarray], list[float]] = lambda rows: rows.mean(axis=0).tolist()  # noqa: E731
    return {
        "exponents_all_to_all": mean(swept["all"]),
        "exponents_all_to_all_less_growth": mean(swept["all"] - growth[:, None]),
        "exponents_all_to_all_less_growth_without_position_0": mean(swept["all"] - without[:, None]),
        "exponents_last_to_last": mean(swept["last"]),
        "frame_growth": mean(swept["frame_growth"]),
        "growth_of_the_norm": float(growth.mean()),
        "growth_of_the_norm_without_position_0": float(without.mean()),
        "sweeps_converged": float(swept["converged"].mean()),
    }


def _figures(
    spectra: dict[str, np.ndarray],
    depth: int,
    swept: dict[str, np.ndarray],
    swept_null: dict[str, np.ndarray] | None,
    layers: list[dict[str, Any]],
    k: int | None,
    width: int,
) -> dict[str, Any]:
    names = {"topk_off": "TopKs off", "rotated": "rotated", "shuffled": "layers in another order"}
    series = []
    for name, values in spectra.items():
        with np.errstate(divide="ignore"):
            logs = np.log(values / values[:, :1]) / depth
        logs = np.where(np.isfinite(logs), logs, np.nan)
        entry = {"label": names.get(name, name), "x": list(range(1, width + 1)), "y": _column(np.median, logs)}
        if name == "model":
            entry |= {"low": _column(np.min, logs), "high": _column(np.max, logs)}
        series.append({**entry, "style": "line" if name == "model" else "dashed"})
    bars = [
        (f"{row['layer']}: {words}", row[name])
        for row in layers
        for words, name in (
            ("attention adds", "rank_attention"),
            ("MLP adds", "rank_mlp"),
            ("layer without residual", "rank_added"),
            ("layer", "rank"),
        )
    ]
    exponents = [
        {
            "label": label,
            "style": "points",
            "x": list(range(1, rows.shape[1] + 1)),
            "y": rows.mean(0).tolist(),
            "low": rows.min(0).tolist(),
            "high": rows.max(0).tolist(),
        }
        for label, rows in _exponent_rows(swept, swept_null)
    ]
    return {
        "survivors": {
            "kind": "curves",
            "title": "Singular values of the product of all layers, last token to last",
            "summary": "Relative to the largest value; median over prompts, with a band from the least to the most. A "
            f"direction survives above the line, which stands at {TOLERANCE}.",
            "xlabel": "rank of the direction",
            "ylabel": "(1/D) log σᵢ/σ₁ (nats a layer)",
            "series": series,
            "hlines": [{"y": float(np.log(TOLERANCE)) / depth, "label": "lost below"}],
            "vlines": [{"x": k, "label": f"k = {k}"}] if k else [],
        },
        "ranks": {
            "kind": "bars",
            "title": "Ranks of the layers' Jacobians, last token to last",
            "summary": "A TopK bounds the rank of what a sublayer adds. The identity of the residual path keeps the "
            "layer itself at full rank.",
            "ylabel": "numerical rank, mean over prompts",
            "labels": [label for label, _ in bars],
            "values": [value for _, value in bars],
            "reference": [*([{"y": k, "label": f"k = {k}"}] if k else []), {"y": width, "label": f"width {width}"}],
        },
        "exponents": {
            "kind": "curves",
            "title": "Leading exponents from all tokens to all, minus the growth of the residual's norm",
            "summary": "Points are means over prompts, bars run from the least to the most. Above 0 a direction grows "
            "faster than the state itself.",
            "xlabel": "i",
            "ylabel": "(1/D) log σᵢ − growth (nats a layer)",
            "series": exponents,
        },
    }


def _column(function: Callable[..., np.ndarray], rows: np.ndarray) -> list[float]:
    column: list[float] = function(rows, axis=0).tolist()
    return column


def _exponent_rows(
    swept: dict[str, np.ndarray], swept_null: dict[str, np.ndarray] | None
) -> list[tuple[str, np.ndarray]]:
    rows = [
        ("model", swept["all"] - swept["growth"][:, None]),
        ("model, growth without position 0", swept["all"] - swept["growth_without_first"][:, None]),
    ]
    if swept_null is not None:
        rows.append(("untrained", swept_null["all"] - swept_null["growth"][:, None]))
    return rows
