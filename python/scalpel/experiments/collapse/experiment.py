"""Does AbsTopK collapse representations onto few principal components of the gradient covariance, as a model trains?

The claim is about training, so a study of training answers it: small models of bracket text in two arms, AbsTopK and
dense, with five seeds each, measured from the first step to the last.

Predicted: two things happen over training, and more with AbsTopK than without. The effective rank of the gradient's
covariance falls, and the activations' leading directions come to capture the gradient's variance.
Measured: the difference in differences between the arms of the logarithm of that rank, on equally many live channels,
and of the score of the activations' directions. The two arms have equal weight density.
Null: a mask alone changes ranks. So the fall is also compared with that of the dense models with the mask put on
afterwards, and with that under the supports of other tokens.

The study takes about twenty minutes; it is read from the package unless ``fresh`` computes it anew. The given model, as
it is now, is measured in the same way beside an untrained model, its dense twin, that twin with the mask put on
afterwards, and its own supports shuffled. That is shown beside the seed's figures and decides nothing. The steps at
which each generator of the brackets' semigroup appears are shown as well.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...models.circuitgpt.model import CircuitGPT
from ...training import study as training
from ..nulls import NULLS, check_nulls
from ..provenance import at_least, model_provenance
from ..result import Protocol, Result, Verdict
from ..statistics import discoveries
from .figures import study_figures
from .measure import PRIMARY, VARIANTS, VERSION
from .model import Own, interval_words
from .training import CONTROLS, FILE, PLAN, Difference, Study, measure_snapshot

QUESTION = "Does AbsTopK collapse representations onto few principal components of the gradient covariance?"
SEED_FIGURE = "first component 71.2 %, first three 88.9 %, effective rank 10 of 512"
RULE = (
    "Decided by the study of training. Reproduced iff three things hold. (a) The effective rank of the gradient's "
    "covariance falls more with AbsTopK than in the dense arm: the difference in differences of its logarithm has a "
    "95 % t interval over seeds below 0. (b) The activations' leading directions come to capture more of the "
    "gradient's variance than in the dense arm: the difference in differences of the score's area has an interval "
    "above 0. (c) The rank falls more than in the dense models with the mask put on afterwards, and more than under "
    "the supports of other tokens: both intervals lie below 0. Not reproduced if (a) or (b) fails. Indistinguishable "
    "if both hold and (c) fails, since then masks alone do as much. Not testable here without a stored study. "
    f"Everything is taken from the variant {PRIMARY}, with ranks on equally many live channels in all arms at a step "
    "and scores on each arm's own channels. The other variants, and ranks on own channels, are only shown."
)


def run(
    model: CircuitGPT, *, tokens: int = 3072, nulls: tuple[str, ...] = NULLS, fresh: bool = False, seed: int = 0
) -> Result:
    """Judge the study of training, and measure the given model as it is now.

    Args:
        model: A CircuitGPT.
        tokens: About how many tokens the given model is measured on, 64 or more.
        nulls: For the given model only; the study always has its own controls. "untrained" is a model of the same shape
            and density; "rotated" puts random orthonormal bases in place of the activations' directions; "shuffled"
            puts each token's gradient behind another token's mask.
        fresh: Train and measure the study anew, which takes about twenty minutes, instead of reading it.
        seed: Seed of the prompts and of the nulls for the given model.

    Returns:
        A Result; ``measured["study"]`` holds the study and ``measured["model"]`` the given model.

    Raises:
        ValueError: A null is unknown, or an option is out of range.
        Refused: No text has two tokens, so that there is no gradient.
    """
    nulls = check_nulls(nulls)
    at_least(64, tokens=tokens)
    at_least(0, seed=seed)
    provenance = model_provenance(model, tokens=tokens, nulls=list(nulls), fresh=fresh, seed=seed)
    protocol = Protocol("collapse", QUESTION, SEED_FIGURE, provenance)
    protocol.predict(
        {
            "summary": "By the seed, training with TopK collapses representations onto few components, so the rank "
            "falls more and the score rises more than in dense training. By its rivals, training alone does this (no "
            "difference between the arms), or a mask alone does (no difference from the mask put on afterwards or "
            "from shuffled supports)",
            "seed": {"rank_difference": "below 0", "score_difference": "above 0"},
            "training_alone": {"rank_difference": 0, "score_difference": 0},
            "mask_alone": {"rank_difference_from_mask_afterwards": 0, "rank_difference_from_shuffled": 0},
            "rule": RULE,
        }
    )
    protocol.measuring()
    study, left_out = (_compute(), []) if fresh else _stored()
    own = Own.of(model, tokens, nulls, seed)
    left_out += own.left_out
    return _conclude(protocol, study, own, left_out)


def compute_study(
    folder: Path, progress: Callable[[str, float], None] | None = None, plan: training.Plan = PLAN
) -> dict[str, Any]:
    """Train and measure the study. Snapshots of the models go into ``folder``, from which a stopped run resumes.

    ``progress(what, done)`` is called along the way, with ``done`` from 0 to 1.
    """
    text = training.Text.of(plan)
    measure = partial(measure_snapshot, batches=training.held_out(plan, text), last=plan.steps[-1])
    return training.compute(plan, text, folder, measure, VERSION, progress)


def _compute() -> Study:
    with tempfile.TemporaryDirectory() as folder:
        return Study(compute_study(Path(folder)))


def _stored() -> tuple[Study | None, list[str]]:
    """The study stored in the package, or the reason why there is none."""
    try:
        return Study(training.load(FILE, PLAN, VERSION)), []
    except FileNotFoundError:
        return None, [f"The study of training is not stored ({FILE.name}); fresh=True computes it."]
    except training.StaleStudy as error:
        return None, [f"The stored study can't be used: {error}."]


def decide(rank: Mapping[str, Difference], onto: Difference) -> Verdict:
    """The verdict that RULE gives.

    ``rank``: differences in differences of ln rank, by control; ``onto``: that of the score against the dense arm.
    """
    if not (rank["dense"].high < 0 and onto.low > 0):
        return "not reproduced"
    return "reproduced" if all(rank[control].high < 0 for control in CONTROLS) else "indistinguishable"


def _conclude(protocol: Protocol, study: Study | None, own: Own, left_out: list[str]) -> Result:
    if study is None:
        return protocol.conclude(
            measured={"summary": f"no study of training; {own.summary}", **own.measured, "left_out": left_out},
            interval={"summary": interval_words(own), **own.interval},
            null={"summary": own.null_summary or "no null", **own.null},
            verdict="not testable here",
            figures=own.figures,
        )
    controls = (*CONTROLS, "untrained")
    rank = {control: study.difference(control) for control in controls}
    onto = {control: study.difference(control, "area") for control in controls}
    ends = {
        arm: [float(np.exp(np.log(study.course(arm, "equal_rank")[:, i]).mean())) for i in (0, -1)]
        for arm in ("topk", *CONTROLS)
    }
    scores = {arm: [float(study.course(arm, "area")[:, i].mean()) for i in (0, -1)] for arm in ("topk", *CONTROLS)}
    own_rank = study.difference("dense", "effective_rank")
    score_end = study.at_the_end("dense", "area")
    by_variant = {
        variant: {
            field: {control: vars(study.difference(control, field, variant)) for control in CONTROLS}
            for field in ("effective_rank", "equal_rank", "top1", "top3", "area", "reverse_area")
            if "area" not in field or ".trimmed." not in variant
        }
        for variant in VARIANTS
    }
    ranked = [study.difference("dense", "equal_rank", variant) for variant in VARIANTS]
    sure = discoveries(np.array([difference.p() for difference in ranked]))
    less, more = (int((sure & (np.sign([difference.mean for difference in ranked]) == sign)).sum()) for sign in (-1, 1))
    appeared = study.appeared()
    of_model = f". {own.summary[0].upper()}{own.summary[1:]}" if own.summary else ""
    return protocol.conclude(
        measured={
            "summary": f"Over training, effective rank with AbsTopK {_arrow(ends['topk'])}, dense "
            f"{_arrow(ends['dense'])}: difference in differences of ln rank {rank['dense'].words()} on equally many "
            f"live channels, {own_rank.words()} on each arm's own; score "
            f"{_arrow(scores['topk'])} against {_arrow(scores['dense'])}: {onto['dense'].words()} (the mask alone "
            f"gives a score before training; at the end the arms differ by {score_end.words()}). Of {len(VARIANTS)} "
            f"variants, {less} fall more with AbsTopK and {more} fall less (Benjamini-Hochberg, q = 0.05). Letters act "
            f"rightly from: {_letters(appeared)}{of_model}",
            "study": {
                "rank_at_start_and_end": ends,
                "score_at_start_and_end": scores,
                "ln_rank_differences": {name: vars(difference) for name, difference in rank.items()},
                "score_differences": {name: vars(difference) for name, difference in onto.items()},
                "score_difference_at_the_end": vars(score_end),
                "every_variant": by_variant,
                "generators_appear_at": appeared,
                "generators_by_answer_after_alone": study.appeared("after"),
                "losses_at_the_end": {arm: study.loss(arm)[:, -1] for arm in ("topk", "dense", "afterwards")},
                "tokens": study.tokens,
                "hooks": study.hooks,
                "computed_at_commit": study.commit,
                "key": study.key,
            },
            "model": own.measured,
            "left_out": left_out,
        },
        interval={
            "summary": f"95 % t intervals over {len(study.seeds)} seeds: ln rank {rank['dense'].words()}, score "
            f"{onto['dense'].words()}. {interval_words(own)}",
            "ln_rank_difference": [rank["dense"].low, rank["dense"].high],
            "score_difference": [onto["dense"].low, onto["dense"].high],
            "model": own.interval,
        },
        null={
            "summary": "Differences in differences of ln rank against the mask put on afterwards "
            f"{rank['afterwards'].words()}, against shuffled supports {rank['shuffled'].words()}, with untrained "
            f"models of the final density as the start {rank['untrained'].words()}"
            + (f"; {own.null_summary}" if own.null_summary else ""),
            "ln_rank_differences": {name: vars(rank[name]) for name in ("afterwards", "shuffled", "untrained")},
            "score_differences": {name: vars(onto[name]) for name in ("afterwards", "shuffled", "untrained")},
            "model": own.null,
        },
        verdict=decide(rank, onto["dense"]),
        figures={**study_figures(study), **own.figures},
    )


def _arrow(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3g} → {ends[1]:.3g}"


def _letters(appeared: Mapping[str, Mapping[str, Sequence[int | None]]]) -> str:
    """From which step on each letter acts rightly, by arm, as the median over the seeds that reach that."""
    words = []
    for arm, letters in appeared.items():
        by_letter = []
        for letter, steps in letters.items():
            known = [step for step in steps if step is not None]
            when = f"step {np.median(known):g} ({len(known)} of {len(steps)} seeds)" if known else "never"
            by_letter.append(f"{letter!r} {when}")
        words.append(f"{arm} {', '.join(by_letter)}")
    return "; ".join(words)
