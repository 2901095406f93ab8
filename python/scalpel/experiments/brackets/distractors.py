"""How many distractor tokens flip the answer, and does it matter which tokens they are?

Predicted: the law counts every added token, and counts brackets among them as evidence. The answer flips at the fewest
d for which (k + e(d)) / (n₀ + d) ≤ θ, where e(d) is the number of brackets among the d distractors.
Measured: the fewest distractors at which P(correct) falls to one half, for each class of tokens. The distractors stand
in a comment before the statement, so that the question's surroundings stay the same.
Null: the same prompt moved to later positions with nothing added; and an untrained model with the longest comments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...models.circuitgpt.model import CircuitGPT
from ...models.untrained import untrained
from ...semigroup import ThresholdCounter
from ...tasks.brackets import closers, long_lists
from ...tasks.refused import Refused
from ..controls import LEAST_ACCURACY
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, longest_asked, model_provenance
from ..result import Protocol, Result, Verdict
from . import critical as c

QUESTION = "How many distractor tokens flip the answer, by class of token?"
SEED_FIGURE = "d = n* − n₀ = 12 for k = 2, θ = 0.15"
SEED_D = 12
RULE = (
    "Reproduced iff every class of tokens before the statement flips the answer at the count that the law predicts, "
    "within one element (2 tokens) or one standard error of the difference, whichever is larger. If the law predicts "
    "no flip, or one beyond what was tried, the answer must not flip. List elements repeat the calibration, so they "
    "are shown and enter no verdict. Not testable if the undisturbed prompts are answered wrong, if at no length the "
    "model tells the two depths apart with the required accuracy, or if the calibration has no critical length."
)


NOVEL = (
    "The training text of this model has no comments, so a flip at few comment tokens may be due to their novelty "
    "rather than to dilution."
)


@dataclass(frozen=True)
class Filler:
    """A class of distractors: its ``units`` follow one another in turn, and each holds ``evidence`` brackets."""

    units: tuple[str, ...]
    evidence: int = 0


CLASSES = {
    "comment words": Filler(("foo", "data", "list", "value")),
    "one letter": Filler(("x",)),
    "matched []": Filler(("[]",), evidence=1),
}


@dataclass(frozen=True)
class Comment:
    """Comment lines of one class: ``lines[i]`` are token ids, ``evidence[i]`` is how many brackets they hold."""

    lines: list[list[int]]
    evidence: list[int]


def run(
    model: CircuitGPT,
    *,
    k: int = 2,
    elements: int = 4,
    prompts: int = 64,
    offsets: int = 64,
    step: int = 24,
    seed: int = 0,
    least_accuracy: float = LEAST_ACCURACY,
    nulls: tuple[str, ...] = NULLS,
) -> Result:
    """Find the fewest distractors at which P(correct) falls to one half, by class of tokens, beside the law's figure.

    Prompts are lists at depth 2. Distractors are tried about every ``step`` tokens up to the context, and on a finer
    grid around the crossing. Unmatched brackets before a prompt of depth 1 should push the other way; they are measured
    as well and enter no verdict.

    Args:
        model: A CircuitGPT with a tokenizer that holds both answers as single tokens.
        k: Evidence in each prompt, 2 or more.
        elements: Elements in the open row of each prompt.
        prompts: How many prompts are asked.
        offsets: Positions of the context left free, so that lists can start at different positions.
        step: Tokens between the lengths of comment that are tried at first.
        seed: Seed of the prompts and of the resampling.
        least_accuracy: The balanced accuracy over both depths that the model must reach at some length, and the share
            of undisturbed prompts that it must answer right; otherwise the verdict is "not testable here".
        nulls: "shuffled" moves the prompt to later positions and adds no token; "untrained" asks an untrained model,
            with no comment and with the longest ones; "rotated" has no meaning here.

    Returns:
        A Result; ``measured["fewest"]`` holds the count of each class.

    Raises:
        Refused: The model has no tokenizer, its tokenizer splits an answer, or its context is too short.
        ValueError: An option is out of range.
    """
    nulls = check_nulls(nulls)
    at_least(2, prompts=prompts, k=k)
    at_least(1, elements=elements, step=step)
    at_least(0, seed=seed)
    length = longest_asked(model, offsets, least_accuracy)
    assert model.tokenizer is not None  # longest_asked refused a model without one
    rng = np.random.default_rng([seed, 3])
    options = {"k": k, "elements": elements, "prompts": prompts, "offsets": offsets, "step": step, "seed": seed}
    provenance = model_provenance(model, least_accuracy=least_accuracy, **options)
    protocol = Protocol("distractors", QUESTION, SEED_FIGURE, provenance)
    calibration = c.critical(c.ask_long_lists(model, k, prompts=prompts, length=length, seed=1000 * seed + 4), rng)
    short = _short_prompts(model, k, elements, prompts, seed)
    n0 = int(np.median([len(row) for row in short])) + len(closers(model.tokenizer).start)
    most = length - max(map(len, short)) - 1
    if most < 2 * step:
        raise Refused(
            f"{elements} elements leave {most} tokens for distractors, which are tried every {step} tokens; give fewer"
        )
    comments = {name: comment_lines(model, filler, most) for name, filler in CLASSES.items()}
    predicted = {
        name: flips_at(comment, k, n0, calibration.value) if calibration.status == "crosses" else None
        for name, comment in comments.items()
    }
    protocol.predict(
        {
            "summary": f"n* = {calibration.text()}, n₀ = {n0}: "
            + ", ".join(f"{name} {_count(d, most)}" for name, d in predicted.items()),
            "critical_length": c.table({k: calibration}),
            "n0": n0,
            "most_tried": most,
            "d": {name: None if d is None or np.isinf(d) else d for name, d in predicted.items()},
            "rule": RULE,
        }
    )
    protocol.measuring()
    curves = {name: _refined(model, short, comment, step) for name, comment in comments.items()}
    longer = c.ask_long_lists(model, k, prompts=prompts, length=length, seed=1000 * seed + 5)
    replicate = _counted_from(longer, n0)
    alone = c.ask_long_lists(model, 1, depth=1, prompts=prompts, length=length, seed=1000 * seed + 5)
    able = c.tells_depths({k: longer}, alone)
    moved = _moved(model, short, np.arange(0, most + 1, step))
    flat = _short_prompts(model, 1, elements, prompts, seed)
    unmatched = _curve(model, flat, _brackets(model, 16), depth=1)
    measured = {name: c.critical(curve, rng) for name, curve in curves.items()}
    null, push, again = c.critical(moved, rng), c.critical(unmatched, rng), c.critical(replicate, rng)
    least = float(moved.right.mean(0).min())
    untouched = {"depth 2": float(moved.right[:, 0].mean()), "depth 1": float(_plain(model, flat).mean())}
    return protocol.conclude(
        measured={
            "summary": "; ".join(f"{name} {count.text()}" for name, count in measured.items()),
            "against_the_seeds_figure": f"the seed says {SEED_D} at k = 2 for every class of tokens; here "
            + ", ".join(f"{name} {count.text()}" for name, count in measured.items()),
            "fewest": c.table(measured),
            "list_elements": c.table({k: again}),
            "accuracy_without_distractors": untouched,
            "best_balanced_accuracy_at_one_length": able,
            "unmatched_brackets_at_depth_1": {"words": push.text(), **c.table({1: push})},
            **({"note": NOVEL} if "text" in model.card else {}),
        },
        interval={"summary": "95 % bootstrap by prompt", **c.bounds(measured)},
        null=_null(nulls, model, short, comments, {"moved": c.table({k: null}), "words": null.text(), "least": least}),
        verdict=_verdict(predicted, measured, calibration, min(untouched["depth 2"], able) >= least_accuracy),
        figures=_figures(
            curves,
            replicate,
            moved,
            unmatched,
            predicted,
            f"evidence k = {k}, n₀ = {n0} tokens",
            NOVEL if "text" in model.card else "",
        ),
    )


def _null(
    nulls: tuple[str, ...],
    model: CircuitGPT,
    prompts: Sequence[list[int]],
    comments: dict[str, Comment],
    moved: dict[str, Any],
) -> dict[str, Any]:
    null: dict[str, Any] = {}
    words = []
    if "shuffled" in nulls:
        words.append(f"moved without adding a token: {moved['words']}, P(correct) at least {moved['least']:.2f}")
        null |= {"moved": moved["moved"], "moved_least_accuracy": moved["least"]}
    if "untrained" in nulls:
        other = untrained(model)
        ends = {name: _pick(comment, np.array([0, len(comment.lines) - 1])) for name, comment in comments.items()}
        right = {name: _curve(other, prompts, comment, depth=2).right.mean(0) for name, comment in ends.items()}
        null["untrained"] = {name: {"none": float(r[0]), "longest": float(r[1])} for name, r in right.items()}
        none, longest = (np.mean([r[i] for r in right.values()]) for i in range(2))
        words.append(f"untrained: P(correct) {none:.2f} without comments, {longest:.2f} with the longest")
    return {"summary": "; ".join(words) or "no null was asked for", **null}


def flips_at(comment: Comment, k: int, n0: int, critical_length: float) -> float:
    """How many tokens of a class flip the answer by the law; infinite if no comment line that was made does.

    The figure is the middle between the longest line that leaves the answer right and the next one, as a fit to a
    model's answers would find it.
    """
    counter = ThresholdCounter(k / critical_length)
    before = 0
    for line, evidence in zip(comment.lines, comment.evidence, strict=True):
        if not counter.decide(k + evidence, n0 + len(line)):
            return (before + len(line)) / 2
        before = len(line)
    return float("inf")


def comment_lines(model: CircuitGPT, filler: Filler, most: int) -> Comment:
    """Comment lines of whole units, up to ``most`` tokens each; the first line is empty.

    Each line ends with a blank, so that a bracket and the newline don't merge into a closing token.
    """
    assert model.tokenizer is not None
    lines: list[list[int]] = [[]]
    evidence = [0]
    for count in range(1, most + 1):
        words = " ".join(filler.units[i % len(filler.units)] for i in range(count))
        line = model.tokenizer.encode(f"# {words} \n")
        if len(line) > most:
            break
        lines.append(line)
        evidence.append(filler.evidence * count)
    return Comment(lines, evidence)


def _short_prompts(model: CircuitGPT, k: int, elements: int, count: int, seed: int) -> list[list[int]]:
    """Prompts without the start token; each asks after element number ``elements`` of the open row."""
    assert model.tokenizer is not None
    lists = long_lists(
        model.tokenizer,
        k,
        32 + 8 * k + 2 * elements,
        count,
        block_size=model.config.block_size,
        depth=1 if k == 1 else 2,
        seed=seed + 77,
    )
    start = len(closers(model.tokenizer).start)
    last = lists.asked[:, elements - 1]
    return [row[start : int(end) + 1].tolist() for row, end in zip(lists.ids, last, strict=True)]


def _brackets(model: CircuitGPT, most: int) -> Comment:
    """Comment lines with 0 to ``most`` unmatched brackets; the line without any is a comment too."""
    assert model.tokenizer is not None
    lines = [model.tokenizer.encode("# " + "[" * count + " \n") for count in range(most + 1)]
    return Comment(lines, list(range(most + 1)))


def _refined(model: CircuitGPT, prompts: Sequence[list[int]], comment: Comment, step: int) -> c.Curve:
    """P(correct) on a coarse grid of comment lines, refined around the place where it crosses one half."""
    sizes = np.array([len(line) for line in comment.lines])
    coarse = np.unique(np.searchsorted(sizes, np.arange(0, sizes[-1] + 1, step)))
    curve = _curve(model, prompts, _pick(comment, coarse), depth=2)
    _, crossing, status = c.crossing(
        curve
    )  # the isotonic crossing, since the grid may be too coarse for the logistic fit
    if status == "above":
        return curve
    near = np.setdiff1d(np.flatnonzero(np.abs(sizes - crossing) <= step), coarse)
    near = near[:: max(1, len(near) // 12)]
    fine = _curve(model, prompts, _pick(comment, near), depth=2) if len(near) else curve
    x, index = np.unique(np.concatenate([curve.x[0], fine.x[0]]), return_index=True)
    right = np.concatenate([curve.right, fine.right], 1)[:, index]
    return c.Curve(np.tile(x, (len(prompts), 1)), right)


def _pick(comment: Comment, index: np.ndarray) -> Comment:
    """The comment lines with these indices."""
    return Comment([comment.lines[i] for i in index], [comment.evidence[i] for i in index])


@torch.no_grad()
def _curve(model: CircuitGPT, prompts: Sequence[list[int]], comment: Comment, depth: int) -> c.Curve:
    """Answers with each comment line in front. x counts the tokens added, or at depth 1 the brackets in the comment."""
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    right = np.zeros((len(prompts), len(comment.lines)), dtype=bool)
    for j, line in enumerate(comment.lines):
        right[:, j] = _answers(model, [[*ids.start, *line, *prompt] for prompt in prompts], 0) == (depth == 2)
    x = [len(line) for line in comment.lines] if depth == 2 else comment.evidence
    return c.Curve(np.tile(np.array(x), (len(prompts), 1)), right)


def _moved(model: CircuitGPT, prompts: Sequence[list[int]], counts: np.ndarray) -> c.Curve:
    """The null: nothing is added, and the prompt begins each of ``counts`` positions later."""
    assert model.tokenizer is not None
    rows = [[*closers(model.tokenizer).start, *prompt] for prompt in prompts]
    right = np.stack([_answers(model, rows, int(count)) for count in counts], 1)
    return c.Curve(np.tile(counts, (len(prompts), 1)), right)


def _plain(model: CircuitGPT, flat: Sequence[list[int]]) -> np.ndarray:
    """Whether prompts of depth 1 are answered right with nothing added, bool (prompts,)."""
    assert model.tokenizer is not None
    return ~_answers(model, [[*closers(model.tokenizer).start, *prompt] for prompt in flat], 0)


@torch.no_grad()
def _answers(model: CircuitGPT, rows: Sequence[list[int]], first: int) -> np.ndarray:
    """Whether the model closes two lists after each row, with the first token at position ``first``."""
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device="cpu")
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
    logits = model(padded, position_ids=first + torch.arange(padded.shape[1], device="cpu"))
    last = logits[
        torch.arange(len(rows), device="cpu"),
        torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device="cpu"),
    ]
    says_two: np.ndarray = (last[:, ids.two] > last[:, ids.one]).numpy()
    return says_two


def _counted_from(curve: c.Curve, n0: int) -> c.Curve:
    """Long lists read as distractors: each element beyond n₀ tokens counts as added to the open row."""
    kept = int((curve.x < n0).sum(1).max())
    return c.Curve(curve.x[:, kept:] - n0, curve.right[:, kept:])


def _figures(
    curves: dict[str, c.Curve],
    replicate: c.Curve,
    moved: c.Curve,
    unmatched: c.Curve,
    predicted: dict[str, float | None],
    subject: str,
    caution: str,
) -> dict[str, Any]:
    lines = [{"x": d, "label": f"law: {name}"} for name, d in predicted.items() if d is not None and np.isfinite(d)]
    half = [{"y": 0.5, "label": "one half"}]
    return {
        "curves": {
            "kind": "curves",
            "title": f"Distractors by class, {subject}",
            "summary": caution,
            "xlabel": "distractor tokens added",
            "ylabel": "P(correct)",
            "series": [
                *({"label": name, **_points(curve)} for name, curve in curves.items()),
                {"label": "list elements", **_points(replicate)},
                {"label": "moved only (null)", "style": "dashed", **_points(moved)},
            ],
            "hlines": half,
            "vlines": lines,
        },
        "unmatched": {
            "kind": "curves",
            "title": "Unmatched “[” in a comment before a depth-1 list",
            "xlabel": "unmatched brackets added",
            "ylabel": "P(correct)",
            "series": [{"label": "depth 1", **_points(unmatched)}],
            "hlines": half,
        },
    }


def _points(curve: c.Curve) -> dict[str, np.ndarray]:
    """P(correct) at each x that was asked, thinned to about 64 points."""
    x = np.unique(curve.x)
    x = x[:: max(1, len(x) // 64)]
    return {"x": x, "y": np.array([curve.right[curve.x == v].mean() for v in x])}


def _count(d: float | None, most: int) -> str:
    return "–" if d is None else f"never up to {most}" if np.isinf(d) else f"{d:.0f}"


def _verdict(
    predicted: dict[str, float | None], measured: dict[str, c.Critical], calibration: c.Critical, able: bool
) -> Verdict:
    """The verdict that RULE gives."""
    if not able or calibration.status != "crosses":
        return "not testable here"
    fits = [d is not None and c.within(d, measured[name], calibration.error) for name, d in predicted.items()]
    return "reproduced" if all(fits) else "not reproduced"
