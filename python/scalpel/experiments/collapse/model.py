"""Collapse on one trained model: the measures, their intervals by prompt, and the same for its controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...circuits.task import bracket_counting
from ...covariance.streaming import StreamingCovariance
from ...models.circuitgpt.model import CircuitGPT
from ...models.circuitgpt.recording import hook_width
from ...models.untrained import untrained
from ...tasks.refused import Refused
from ..statistics import jackknife
from .figures import GRID, ROTATIONS, hook_figures, score_curves, score_figure, table
from .gather import Rows, Texts, gather, masked_afterwards, shuffled, topk_hooks
from .measure import PRIMARY, VARIANTS, WIDEST, Pair, compare, shares_and_rank

__all__ = ["Own", "interval_words"]

GROUPS = 16  # of prompts, for the jackknife
_PROMPT_TOKENS = 18  # about how many tokens a bracket prompt has


class Own:
    """What was measured on the given model: parts of a Result, each empty if nothing could be measured."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.measured: dict[str, Any] = {}
        self.interval: dict[str, Any] = {}
        self.null: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.summary = self.null_summary = ""

    @classmethod
    def of(cls, model: CircuitGPT, tokens: int, nulls: Sequence[str], seed: int) -> "Own":
        """Measure ``model`` on about ``tokens`` tokens beside its controls and the asked ``nulls``.

        Raises:
            Refused: No text has two tokens, so that there is no gradient.
        """
        own = cls()
        all_hooks = topk_hooks(model)
        hooks = [name for name in all_hooks if hook_width(model, name) <= WIDEST]
        if not hooks:
            what = f"only AbsTopKs wider than {WIDEST} channels" if all_hooks else "no AbsTopK"
            own.left_out.append(f"The given model has {what}, so nothing was measured on it; the study decides.")
            own.summary = "the given model has no AbsTopK to measure"
            return own
        if len(hooks) < len(all_hooks):
            own.left_out.append(
                f"Hooks wider than {WIDEST} channels were left out: "
                f"{', '.join(h for h in all_hooks if h not in hooks)}."
            )
        texts, what = _sample(model, tokens, seed, own.left_out)
        models = {"model": model, **_controls(model, nulls, own.left_out)}
        gathered = {name: gather(other, texts, hooks) for name, other in models.items()}
        conditions = {name: at_hooks.rows for name, at_hooks in gathered.items()}
        if "shuffled" in nulls:
            conditions["shuffled"] = shuffled(conditions["model"], np.random.default_rng([seed, 3]))
        own._fill(conditions, {name: at_hooks.loss for name, at_hooks in gathered.items()}, what, nulls, seed)
        return own

    def _fill(
        self,
        conditions: Mapping[str, Mapping[str, Rows]],
        losses: Mapping[str, float],
        text: str,
        nulls: Sequence[str],
        seed: int,
    ) -> None:
        pairs: dict[str, dict[str, Pair]] = {}
        measured = compare(conditions, seed, pairs)
        means = table(measured, VARIANTS)
        intervals = _jackknife(conditions["model"])
        rotations = ROTATIONS if "rotated" in nulls else 0
        curves = {
            name: score_curves(pairs.get(name, {}), rotations if name == "model" else 0, seed) for name in conditions
        }
        model = {variant: means["model"][variant] for variant in VARIANTS}
        own, raw = model[PRIMARY], model["post.raw.second"]
        count = len(next(iter(conditions["model"].values())).text)
        self.summary = (
            f"the given model, means over {len(conditions['model'])} hooks and {count} tokens of {text}: first "
            f"component {own['top1']:.1%}, first three {own['top3']:.1%}, effective rank {own['effective_rank']:.1f} "
            f"(behind the mask, raw and not centered: {raw['top1']:.1%}, {raw['top3']:.1%}, "
            f"{raw['effective_rank']:.1f}); the seed has 71.2 %, 88.9 %, 10 of 512"
        )
        self.measured = {
            "means_over_hooks": {"model": model},
            "by_hook": {
                hook: {variant: vars(figures) for variant, figures in by_variant.items()}
                for hook, by_variant in measured["model"].items()
            },
            "losses": dict(losses),
            "score_by_r": {"r_as_share": GRID, "onto": curves["model"]["onto"], "reverse": curves["model"]["reverse"]},
            "text": text,
        }
        self.interval = {"means_over_hooks": intervals}
        self.null = {
            "means_over_hooks": {name: by_variant for name, by_variant in means.items() if name != "model"},
            "rotated_areas": curves["model"]["rotated_area"],
        }
        others = [
            f"{name}: effective rank {by_variant[PRIMARY]['equal_rank']:.1f}, score {by_variant[PRIMARY]['area']:.2f}"
            for name, by_variant in means.items()
            if name != "model"
        ]
        if rotations:
            others.append(f"rotated: score {np.mean(curves['model']['rotated_area']):.2f}")
        mine = f"model: effective rank {own['equal_rank']:.1f}, score {own['area']:.2f}"
        self.null_summary = "; ".join([f"the given model (ranks on equally many live channels), {mine}", *others])
        self.figures = {
            **{f"by_hook_{i}": figure for i, figure in enumerate(hook_figures(measured))},
            "score_by_r": score_figure(curves),
        }


def _sample(model: CircuitGPT, tokens: int, seed: int, left_out: list[str]) -> tuple[list[Texts], str]:
    """About ``tokens`` tokens of bracket prompts with their answers, or of random ids if these can't be made."""
    prompts = max(GROUPS, -(-tokens // _PROMPT_TOKENS))
    length = model.config.block_size
    try:
        task = bracket_counting(model, prompts, seed)
        ids, mask = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (task.ids, task.mask))
        rows = torch.arange(len(ids), device="cpu")
        ids[rows, task.asked + 1] = torch.tensor(task.answers, dtype=torch.int64, device="cpu")[task.labels]
        mask[rows, task.asked + 1] = True
        what = "bracket prompts with their answers"
    except Refused as error:
        wide = min(length, 64)
        rng = np.random.default_rng([seed, 2])
        shape = (max(GROUPS, -(-tokens // wide)), wide)
        ids = torch.from_numpy(rng.integers(model.config.vocab_size, size=shape))
        mask, what = torch.ones(ids.shape, dtype=torch.bool, device="cpu"), "random ids"
        left_out.append(f"The model was measured on random ids, since bracket prompts can't be made ({error}).")
    ids, mask = ids[:, :length], mask[:, :length]
    return [Texts(ids[i : i + 64], mask[i : i + 64]) for i in range(0, len(ids), 64)], what


def _controls(model: CircuitGPT, nulls: Sequence[str], left_out: list[str]) -> dict[str, CircuitGPT]:
    controls = {"untrained": untrained(model)} if "untrained" in nulls else {}
    twin = model.card.get("controls", {}).get("no-topk")
    if twin is None:
        left_out.append(
            "The given model has no dense twin, so dense training and the mask put on afterwards were left out."
        )
        return controls
    dense = CircuitGPT.from_pretrained(twin)
    return {**controls, "dense": dense, "dense, mask afterwards": masked_afterwards(dense, model)}


def _jackknife(rows: Mapping[str, Rows]) -> dict[str, list[float]]:
    """95 % intervals of the means over hooks by leaving out each of GROUPS groups of prompts (Efron & Stein 1981)."""
    which = PRIMARY.partition(".")[0]
    draws: dict[str, list[np.ndarray]] = {"top1": [], "top3": [], "effective_rank": []}
    whole: dict[str, list[float]] = {name: [] for name in draws}
    for of_hook in rows.values():
        gradient = torch.nn.functional.normalize(of_hook.gradient(which), dim=1)
        group = of_hook.text * GROUPS // (int(of_hook.text.max()) + 1)
        directed = gradient.abs().sum(1) > 0
        parts = [gradient[directed & (group == g)] for g in range(GROUPS)]
        parts = [part for part in parts if len(part)]
        if len(parts) < 2:
            continue
        total = StreamingCovariance(gradient.shape[1]).update(torch.cat(parts))
        left = []
        for part in parts:
            other = StreamingCovariance(gradient.shape[1]).merge(total)
            left.append(_figures_of(other.subtract(StreamingCovariance(gradient.shape[1]).update(part))))
        if len(left) < GROUPS:
            continue
        for i, name in enumerate(draws):
            draws[name].append(np.array(left)[:, i])
            whole[name].append(_figures_of(total)[i])
    intervals = {}
    for name, columns in draws.items():
        if not columns:
            intervals[name] = [float("nan"), float("nan")]
            continue
        log = name == "effective_rank"  # its mean over hooks is the geometric one
        by_group = np.mean(np.log(columns) if log else columns, axis=0)
        middle = float(np.mean(np.log(whole[name]) if log else whole[name]))
        interval = jackknife(torch.tensor(middle, dtype=torch.float64, device="cpu"), torch.from_numpy(by_group))
        ends = [float(interval.low), float(interval.high)]
        intervals[name] = [float(np.exp(end)) for end in ends] if log else ends
    return intervals


def _figures_of(state: StreamingCovariance) -> tuple[float, float, float]:
    return shares_and_rank(state.eigenvalues().numpy())


def interval_words(own: Own) -> str:
    """The intervals of the given model, as a sentence."""
    if not own.interval:
        return "There are none for the given model"
    intervals = own.interval["means_over_hooks"]
    return (
        f"For the given model, jackknife over {GROUPS} groups of prompts: first component "
        f"[{intervals['top1'][0]:.1%}, {intervals['top1'][1]:.1%}], first three [{intervals['top3'][0]:.1%}, "
        f"{intervals['top3'][1]:.1%}], effective rank [{intervals['effective_rank'][0]:.1f}, "
        f"{intervals['effective_rank'][1]:.1f}]"
    )
