"""Does iterating a model end at one anchor from everywhere, and is that anchor the first principal component?

Two maps are iterated. *Blocks on their own output*: x ↦ r Π(x)/‖Π(x)‖, where the division is needed because the norm
grows otherwise and nothing is fixed. This is done for the whole stack on one position and on a sequence, and for each
block by itself. *Greedy decoding* over a sliding window whose positions are reset: a map on finitely many states, so
that every prompt has an index and a period. While the context still grows, a period is only apparent.

Predicted: every start of the blocks settles on one direction, which attracts (spectral radius below 1 along the sphere)
and is the first component; every prompt decodes into one and the same token.
Measured: the share of starts that settle, from random directions and from prompts' residuals; |cos| of the anchor with
the components of activations and of gradients where the map ends; and index and period of decoding by prompt. If there
is no anchor, the first principal direction of where the orbits ended takes its place.
Null: "untrained" repeats everything on an untrained model; "rotated" puts random directions in the anchor's place;
"shuffled" exchanges the anchor's entries between channels and, for decoding, the tokens of each prompt. The same
weights with every TopK off are shown beside them.
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
ALONG = 0.5  # share of the anchor's squared length that must lie along the first component
RULE = (
    "Reproduced iff three things hold. (1) At some radius the normalised stack of blocks takes every start to one "
    "direction up to sign, with a spectral radius below 1 there, both on one position and on a sequence. (2) That "
    "direction is the first component of the activations: it is nearer to it than to any other, more than "
    f"{ALONG:g} of its squared length lies along it at the lower end of the 95 % interval over prompts, and it is "
    "nearer than the rotated and the shuffled null, by Benjamini and Hochberg at 0.05. (3) Greedy decoding ends in one "
    "and the same token from every prompt. Indistinguishable if the untrained model does all of this too. Not testable "
    "if only (3) is open, because some orbits of decoding didn't close within the allowed steps and the others end in "
    "one token, or if all three hold but a null was not asked for. Not reproduced otherwise. Orbits of the blocks get "
    "the stated iterations and no more."
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
    """Iterate a model's blocks and its greedy decoding, and compare where they end with the first component.

    Args:
        model: A CircuitGPT. Without a tokenizer, or with one that splits an answer, it gets random token ids.
        prompts: How many prompts, 2 or more.
        window: Tokens in the window that is the state of decoding; at most the context is used.
        steps: The most tokens that are decoded.
        radii: Norms r to which the residual is scaled at every step, each from 1 to 10,000.
        starts: How many random directions, and as many prompts, the blocks are iterated from.
        iterations: The most steps of the blocks' iteration.
        nulls: "untrained", "rotated" and "shuffled", as the module describes them.
        seed: Seed of the prompts, of the starts, of the nulls and of the resampling.

    Returns:
        A Result; ``measured["parts"]`` says which conditions of RULE hold.

    Raises:
        Refused: The context holds fewer than two tokens, or a state of the iteration becomes zero or not finite.
        ValueError: An option is out of range, or a null is unknown.
    """
    at_least(2, prompts=prompts, window=window, starts=starts)
    at_least(1, steps=steps, iterations=iterations)
    at_least(0, seed=seed)
    nulls = check_nulls(nulls)
    if not radii or not 1 <= min(radii) <= max(radii) <= MOST_RADIUS:
        raise ValueError(
            f"radii are {tuple(radii)}; give one or more, each from 1 to {MOST_RADIUS}: at larger ones a step hardly "
            "turns the state, so that everything would seem to stand still"
        )
    window = min(window, model.config.block_size)
    texts, left_out = short_prompts(model, prompts, seed, window)
    options = {"prompts": prompts, "window": window, "steps": steps, "radii": radii, "starts": starts}
    provenance = model_provenance(model, **options, iterations=iterations, nulls=nulls, seed=seed)
    protocol = Protocol("orbits", QUESTION, SEED_FIGURE, provenance)
    protocol.predict(
        {
            "summary": "every start settles on one direction, which attracts and is the first component; every prompt "
            "decodes into the same token",
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
    maps = {name: settling(other, texts, layers=name == "model", **settle) for name, other in models.items()}
    near = {name: _near(other, texts, maps[name], rng) for name, other in models.items()}
    decoded = {
        name: greedy_orbits(other, texts, window, steps=steps) for name, other in models.items() if name != "TopKs off"
    }
    if "shuffled" in nulls:
        mixed = [[*text[:1], *rng.permutation(text[1:]).tolist()] for text in texts]
        decoded["shuffled"] = greedy_orbits(model, mixed, window, steps=steps)
    ends = {name: decoding(orbits, rng) for name, orbits in decoded.items()}
    _significance(near["model"], nulls)
    if "untrained" in near:
        _significance(near["untrained"], nulls)
    left_out += _left_out(models, nulls)
    apparent = _apparent(model, texts, left_out)

    parts = {name: conditions(maps[name], near[name], ends[name], nulls) for name in models if name in ends}
    verdict = only_beside(NULLS, nulls, _verdict(parts, ends["model"]))
    if ends["model"]["closed"] < 1:
        share = 1 - ends["model"]["closed"]
        left_out.append(
            f"{share:.0%} of the orbits of decoding didn't close within {steps} steps; raise the option 'steps'."
        )
    stack, first, end = maps["model"][0], near["model"][0]["activations"], ends["model"]
    low, high = first["interval"]
    return protocol.conclude(
        measured={
            "summary": f"{_settled_words(maps['model'][:2])}; |cos| with the first component {first['cos']:.2f} "
            f"(which holds {first['share']:.0%}); decoding: {_end_words(end)}",
            "parts": parts["model"],
            "maps": [{"map": settled.unit, "radii": settled.rows} for settled in maps["model"]],
            "first_component": near["model"],
            "norm_grows_to": {settled.unit: float(np.median(settled.growth[-1])) for settled in maps["model"]},
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
            "parts": {name: holds for name, holds in parts.items() if name != "model"},
            "maps": {
                name: [{"map": settled.unit, "radii": settled.rows} for settled in of_model]
                for name, of_model in maps.items()
                if name != "model"
            },
            "first_component": {name: rows for name, rows in near.items() if name != "model"},
            "decoding": {name: orbits for name, orbits in ends.items() if name != "model"},
        },
        verdict=verdict,
        figures=orbit_figures(maps, near, decoded, radii[0]),
    )


def conditions(
    maps: list[Settling], near: list[dict[str, Any]], end: dict[str, Any], nulls: tuple[str, ...]
) -> dict[str, bool]:
    """Whether each condition of RULE holds."""
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
    """The verdict that RULE gives."""
    own = dict(parts["model"])
    decoded = own.pop("decoding_ends_in_one_token")
    if not all(own.values()):
        return "not reproduced"
    if decoded:
        return "indistinguishable" if all(parts.get("untrained", {"": False}).values()) else "reproduced"
    contradicted = end["one_token"] < end["closed"] or end["distinct_cycles"] > 1
    return "not reproduced" if contradicted else "not testable here"


def decoding(orbits: GreedyOrbits, rng: np.random.Generator) -> dict[str, Any]:
    """Index, period and cycles over prompts, with 95 % bootstrap intervals. Medians are over the closed orbits.

    The interval of ``distinct_cycles`` never exceeds the count itself, since resampled prompts hold no new cycles.
    """
    names = list(dict.fromkeys(orbits.cycles))
    cycle = np.array([names.index(tokens) if tokens else -1 for tokens in orbits.cycles])

    def middle(values: np.ndarray, at: np.ndarray) -> float:
        kept = at[orbits.closed[at]]
        return float(np.median(values[kept])) if kept.size else float("nan")

    def commonest(at: np.ndarray) -> float:
        kept = cycle[at][cycle[at] >= 0]
        return float(np.bincount(kept).max() / len(at)) if kept.size else 0.0

    statistics = {
        "closed": lambda at: float(orbits.closed[at].mean()),
        "one_token": lambda at: float((orbits.period[at] == 1).mean()),
        "median_index": lambda at: middle(orbits.index, at),
        "median_period": lambda at: middle(orbits.period, at),
        "distinct_cycles": lambda at: float(len(set(cycle[at][cycle[at] >= 0].tolist()))),
        "in_the_commonest_cycle": commonest,
    }
    whole = np.arange(len(cycle))
    values: dict[str, Any] = {name: statistic(whole) for name, statistic in statistics.items()}
    values |= {f"{name}_interval": bootstrap(statistic, len(cycle), rng) for name, statistic in statistics.items()}
    return {
        **values,
        "window": orbits.window,
        "steps": orbits.steps,
        "index": orbits.index.tolist(),
        "period": orbits.period.tolist(),
    }


def _near(
    model: CircuitGPT, texts: list[list[int]], maps: list[Settling], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """For each map on one position, how near its axis is to the components where the map ends."""
    rows = []
    for settled in maps:
        if settled.positions > 1:
            continue
        last = settled.layer is None or settled.layer == model.config.n_layer - 1
        hook = "final_resid" if last else f"{(settled.layer or 0) + 1}.resid_in"
        moments = moments_at(model, texts, hook)
        row: dict[str, Any] = {"map": settled.unit, "hook": hook, "settled": settled.has_anchor}
        rows.append(row | {name: closeness(settled.axis, stream, rng) for name, stream in moments.items()})
    return rows


def _significance(rows: list[dict[str, Any]], nulls: tuple[str, ...]) -> None:
    """Add ``beyond_rotated`` and ``beyond_shuffled`` to every comparison, corrected over all of them together."""
    tests = [
        (row[stream], name)
        for row in rows
        for stream in ("activations", "gradients")
        for name in ("rotated", "shuffled")
        if name in nulls
    ]
    discovered = discoveries(np.array([comparison[f"p_{name}"] for comparison, name in tests]))
    for (comparison, name), significant in zip(tests, discovered, strict=True):
        comparison[f"beyond_{name}"] = bool(significant)


def _apparent(model: CircuitGPT, texts: list[list[int]], left_out: list[str]) -> dict[str, Any]:
    """Apparent periods of decoding with the whole context."""
    steps = min(_APPARENT, model.config.block_size - max(map(len, texts)))
    if steps < 8:
        left_out.append("The context leaves no room to decode with the whole of it, so no apparent periods are shown.")
        return {}
    whole = decode(model, texts, model.config.block_size, steps)
    repeats = [apparent_period(row[len(text) :]) for row, text in zip(whole, texts, strict=True)]
    periods = [repeat[1] for repeat in repeats if repeat]
    return {
        "steps": steps,
        "repeat_themselves": len(periods) / len(texts),
        "one_token": sum(period == 1 for period in periods) / len(texts),
        "periods": [repeat[1] if repeat else 0 for repeat in repeats],
    }


def _left_out(models: dict[str, CircuitGPT], nulls: tuple[str, ...]) -> list[str]:
    notes = []
    if "rotated" in nulls:
        notes.append("The rotated null has no meaning for decoding, whose states are tokens.")
    if "TopKs off" not in models:
        notes.append("The model has no TopK, so none could be turned off.")
    return notes


def _settled_words(maps: list[Settling]) -> str:
    words = []
    for settled in maps:
        best = settled.best
        sentence = f"{settled.unit}: {best['settled']:.0%} of the starts settle"
        if best["directions"]:
            sentence += f", on {best['directions']} direction{'s' * (best['directions'] > 1)}, "
            sentence += f"spectral radius {best['spectral_radius']:.2f} (r = {best['radius']})"
        words.append(sentence)
    return "; ".join(words)


def _end_words(end: dict[str, Any]) -> str:
    if not end["closed"]:
        return f"no prompt's orbit closes within {end['steps']} steps"
    return (
        f"{end['closed']:.0%} of the prompts' orbits close, {end['one_token']:.0%} on one token, into "
        f"{end['distinct_cycles']:.0f} different cycles after a median of {end['median_index']:.0f} steps"
    )


def _null_words(
    maps: dict[str, list[Settling]], near: dict[str, list[dict[str, Any]]], ends: dict[str, dict[str, Any]]
) -> str:
    words = [
        f"{name}: {_settled_words(of_model[:1])}, |cos| {near[name][0]['activations']['cos']:.2f}"
        for name, of_model in maps.items()
        if name != "model"
    ]
    first = near["model"][0]["activations"]
    words.append(f"random directions: |cos| below {first['random']:.2f} in 95 % of cases")
    words += [f"{name} decoding: {_end_words(end)}" for name, end in ends.items() if name != "model"]
    return "; ".join(words)
