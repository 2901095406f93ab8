"""Does iterating a model end at an anchor, and is the anchor the first principal component?

Two maps can be iterated. *Blocks on their own output*, x ↦ r Π(x)/‖Π(x)‖, since without the division the norm grows and
nothing is fixed: from random directions and from prompts' residuals, for the whole stack on one position and on a
sequence, and for each block by itself. Where a direction is fixed, the spectral radius of the derivative along the
sphere says whether it attracts. *Greedy decoding* over a sliding window with positions reset, a map on finitely many
states: index and period by prompt; with the context that grows, periods are only apparent.

The anchor (where there is none, the first principal direction of where the orbits ended) is compared with the
components of the activations and of the gradients at the map's exit. Nulls: *untrained*, all of it on an untrained
model; *rotated*, random directions in the anchor's place; *shuffled*, the anchor's entries exchanged between channels,
and for decoding the prompts' tokens in another order. Beside them the same weights with every TopK off.
"""

from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...semigroup.greedy import GreedyOrbits, apparent_period, decode, greedy_orbits
from ..depth.cascade import short_prompts, without_topk
from ..nulls import NULLS, check_nulls, only_beside
from ..provenance import at_least, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import bootstrap, discoveries
from .figures import orbit_figures
from .first_component import closeness, moments_at
from .settling import Settling, settling

QUESTION = "Does iterating the model end at one anchor from everywhere, and is it the first principal component?"
SEED_FIGURE = "for any reasoning system, iterating Π converges to an anchor A; first component = prior anchor (71.2 %)"
ALONG = 0.5  # of the anchor's squared length must lie along the first component
RULE = (
    "Reproduced iff all of this holds: at one of the radii the normalised stack of blocks takes every start to one "
    "direction up to sign, with a spectral radius below 1 there, on one position and on a sequence alike; that "
    "direction is the first component of the activations (nearer to it than to any other, more than "
    f"{ALONG:g} of its squared length along it at the lower end of the 95 % interval over prompts, and beyond the "
    "rotated and the shuffled null, by Benjamini and Hochberg at 0.05); and greedy decoding ends in one and the same "
    "token from every prompt. Indistinguishable where the untrained model does all of this too. Not testable where all "
    "of this holds but for orbits of decoding that didn't close within the steps allowed and those that did end in one "
    "token, or where it holds but a null wasn't asked for. Not reproduced otherwise: the blocks' orbits are given the "
    "iterations that are said, and no more."
)
MOST_RADIUS = 10_000
_APPARENT = 32  # tokens decoded with the whole context


def run(
    model: CircuitGPT,
    *,
    prompts: int = 24,
    window: int = 24,
    steps: int = 256,
    radii: tuple[int, ...] = (1, 10),
    starts: int = 6,
    iterations: int = 250,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """Orbits of ``model``'s blocks and of its greedy decoding, from ``prompts`` prompts.

    ``window``: tokens that the state of decoding holds; ``steps``: the most that are decoded; ``radii``: norms r of
    the iterated residual; ``starts``: as many random directions and as many prompts are iterated, ``iterations`` times.
    """
    at_least(2, prompts=prompts, window=window, starts=starts)
    at_least(1, steps=steps, iterations=iterations)
    at_least(0, seed=seed)
    nulls = check_nulls(nulls)
    if not radii or not 1 <= min(radii) <= max(radii) <= MOST_RADIUS:
        raise ValueError(
            f"radii are {tuple(radii)}; give one or more, each from 1 to {MOST_RADIUS}: beyond, a step hardly turns "
            "anything, and all would seem to stand still"
        )
    window = min(window, model.config.block_size)
    texts, left_out = short_prompts(model, prompts, seed, window)
    options = {"prompts": prompts, "window": window, "steps": steps, "radii": radii, "starts": starts}
    provenance = model_provenance(model, **options, iterations=iterations, nulls=nulls, seed=seed)
    protocol = Protocol("orbits", QUESTION, SEED_FIGURE, provenance)
    protocol.predict(
        {
            "summary": "every start settles on one direction, which attracts and is the first component; every prompt "
            "decodes into one token",
            "settled": 1.0,
            "directions": 1,
            "spectral_radius_below": 1.0,
            "cos_with_first_component": 1.0,
            "period": 1,
            "distinct_cycles": 1,
            "rule": RULE,
        }
    )
    protocol.measuring()

    rng = np.random.default_rng([seed, 81])
    settle: dict[str, Any] = {"radii": radii, "starts": starts, "iterations": iterations, "seed": seed}
    models = {"model": model}
    if "untrained" in nulls:
        models["untrained"] = untrained(model)
    if model.config.afrac is not None:
        models["TopKs off"] = without_topk(model)
    maps = {name: settling(each, texts, layers=name == "model", **settle) for name, each in models.items()}
    near = {name: _near(each, texts, maps[name], rng) for name, each in models.items()}
    decoded = {
        name: greedy_orbits(each, texts, window, steps=steps) for name, each in models.items() if name != "TopKs off"
    }
    if "shuffled" in nulls:
        mixed = [[*text[:1], *rng.permutation(text[1:]).tolist()] for text in texts]
        decoded["shuffled"] = greedy_orbits(model, mixed, window, steps=steps)
    ends = {name: decoding(found, rng) for name, found in decoded.items()}
    _significance(near["model"], nulls)
    if "untrained" in near:
        _significance(near["untrained"], nulls)
    left_out += _left_out(models, nulls)
    apparent = _apparent(model, texts, left_out)

    parts = {name: conditions(maps[name], near[name], ends[name], nulls) for name in models if name in ends}
    verdict = only_beside(NULLS, nulls, _verdict(parts, ends["model"]))
    if ends["model"]["closed"] < 1:
        share = 1 - ends["model"]["closed"]
        left_out.append(f"{share:.0%} of the orbits of decoding didn't close within {steps} steps; raise 'steps'.")
    stack, first, end = maps["model"][0], near["model"][0]["activations"], ends["model"]
    low, high = first["interval"]
    return protocol.conclude(
        measured={
            "summary": f"{_settled_words(maps['model'][:2])}; |cos| with the first component {first['cos']:.2f} "
            f"(which holds {first['share']:.0%}); decoding: {_end_words(end)}",
            "parts": parts["model"],
            "maps": [{"map": one.unit, "radii": one.rows} for one in maps["model"]],
            "first_component": near["model"],
            "norm_grows_to": {one.unit: float(np.median(one.growth[-1])) for one in maps["model"]},
            "norm_grows_in_steps": len(stack.growth) - 1,
            "decoding": end,
            "apparent": apparent,
            "left_out": left_out,
        },
        interval={
            "summary": f"|cos| 95 % [{low:.2f}, {high:.2f}], share of prompts that end in one token "
            f"[{end['one_token_interval'][0]:.0%}, {end['one_token_interval'][1]:.0%}], bootstrap by prompt",
            "cos_with_first_component": first["interval"],
            "decoding": {name: value for name, value in end.items() if name.endswith("_interval")},
        },
        null={
            "summary": _null_words(maps, near, ends),
            "parts": {name: found for name, found in parts.items() if name != "model"},
            "maps": {
                name: [{"map": one.unit, "radii": one.rows} for one in found]
                for name, found in maps.items()
                if name != "model"
            },
            "first_component": {name: found for name, found in near.items() if name != "model"},
            "decoding": {name: found for name, found in ends.items() if name != "model"},
        },
        verdict=verdict,
        figures=orbit_figures(maps, near, decoded, radii[0]),
    )


def conditions(
    maps: list[Settling], near: list[dict[str, Any]], end: dict[str, Any], nulls: tuple[str, ...]
) -> dict[str, bool]:
    """The parts of RULE, each true or false."""
    first = near[0]["activations"]
    beyond = all(first.get(f"beyond_{name}", False) for name in ("rotated", "shuffled") if name in nulls)
    return {
        "anchor_on_one_position": maps[0].has_anchor,
        "anchor_on_a_sequence": maps[1].has_anchor,
        "anchor_is_first_component": bool(
            first["nearest"] == 0 and first["interval"][0] ** 2 > ALONG and beyond and maps[0].has_anchor
        ),
        "decoding_ends_in_one_token": end["closed"] == 1 and end["one_token"] == 1 and end["distinct_cycles"] == 1,
    }


def _verdict(parts: dict[str, dict[str, bool]], end: dict[str, Any]) -> Verdict:
    """The verdict by RULE."""
    own = dict(parts["model"])
    decoded = own.pop("decoding_ends_in_one_token")
    if not all(own.values()):
        return "not reproduced"
    if decoded:
        return "indistinguishable" if all(parts.get("untrained", {"": False}).values()) else "reproduced"
    contradicted = end["one_token"] < end["closed"] or end["distinct_cycles"] > 1
    return "not reproduced" if contradicted else "not testable here"


def decoding(found: GreedyOrbits, rng: np.random.Generator) -> dict[str, Any]:
    """Index, period and cycles over prompts, with 95 % bootstrap intervals; medians are of the closed orbits.

    ``distinct_cycles``' interval only goes down from the count: prompts drawn again hold fewer cycles.
    """
    names = list(dict.fromkeys(found.cycles))
    cycle = np.array([names.index(each) if each else -1 for each in found.cycles])

    def middle(values: np.ndarray, at: np.ndarray) -> float:
        kept = at[found.closed[at]]
        return float(np.median(values[kept])) if kept.size else float("nan")

    def commonest(at: np.ndarray) -> float:
        kept = cycle[at][cycle[at] >= 0]
        return float(np.bincount(kept).max() / len(at)) if kept.size else 0.0

    statistics = {
        "closed": lambda at: float(found.closed[at].mean()),
        "one_token": lambda at: float((found.period[at] == 1).mean()),
        "median_index": lambda at: middle(found.index, at),
        "median_period": lambda at: middle(found.period, at),
        "distinct_cycles": lambda at: float(len(set(cycle[at][cycle[at] >= 0].tolist()))),
        "in_the_commonest_cycle": commonest,
    }
    whole = np.arange(len(cycle))
    values: dict[str, Any] = {name: of(whole) for name, of in statistics.items()}
    values |= {f"{name}_interval": bootstrap(of, len(cycle), rng) for name, of in statistics.items()}
    return {
        **values,
        "window": found.window,
        "steps": found.steps,
        "index": found.index.tolist(),
        "period": found.period.tolist(),
    }


def _near(
    model: CircuitGPT, texts: list[list[int]], maps: list[Settling], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """For each map on one position: how near its axis is to the components at the map's exit."""
    rows = []
    for one in maps:
        if one.positions > 1:
            continue
        last = one.layer is None or one.layer == model.config.n_layer - 1
        hook = "final_resid" if last else f"{(one.layer or 0) + 1}.resid_in"
        moments = moments_at(model, texts, hook)
        row: dict[str, Any] = {"map": one.unit, "hook": hook, "settled": one.has_anchor}
        rows.append(row | {name: closeness(one.axis, of, rng) for name, of in moments.items()})
    return rows


def _significance(rows: list[dict[str, Any]], nulls: tuple[str, ...]) -> None:
    """``beyond_rotated`` and ``beyond_shuffled`` of every comparison, corrected for all of them together."""
    tests = [
        (row[stream], name)
        for row in rows
        for stream in ("activations", "gradients")
        for name in ("rotated", "shuffled")
        if name in nulls
    ]
    found = discoveries(np.array([of[f"p_{name}"] for of, name in tests]))
    for (of, name), significant in zip(tests, found, strict=True):
        of[f"beyond_{name}"] = bool(significant)


def _apparent(model: CircuitGPT, texts: list[list[int]], left_out: list[str]) -> dict[str, Any]:
    """Periods that decoding with the whole context seems to have."""
    steps = min(_APPARENT, model.config.block_size - max(map(len, texts)))
    if steps < 8:
        left_out.append("The context leaves no room to decode with all of it, so no apparent periods are shown.")
        return {}
    whole = decode(model, texts, model.config.block_size, steps)
    found = [apparent_period(row[len(text) :]) for row, text in zip(whole, texts, strict=True)]
    periods = [each[1] for each in found if each]
    return {
        "steps": steps,
        "repeat_themselves": len(periods) / len(texts),
        "one_token": sum(period == 1 for period in periods) / len(texts),
        "periods": [each[1] if each else 0 for each in found],
    }


def _left_out(models: dict[str, CircuitGPT], nulls: tuple[str, ...]) -> list[str]:
    notes = []
    if "rotated" in nulls:
        notes.append("The rotated null has no meaning for decoding, whose states are tokens.")
    if "TopKs off" not in models:
        notes.append("The model has no TopK, so there is none to turn off.")
    return notes


def _settled_words(maps: list[Settling]) -> str:
    words = []
    for one in maps:
        best = one.best
        said = f"{one.unit}: {best['settled']:.0%} of the starts settle"
        if best["directions"]:
            said += f", on {best['directions']} direction{'s' * (best['directions'] > 1)}, "
            said += f"spectral radius {best['spectral_radius']:.2f} (r = {best['radius']})"
        words.append(said)
    return "; ".join(words)


def _end_words(end: dict[str, Any]) -> str:
    if not end["closed"]:
        return f"no prompt's orbit closes within {end['steps']} steps"
    return (
        f"{end['closed']:.0%} of prompts close, {end['one_token']:.0%} on one token, into {end['distinct_cycles']:.0f} "
        f"different cycles after a median of {end['median_index']:.0f} steps"
    )


def _null_words(
    maps: dict[str, list[Settling]], near: dict[str, list[dict[str, Any]]], ends: dict[str, dict[str, Any]]
) -> str:
    words = [
        f"{name}: {_settled_words(found[:1])}, |cos| {near[name][0]['activations']['cos']:.2f}"
        for name, found in maps.items()
        if name != "model"
    ]
    first = near["model"][0]["activations"]
    words.append(f"random directions: |cos| below {first['random']:.2f} in 95 %")
    words += [f"{name} decoding: {_end_words(end)}" for name, end in ends.items() if name != "model"]
    return "; ".join(words)
