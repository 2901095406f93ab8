"""Do mean Jacobians compose: is J̄_{l→D} the product J̄_{m→D} J̄_{l→m}?

A model's layers compose, and so do their Jacobians at one input. The seed's semigroup of depth asks the same of what a
lens is made of, Jacobians averaged over positions and prompts. If it holds for averages, a lens can be carried from one
part of a model to another: fitted once for l → m, it serves every target behind m.

Measured: the defect ‖J̄_{l→D} − J̄_{m→D} J̄_{l→m}‖ / ‖J̄_{l→D} − I‖, D being the last layer, for cotangents summed over
later tokens ("after") and for those of the same token ("same"). It is taken relative to J̄ − I, since the identity of
the residual path would hide everything else. :mod:`.defect` says how the bias is avoided that noise gives to a norm,
and why the two sides, and the product's two factors, never share a prompt.
Nulls: "split" exchanges the two sides in a random half of the prompts, which compares one half with the other and has 0
as its truth. J̄_{l→D} of one half against that of the other is shown, too. It decides nothing, since it is noisier than
the defect, whose two sides share their prompts' scatter: a real defect would hide in it. "frozen" is the same model
with its attention fixed at the mean weights over the prompts. Positions at the edges of the window have fewer
neighbours, so that averages don't quite compose even in a linear model with fixed attention: the decoder made linear
in that way ("edges") is what a defect has to exceed.

The first form of the rule asked for more: a defect above that with frozen attention. It proved wrong in practice.
Freezing attention leaves all that MLPs and norms vary with, and takes a model to states that it was never trained on,
where averages may compose worse than in the model itself. Then even a large defect would pass for indistinguishable
from zero. The comparison stays in the result as "beyond_frozen_attention".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...hooks.standing import stood_for
from ...models.circuitgpt.model import CircuitGPT
from ...models.fingerprint import fingerprint
from ...tasks.refused import Refused
from ..nulls import only_beside
from ..provenance import at_least
from ..result import Protocol, Result, Verdict
from .asked import Asked, asked, texts_of
from .defect import KINDS, Products, measure
from .figures import figures_of
from .prompts import Prompts
from .summary import Summary, summarise

QUESTION = "Do mean Jacobians compose: is J̄ from layer l to the end the product of J̄ from m and J̄ from l to m?"
SEED_FIGURE = "layer maps form a semigroup under composition; no figure is given"
NULLS = ("split", "frozen")
LEAST = 8  # prompts: two units for each half
RULE = (
    "The figure of a kind of targets is the root of the mean over all (l, m) of the squared defect, which noise may "
    "make negative. Zero stands for it if it is not above the 95 % of both nulls: the 97.5 % point of the same figure "
    "with both sides exchanged in a random half of the prompts, and the upper end of the interval of the same figure "
    "with frozen attention. Reproduced iff zero stands for both kinds. Not reproduced iff for one of them the 95 % "
    "interval lies above the former and above the figure of the linear model with fixed attention, which the edges of "
    "the window make; where there is no such model, above the latter. Indistinguishable otherwise. Growth is the "
    "rival's prediction: Spearman's correlation of the defect with D − l over (l, m) has a 95 % interval above 0. Not "
    "testable if a null was not asked for."
)
opened = asked  # a user may name a model of any kind that has rules


def run(
    model: Any,
    *,
    prompts: int = 40,
    tokens: int = 64,
    skip_first: int = 16,
    probes: int = 8,
    sources: tuple[int, ...] = (),
    middles: tuple[int, ...] = (),
    text: str = "",
    resamples: int = 1000,
    nulls: tuple[str, ...] = NULLS,
    seed: int = 0,
) -> Result:
    """Measure the defect of composition by (l, m), beside both nulls.

    Args:
        model: A CircuitGPT or a transformers model that has rules. ``scalpel.experiments.run`` and the command line
            also take a name, a folder of transformers, or a GGUF file.
        prompts: How many prompts of equal length, an even number, 8 or more.
        tokens: Their length.
        skip_first: How many tokens at the beginning don't count; the last one doesn't, either.
        probes: How many random rows u stand for all rows of the matrices.
        sources: The layers l, whose outputs the Jacobians start at; -1 is the embedding. By default up to 6.
        middles: The layers m. By default up to 4 inside the model.
        text: A file in UTF-8, which is cut into prompts. If it is empty, text of Python's standard library.
        resamples: Of the bootstrap over pairs of prompts and over probes, and how many splits into halves are drawn.
        nulls: "split" and "frozen", as the module describes them.
        seed: Of the prompts, the probes, the signs of "same" and the resampling.

    Returns:
        A Result; ``measured["after"]["pairs"]`` and ``measured["same"]["pairs"]`` are the tables by (l, m).

    Raises:
        Refused: The model has no rules or too few layers, or its context is too short.
        ValueError: An option is out of range, or the text is too short.
    """
    at_least(LEAST, prompts=prompts)
    at_least(1, probes=probes, resamples=resamples)
    at_least(0, skip_first=skip_first, seed=seed)
    at_least(skip_first + 2, tokens=tokens)
    if prompts % 2:
        raise ValueError(f"option 'prompts' is {prompts}; it must be even, since prompts go in pairs")
    unknown = [name for name in nulls if name not in NULLS]
    if unknown:
        raise ValueError(f"unknown null {unknown[0]!r}; there are {', '.join(NULLS)}")
    source = asked(model)
    end = source.layers
    pairs = _pairs(end, sources, middles)
    texts, of_text = texts_of(source, prompts, tokens, text, seed)
    options = {"prompts": prompts, "tokens": tokens, "skip_first": skip_first, "probes": probes, "nulls": nulls}
    options |= {"sources": sorted({l - 1 for l, _ in pairs}), "middles": sorted({m - 1 for _, m in pairs})}  # noqa: E741
    provenance = _provenance(source, options | {"resamples": resamples, "seed": seed}) | of_text
    protocol = Protocol("composition", QUESTION, SEED_FIGURE, provenance)
    protocol.predict(
        {
            "summary": "zero: the defect lies within what both nulls show; the rival: it grows with D − l",
            "zero": "the semigroup of depth holds for averages: the defect is within both nulls' 95 %",
            "growth": "the defect grows with the distance to the end: Spearman's correlation with D − l is above 0",
            "rule": RULE,
        }
    )
    protocol.measuring()

    def products(mode: str, those: Sequence[Any]) -> dict[str, Products]:
        points = sorted({end, *(point for pair in pairs for point in pair)})
        return measure(Prompts(source, those, skip_first, points, mode), pairs, end, probes, seed)

    own = products("own", texts)
    frozen = products("frozen", texts) if "frozen" in nulls else None
    # Nothing depends on the prompt in a linear model, so a few prompts show it, for the signs of "same".
    edges = products("linear", texts[:LEAST]) if frozen and not isinstance(source.model, CircuitGPT) else None
    rng = np.random.default_rng([seed, 91])
    found = {
        kind: summarise(
            pairs,
            end,
            own[kind],
            frozen[kind] if frozen else None,
            edges[kind] if edges else None,
            "split" in nulls,
            resamples,
            rng,
        )
        for kind in KINDS
    }
    left_out = [] if edges else ["The linear model with fixed attention is shown for models of transformers alone."]
    if len({l for l, _ in pairs}) < 3:  # noqa: E741
        left_out.append("The model has too few layers to ask whether the defect grows with the distance to the end.")
    if of_text["text"] == "random token ids":
        left_out.append("The prompts are random token ids, since the model has no tokenizer.")
    return protocol.conclude(
        measured={
            "summary": "; ".join(f"{kind}: {each.words()}" for kind, each in found.items()),
            **{kind: each.measured() for kind, each in found.items()},
            "left_out": left_out,
        },
        interval={
            "summary": "95 %, bootstrap over pairs of prompts and over probes; single pairs (l, m) are not corrected "
            "for their number",
            **{kind: {"defect": each.interval, "growth": each.growth_interval} for kind, each in found.items()},
        },
        null={
            "summary": "; ".join(f"{kind}: {each.null_words()}" for kind, each in found.items()),
            **{kind: each.nulls() for kind, each in found.items()},
        },
        verdict=only_beside(NULLS, nulls, _verdict(list(found.values()))),
        figures=figures_of(found, end),
    )


def _verdict(found: Sequence[Summary]) -> Verdict:
    """The verdict that RULE gives."""
    if any(each.beyond is None for each in found):
        return "not testable here"
    if all(each.zero for each in found):
        return "reproduced"
    return "not reproduced" if any(each.beyond for each in found) else "indistinguishable"


def _pairs(end: int, sources: Sequence[int], middles: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (l, m) of points with l < m < end, by default on an even grid; layers count from 0, points from 1.

    Raises:
        Refused: The model has fewer than two layers.
        ValueError: A layer is out of range, or no l lies before an m.
    """
    if end < 2:
        raise Refused(f"the model has {end} layer, and there is nothing between the first and the last: two are needed")
    first = 1 if end > 2 else 0  # in a model of two layers, the embedding
    inside = end - 1 - first  # how many points m there can be
    if not middles:
        places = np.linspace(first + 1, end - 1, 6)[1:-1] if inside > 4 else np.arange(first + 1, end)
        middles = sorted({round(place) - 1 for place in places.tolist()})
    if not sources:
        sources = sorted({round(place) - 1 for place in np.linspace(first, max(middles), 6).tolist()})
    for name, layers, least in (("sources", sources, -1), ("middles", middles, 0)):
        wrong = [layer for layer in layers if not least <= layer < end - 1]
        if wrong:
            raise ValueError(f"option {name!r} has layer {wrong[0]}; allowed: {least} to {end - 2}")
    pairs = [(l + 1, m + 1) for m in sorted(set(middles)) for l in sorted(set(sources)) if l < m]  # noqa: E741
    if not pairs:
        raise ValueError(f"no layer of sources, {list(sources)}, comes before one of middles, {list(middles)}")
    return pairs


def _provenance(source: Asked, options: dict[str, Any]) -> dict[str, Any]:
    """What the result was computed from."""
    card = source.card
    return {
        "model": source.name,
        "weights_sha256": fingerprint(stood_for(source.model)),
        "dtype": str(next(iter(source.model.parameters())).dtype).removeprefix("torch."),
        "training_seed": card.get("recipe", {}).get("seed"),
        "training_commit": card.get("commit"),
        "options": options,
    }
