"""How many distractors flip the answer, and does it matter which tokens they are?

The seed's law counts every added token alike: d = n* − n₀. Here each class of token is added on its own, in a
comment in front of the statement (so that the question's surroundings stay) or as elements of the list; the same
prompt moved to later positions with nothing added is the null.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..models.circuitgpt import CircuitGPT
from ..tasks.brackets import closers, long_lists
from . import critical as c
from .controls import LEAST_ACCURACY
from .provenance import model_provenance
from .result import Protocol, Result, Verdict

QUESTION = "How many distractor tokens flip the answer, by class of token?"
SEED_FIGURE = "d = n* − n₀ = 12 for k = 2, θ = 0.15"

RULE = (
    "Reproduced iff every class flips the answer at the predicted count, within one element (2 tokens) or one standard "
    "error, whichever is larger; a class that never flips inside the context contradicts it. Not testable where the "
    "model is wrong without distractors, or where the predicted count lies outside the context."
)

# Texts whose tokens are repeated to the wished count.
CLASSES = {"comment words": "foo data list value ", "blank lines": "\n", "matched []": "[]"}


def run(
    model: CircuitGPT,
    *,
    k: int = 2,
    elements: int = 4,
    prompts: int = 64,
    offsets: int = 64,
    step: int = 24,
    seed: int = 0,
) -> Result:
    """Fewest distractors at which P(correct) falls to one half, by class, against the seed's d = n* − n₀.

    The prompts are depth-2 lists of evidence ``k`` and ``elements`` elements; distractors are tried every ``step``
    tokens up to the context. An unmatched "[" in front of a depth-1 prompt should push the other way; it is measured
    beside them and enters no verdict.
    """
    assert model.tokenizer is not None
    length = model.config.block_size - offsets
    rng = np.random.default_rng([seed, 3])
    protocol = Protocol("distractors", QUESTION, SEED_FIGURE, model_provenance(model, seed=seed, prompts=prompts))
    calibration = c.critical(c.ask_long_lists(model, k, prompts=prompts, length=length, seed=1000 * seed + 4), rng)
    short = _short_prompts(model, k, elements, prompts, seed)
    n0 = int(np.median([len(row) for row in short]))
    predicted = None if calibration.censored else max(0.0, calibration.value - n0)
    protocol.predict(
        {
            "summary": f"n* = {calibration.text()}, n₀ = {n0}: "
            + (f"d = {predicted:.0f} for every class" if predicted is not None else "d lies outside the context"),
            "critical_length": c.table({k: calibration}),
            "n0": n0,
            "d": predicted,
            "rule": RULE,
        }
    )
    counts = np.arange(0, length - max(map(len, short)) + 1, step)
    curves = {name: _refined(model, short, counts, _comment(model, text)) for name, text in CLASSES.items()}
    curves["list elements"] = _elements(model, k, n0, prompts, length, seed)
    moved = _curve(model, short, counts, None, depth=2)
    flat = _short_prompts(model, 1, elements, prompts, seed)
    unmatched = _curve(model, flat, np.arange(0, 17), _brackets(model), depth=1)
    measured = {name: c.critical(curve, rng) for name, curve in curves.items()}
    null = c.critical(moved, rng)
    push = c.critical(unmatched, rng)
    first = float(np.mean([curve.right[:, 0].mean() for curve in curves.values()]))
    return protocol.conclude(
        measured={
            "summary": "; ".join(f"{name} {one.text()}" for name, one in measured.items()),
            "fewest": c.table(measured),
            "accuracy_without_distractors": first,
            "unmatched_bracket_at_depth_1": {"words": push.text(), **c.table({1: push})},
        },
        interval={"summary": "95 % bootstrap by prompt", **c.bounds(measured)},
        null={
            "summary": f"moved without adding a token: {null.text()}, P(correct) at least {_least(moved):.2f}",
            "moved": c.table({k: null}),
            "moved_least_accuracy": _least(moved),
        },
        verdict=_verdict(predicted, measured, first),
        figures={
            "curves": {
                "kind": "curves",
                "title": f"Distractors by class, evidence k = {k}, n₀ = {n0} tokens",
                "xlabel": "distractor tokens added",
                "ylabel": "P(correct)",
                "series": [
                    *({"label": name, **_points(curve)} for name, curve in curves.items()),
                    {"label": "moved only (null)", "style": "dashed", **_points(moved)},
                ],
                "hlines": [{"y": 0.5, "label": "one half"}],
                "vlines": [] if predicted is None else [{"x": predicted, "label": "seed's law"}],
            },
            "unmatched": {
                "kind": "curves",
                "title": "Unmatched “[” in a comment before a depth-1 list",
                "xlabel": "unmatched brackets added",
                "ylabel": "P(correct)",
                "series": [{"label": "depth 1", **_points(unmatched)}],
                "hlines": [{"y": 0.5, "label": "one half"}],
            },
        },
    )


def _short_prompts(model: CircuitGPT, k: int, elements: int, count: int, seed: int) -> list[list[int]]:
    """Prompts without the start token, all asking after element number ``elements`` of the open row."""
    assert model.tokenizer is not None
    lists = long_lists(
        model.tokenizer,
        k,
        64 + 8 * k + 2 * elements,
        count,
        block_size=model.config.block_size,
        depth=1 if k == 1 else 2,
        seed=seed + 77,
    )
    start = len(closers(model.tokenizer).start)
    last = lists.asked[:, elements - 1]
    return [row[start : int(end) + 1].tolist() for row, end in zip(lists.ids, last, strict=True)]


def _comment(model: CircuitGPT, text: str) -> Callable[[int], list[int]]:
    """A comment line of ``count`` tokens in all: its sign, ``text`` repeated, its newline."""
    assert model.tokenizer is not None
    sign, line = model.tokenizer.encode("# "), model.tokenizer.encode("\n")
    unit = model.tokenizer.encode(text)

    def tokens(count: int) -> list[int]:
        inside = max(0, count - len(sign) - len(line))
        return [*sign, *(unit * (inside // len(unit) + 1))[:inside], *line] if count else []

    return tokens


def _brackets(model: CircuitGPT) -> Callable[[int], list[int]]:
    """A comment line with ``count`` unmatched brackets; without any it is there all the same."""
    assert model.tokenizer is not None
    sign, line, bracket = (model.tokenizer.encode(text) for text in ("# ", "\n", "["))
    return lambda count: [*sign, *bracket * count, *line]


def _refined(
    model: CircuitGPT,
    prompts: Sequence[list[int]],
    counts: np.ndarray,
    distractors: Callable[[int], list[int]],
) -> c.Curve:
    """The curve on the coarse grid and, where it crosses one half, on every element's step around the crossing."""
    coarse = _curve(model, prompts, counts, distractors, depth=2)
    crossing, censored = c.half_crossing(coarse)
    if censored is not None:
        return coarse
    step = int(counts[1] - counts[0])
    near = np.arange(max(c.ELEMENT, int(crossing) - step), min(int(crossing) + step, int(counts[-1])), c.ELEMENT)
    fine = _curve(model, prompts, np.setdiff1d(near, counts), distractors, depth=2)
    x, right = np.concatenate([coarse.x, fine.x], 1), np.concatenate([coarse.right, fine.right], 1)
    order = np.argsort(x[0])
    return c.Curve(x[:, order], right[:, order])


@torch.no_grad()
def _curve(
    model: CircuitGPT,
    prompts: Sequence[list[int]],
    counts: np.ndarray,
    distractors: Callable[[int], list[int]] | None,
    depth: int,
) -> c.Curve:
    """Answers with each count of distractors in front; without a maker, the prompt only moves that far."""
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    right = np.zeros((len(prompts), len(counts)), dtype=bool)
    longest = max(map(len, prompts))
    for j, count in enumerate(counts):
        before = [*ids.start, *(distractors(int(count)) if distractors else [])]
        rows = torch.zeros(len(prompts), len(before) + longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            rows[i, : len(before) + len(prompt)] = torch.tensor([*before, *prompt])
        first = 0 if distractors else int(count)
        logits = model(rows, position_ids=first + torch.arange(rows.shape[1]))
        last = torch.tensor([len(before) + len(prompt) - 1 for prompt in prompts])
        answer = logits[torch.arange(len(prompts)), last]
        right[:, j] = ((answer[:, ids.two] > answer[:, ids.one]) == (depth == 2)).numpy()
    return c.Curve(np.tile(counts, (len(prompts), 1)), right)


def _elements(model: CircuitGPT, k: int, n0: int, prompts: int, length: int, seed: int) -> c.Curve:
    """Elements added to the open row: the long lists again, on other prompts, counted from n₀."""
    curve = c.ask_long_lists(model, k, prompts=prompts, length=length, seed=1000 * seed + 5)
    kept = int((curve.x < n0).sum(1).max())
    return c.Curve(curve.x[:, kept:] - n0, curve.right[:, kept:])


def _points(curve: c.Curve) -> dict[str, np.ndarray]:
    """P(correct) at each x that was asked, thinned to at most 64 points."""
    x = np.unique(curve.x)
    x = x[:: max(1, len(x) // 64)]
    return {"x": x, "y": np.array([curve.right[curve.x == v].mean() for v in x])}


def _least(curve: c.Curve) -> float:
    return float(curve.right.mean(0).min())


def _verdict(predicted: float | None, measured: dict[str, c.Critical], first: float) -> Verdict:
    """The verdict by RULE."""
    if first < LEAST_ACCURACY or predicted is None:
        return "not testable here"
    return "reproduced" if all(c.within(predicted, one) for one in measured.values()) else "not reproduced"
