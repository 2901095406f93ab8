"""Does the answer fail in long lists because filler dilutes the evidence?

Predicted: at a length at which the answer fails, it comes back when the answering position may not read the filler's
keys, their positions kept. That length is looked for on prompts of its own, and stored first.
Measured: P(correct) at depth 2 with the filler's keys hidden, with half of them hidden, with filler positions exchanged
(which changes no count), and with the last bracket early or late. In a factorial design, open brackets, closed
brackets, length and the place of the last bracket vary independently.
Null: as many keys of any kind hidden; and an untrained model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...tasks.brackets import closers
from ...tasks.evidence import PLACES, Evidence, evidence_lists
from ..controls import LEAST_ACCURACY
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, longest_asked, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import bootstrap, percentile_interval, redraw
from . import critical as c

SHORT = 32  # tokens of the short lists, which should be answered right
QUESTION = "Does the answer fail in long lists because filler dilutes the evidence?"
SEED_FIGURE = "n* = ⌈k/θ⌉: every added token counts, wherever it stands, and evidence counts however it is nested"
RULE = (
    "Reproduced iff, at the failing length, hiding the filler's keys from the answering position brings P(correct) "
    "above one half with its whole 95 % interval, and above what hiding as many keys of any kind brings, and if "
    "exchanging the filler's positions in a short list, where the answer is right, leaves P(correct) above one half. "
    "Not reproduced otherwise. Not testable if at no length the model tells the two depths apart with the required "
    f"accuracy, if it fails at no length inside the context, or if short lists of {SHORT} tokens are answered wrong."
)
LEVELS = (24, 48, 96, 192, 384)  # lengths of the factorial design in tokens; those that fit the context are used
FACTORS = ("open", "closed", "log n", "late")


def run(
    model: CircuitGPT,
    *,
    prompts: int = 64,
    offsets: int = 64,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """Measure P(correct) at depth 2 under interventions that add or remove one possible cause of failure at a time.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        prompts: Prompts for each intervention; a cell of the factorial design gets a quarter as many, at least 8.
        offsets: Positions of the context left free, so that lists can start at different positions.
        seed: Seed of the prompts, of the hidden keys and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length; otherwise the
            verdict is "not testable here".
        nulls: "untrained" repeats the interventions on an untrained model; "shuffled" shows what hiding as many keys of
            any kind does, which the rule needs in any case; "rotated" has no meaning here.

    Returns:
        A Result; ``measured["right"]`` holds P(correct) by intervention.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or its context is too short.
        ValueError: An option is out of range.
    """
    nulls = check_nulls(nulls)
    at_least(2, prompts=prompts)
    at_least(0, seed=seed)
    length = longest_asked(model, offsets, least_accuracy)
    provenance = model_provenance(model, prompts=prompts, offsets=offsets, seed=seed, least_accuracy=least_accuracy)
    protocol = Protocol("causes", QUESTION, SEED_FIGURE, provenance)
    rng = np.random.default_rng([seed, 7])
    scout = c.ask_long_lists(model, 2, prompts=prompts, length=length, seed=1000 * seed + 71)
    failing = _failing_length(scout)
    protocol.predict(
        {
            "summary": (
                f"P(correct) above 0.5 without the filler's keys at n = {failing}, where with them it is at most 0.25 "
                "on other prompts"
                if failing
                else f"nothing: at no length up to {length} are at most a quarter of the answers right"
            ),
            "failing_length": failing,
            "without_filler_above": 0.5 if failing else None,
            "rule": RULE,
        }
    )
    protocol.measuring()
    flat = c.ask_long_lists(model, 1, depth=1, prompts=prompts, length=length, seed=1000 * seed + 71)
    able = c.tells_depths({2: scout}, flat)
    table = _interventions(model, failing or length, prompts, seed)
    right, interval = _shares(table, rng)
    cells, outcome = _factorial(model, length, prompts, seed)
    effects = factor_effects(cells, outcome, rng)
    null: dict[str, Any] = {"summary": "no null was asked for"}
    if "untrained" in nulls:
        theirs, _ = _shares(_interventions(untrained(model), failing or length, prompts, seed), rng, 0)
        null = {"summary": "untrained: " + _words(theirs), "untrained": theirs}
    if "shuffled" in nulls:
        null["as_many_keys_of_any_kind"] = right["as many keys of any kind"]
        null["summary"] += f"; as many keys of any kind hidden: {right['as many keys of any kind']:.2f}"
    left_out = ["The rotated null was left out, since nothing here has a direction."] if "rotated" in nulls else []
    if not bool(model.transformer.wpe.weight.any()):
        left_out.append("Positions were not exchanged, since the model has none.")
    return protocol.conclude(
        measured={
            "summary": (f"at n = {failing}: " if failing else f"no failing length; at n = {length}: ")
            + _words(right)
            + f". Share of the logit difference's variance between cells: {_words(effects['share'])}",
            "right": right,
            "factors": effects,
            "cells": cells,
            "left_out": left_out,
            "best_balanced_accuracy_at_one_length": able,
        },
        interval={"summary": "95 % bootstrap by prompt", **interval, "factors": effects["interval"]},
        null=null,
        verdict=verdict(right, interval, failing, able >= least_accuracy),
        figures={
            "interventions": {
                "kind": "bars",
                "title": "P(correct) at depth 2 with some keys hidden from the answer, or with positions exchanged",
                "ylabel": "P(correct)",
                "labels": list(right),
                "values": list(right.values()),
                "low": [interval[name][0] for name in right],
                "high": [interval[name][1] for name in right],
                "reference": [{"y": 0.5, "label": "one half"}],
            },
            "factors": _factor_figure(cells, outcome),
        },
    )


def _failing_length(scout: c.Curve) -> int | None:
    """The longest length asked at which at most a quarter of the answers are right; None if there is none."""
    edges = c.bins(int(scout.x.max()))
    p = scout.binned(edges)
    under = np.flatnonzero(p <= 0.25)
    return min(int(edges[under[-1]]) + 8, int(scout.x.max())) if len(under) else None


@torch.no_grad()
def says_two(
    model: CircuitGPT, cell: Evidence, mask: Tensor | None = None, positions: Tensor | None = None
) -> np.ndarray:
    """logit("]]\\n") - logit("]\\n") after each prompt, (prompts,).

    ``mask`` (prompts, n), bool: the keys that the answering position may read. ``positions``: in place of the cell's.
    """
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    allowed = None
    if mask is not None:
        allowed = torch.ones(len(cell.ids), cell.n, cell.n, dtype=torch.bool, device="cpu").tril()
        allowed[:, -1] = mask
    differences = []
    for i in range(0, len(cell.ids), 16):
        part = slice(i, i + 16)
        logits = model(
            cell.ids[part],
            attention_mask=None if allowed is None else allowed[part],
            position_ids=(cell.positions if positions is None else positions)[part],
        )[:, -1]
        differences.append(logits[:, ids.two] - logits[:, ids.one])
    return torch.cat(differences).double().numpy()


def _interventions(model: CircuitGPT, failing: int, prompts: int, seed: int) -> dict[str, np.ndarray]:
    """Which answers are right (prompts,) under each intervention."""
    assert model.tokenizer is not None
    generator = torch.Generator().manual_seed(seed)

    def lists(n: int, opened: int, closed: int = 0, place: str = "early") -> Evidence:
        assert model.tokenizer is not None
        block = model.config.block_size
        kinds = {"opened": opened, "closed": closed, "place": place}
        return evidence_lists(model.tokenizer, n, prompts, block_size=block, seed=seed + 700, **kinds)  # type: ignore[arg-type]

    long, short, flat = lists(failing, 2), lists(SHORT, 2), lists(failing, 1)
    # The last three tokens are never hidden, since the question rests on them.
    filler = long.filler.clone()
    filler[:, -3:] = False
    half = filler & (torch.rand(filler.shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5)
    flat_filler = flat.filler.clone()
    flat_filler[:, -3:] = False
    brackets = ~short.filler
    brackets[:, 0] = False
    drawn = torch.rand(filler.shape, generator=generator, dtype=torch.float32, device="cpu")
    drawn[:, -3:] = -1
    anything = drawn >= torch.sort(drawn, descending=True).values.gather(1, filler.sum(1, keepdim=True) - 1)
    table = {
        "as it is": says_two(model, long) > 0,
        "filler not read": says_two(model, long, ~filler) > 0,
        "half of it not read": says_two(model, long, ~half) > 0,
        "as many keys of any kind": says_two(model, long, ~anything) > 0,
    }
    table["depth 1, filler not read"] = says_two(model, flat, ~flat_filler) < 0
    table["short"] = says_two(model, short) > 0
    table["short, head and brackets not read"] = says_two(model, short, ~brackets) > 0
    if bool(model.transformer.wpe.weight.any()):
        table["short, positions exchanged"] = says_two(model, short, positions=_exchanged(short, generator)) > 0
        table["long, positions exchanged"] = says_two(model, long, positions=_exchanged(long, generator)) > 0
    for place in PLACES:
        table[f"long, last bracket {place}"] = says_two(model, lists(failing, 2, 3, place)) > 0
    return table


def _exchanged(cell: Evidence, generator: torch.Generator) -> Tensor:
    """Positions with those of the filler permuted among themselves in each prompt, but for the last three tokens."""
    positions = cell.positions.clone()
    for row, is_filler in zip(positions, cell.filler, strict=True):
        where = torch.nonzero(is_filler[:-3]).flatten()
        row[where] = row[where[torch.randperm(len(where), generator=generator, device="cpu")]]
    return positions


def _shares(
    table: dict[str, np.ndarray], rng: np.random.Generator, resamples: int = 1000
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    shares = {name: float(right.mean()) for name, right in table.items()}
    intervals = {
        name: bootstrap(lambda rows, right=right: float(right[rows].mean()), len(right), rng, resamples)  # type: ignore[misc]
        for name, right in table.items()
        if resamples
    }
    return shares, intervals


def _factorial(model: CircuitGPT, length: int, prompts: int, seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The cells of the factorial design, and the logit differences in each, (cells, prompts)."""
    assert model.tokenizer is not None
    cells, outcome = [], []
    for n in (n for n in LEVELS if n <= length):
        for opened in (1, 2):
            for closed in (0, 1, 3):
                for place in PLACES if closed else PLACES[:1]:
                    cell = evidence_lists(
                        model.tokenizer,
                        n,
                        max(8, prompts // 4),
                        opened=opened,
                        closed=closed,
                        place=place,
                        block_size=model.config.block_size,
                        seed=seed + 701,
                    )
                    values = says_two(model, cell)
                    cells.append(
                        {
                            "open": opened,
                            "closed": closed,
                            "n": n,
                            "place": place,
                            "logit_difference": float(values.mean()),
                            "right": float(((values > 0) == (opened == 2)).mean()),
                        }
                    )
                    outcome.append(values)
    return cells, np.stack(outcome)


def factor_effects(cells: Sequence[dict[str, Any]], outcome: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """How much of the variance between the cells' mean logit differences each factor explains by itself.

    A linear model holds all factors and the product open × log n. A factor's ``share`` is the drop in R² when it is
    left out; the product is left out together with either of its factors. What correlated factors explain together is
    in the share of neither.
    """
    design = {
        "open": np.array([cell["open"] for cell in cells], dtype=float),
        "closed": np.array([cell["closed"] for cell in cells], dtype=float),
        "log n": np.log([cell["n"] for cell in cells]),
        "late": np.array([cell["place"] == "late" for cell in cells], dtype=float),
    }
    columns = {name: (x - x.mean()) / (x.std() or 1.0) for name, x in design.items()}
    columns["open × log n"] = columns["open"] * columns["log n"]
    drops = {name: {name} for name in columns}
    drops["open"], drops["log n"] = {"open", "open × log n"}, {"log n", "open × log n"}

    def shares(means: np.ndarray) -> dict[str, float]:
        full = _r2(np.stack(list(columns.values()), 1), means)
        return {
            name: full - _r2(np.stack([x for other, x in columns.items() if other not in gone], 1), means)
            for name, gone in drops.items()
        }

    count = outcome.shape[1]
    draws = redraw(lambda prompts: shares(outcome[:, prompts].mean(1)), count, rng, 200)
    return {
        "share": shares(outcome.mean(1)),
        "interval": {name: list(percentile_interval(np.array([draw[name] for draw in draws]))) for name in drops},
        "all": _r2(np.stack(list(columns.values()), 1), outcome.mean(1)),
    }


def _r2(x: np.ndarray, y: np.ndarray) -> float:
    design = np.column_stack([np.ones(len(y)), x])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float((residual**2).sum()) / total if total else float("nan")


def _words(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())


def verdict(
    right: dict[str, float], interval: dict[str, tuple[float, float]], failing: int | None, able: bool
) -> Verdict:
    """The verdict that RULE gives."""
    if not able or failing is None or right["short"] <= 0.5:
        return "not testable here"
    restored = interval["filler not read"][0] > 0.5
    specific = right["filler not read"] > right["as many keys of any kind"]
    stays = right.get("short, positions exchanged", 1.0) > 0.5
    return "reproduced" if restored and specific and stays else "not reproduced"


def _factor_figure(cells: Sequence[dict[str, Any]], outcome: np.ndarray) -> dict[str, Any]:
    series = []
    for opened in (2, 1):
        for closed in (0, 1, 3):
            chosen = [
                (cell["n"], values)
                for cell, values in zip(cells, outcome, strict=True)
                if (cell["open"], cell["closed"], cell["place"]) == (opened, closed, "early")
            ]
            series.append(
                {
                    "label": f"{opened} open, {closed} closed",
                    "x": [n for n, _ in chosen],
                    "y": [float(values.mean()) for _, values in chosen],
                    "style": "line" if opened == 2 else "dashed",
                }
            )
    return {
        "kind": "curves",
        "title": "Logit difference by length, for open and closed brackets (last bracket early)",
        "summary": "Above 0 the model answers that two lists are open.",
        "xlabel": "attended keys n (tokens)",
        "ylabel": "logit “]]” − logit “]”",
        "series": series,
        "hlines": [{"y": 0.0, "label": "no preference"}],
    }
