"""Collapse on one model at its last step: the measures, their intervals by prompt, and those of its controls."""

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
_PROMPT_TOKENS = 18  # about, of a bracket prompt: how many prompts give so many tokens


class Own:
    """What was measured on the model given."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.measured: dict[str, Any] = {}
        self.interval: dict[str, Any] = {}
        self.null: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.summary = self.null_summary = ""

    @classmethod
    def of(cls, model: CircuitGPT, tokens: int, nulls: Sequence[str], seed: int) -> "Own":
        own = cls()
        every = topk_hooks(model)
        hooks = [name for name in every if hook_width(model, name) <= WIDEST]
        if not hooks:
            what = "only AbsTopKs that are wider" if every else "no AbsTopK"
            own.left_out.append(f"The model given has {what}, so nothing was measured on it; the study decides.")
            own.summary = "the model given has no AbsTopK to measure"
            return own
        if len(hooks) < len(every):
            own.left_out.append(f"Hooks wider than {WIDEST} channels: {', '.join(h for h in every if h not in hooks)}.")
        texts, what = _sample(model, tokens, seed, own.left_out)
        models = {"model": model, **_controls(model, nulls, own.left_out)}
        gathered = {name: gather(one, texts, hooks) for name, one in models.items()}
        conditions = {name: one.rows for name, one in gathered.items()}
        if "shuffled" in nulls:
            conditions["shuffled"] = shuffled(conditions["model"], np.random.default_rng([seed, 3]))
        own._fill(conditions, {name: one.loss for name, one in gathered.items()}, what, nulls, seed)
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
        found = compare(conditions, seed, pairs)
        means = table(found, VARIANTS)
        intervals = _jackknife(conditions["model"])
        rotations = ROTATIONS if "rotated" in nulls else 0
        curves = {
            name: score_curves(pairs.get(name, {}), rotations if name == "model" else 0, seed) for name in conditions
        }
        model = {variant: means["model"][variant] for variant in VARIANTS}
        own, raw = model[PRIMARY], model["post.raw.second"]
        count = len(next(iter(conditions["model"].values())).text)
        self.summary = (
            f"the model given, means over {len(conditions['model'])} hooks and {count} tokens of {text}: first "
            f"component {own['top1']:.1%}, first three {own['top3']:.1%}, effective rank {own['effective_rank']:.1f} "
            f"(behind the mask, raw and not centered: {raw['top1']:.1%}, {raw['top3']:.1%}, "
            f"{raw['effective_rank']:.1f}); the seed has 71.2 %, 88.9 %, 10 of 512"
        )
        self.measured = {
            "means_over_hooks": {"model": model},
            "by_hook": {hook: {v: vars(one) for v, one in of.items()} for hook, of in found["model"].items()},
            "losses": dict(losses),
            "score_by_r": {"r_as_share": GRID, "onto": curves["model"]["onto"], "reverse": curves["model"]["reverse"]},
            "text": text,
        }
        self.interval = {"means_over_hooks": intervals}
        self.null = {
            "means_over_hooks": {name: one for name, one in means.items() if name != "model"},
            "rotated_areas": curves["model"]["rotated_area"],
        }
        others = [
            f"{name}: effective rank {one[PRIMARY]['equal_rank']:.1f}, score {one[PRIMARY]['area']:.2f}"
            for name, one in means.items()
            if name != "model"
        ]
        if rotations:
            others.append(f"rotated: score {np.mean(curves['model']['rotated_area']):.2f}")
        mine = f"model: effective rank {own['equal_rank']:.1f}, score {own['area']:.2f}"
        self.null_summary = "; ".join([f"the model given (ranks on equally many live channels), {mine}", *others])
        self.figures = {
            **{f"by_hook_{i}": one for i, one in enumerate(hook_figures(found))},
            "score_by_r": score_figure(curves),
        }


def _sample(model: CircuitGPT, tokens: int, seed: int, left_out: list[str]) -> tuple[list[Texts], str]:
    """About ``tokens`` tokens of bracket prompts with their answers, or of random ids where there are none."""
    prompts = max(GROUPS, -(-tokens // _PROMPT_TOKENS))
    length = model.config.block_size
    try:
        task = bracket_counting(model, prompts, seed)
        ids, mask = (torch.nn.functional.pad(one, (0, 1)) for one in (task.ids, task.mask))
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
        left_out.append(f"Text: the model was measured on random ids, since bracket prompts can't be made ({error}).")
    ids, mask = ids[:, :length], mask[:, :length]
    return [Texts(ids[i : i + 64], mask[i : i + 64]) for i in range(0, len(ids), 64)], what


def _controls(model: CircuitGPT, nulls: Sequence[str], left_out: list[str]) -> dict[str, CircuitGPT]:
    found = {"untrained": untrained(model)} if "untrained" in nulls else {}
    twin = model.card.get("controls", {}).get("no-topk")
    if twin is None:
        left_out.append(
            "The model given has no dense twin: dense training, and the mask put on afterwards, are left out."
        )
        return found
    dense = CircuitGPT.from_pretrained(twin)
    return {**found, "dense": dense, "dense, mask afterwards": masked_afterwards(dense, model)}


def _jackknife(rows: Mapping[str, Rows]) -> dict[str, list[float]]:
    """95 % intervals of the means over hooks by leaving out each of GROUPS groups of prompts (Efron & Stein 1981)."""
    which = PRIMARY.partition(".")[0]
    draws: dict[str, list[np.ndarray]] = {"top1": [], "top3": [], "effective_rank": []}
    whole: dict[str, list[float]] = {name: [] for name in draws}
    for one in rows.values():
        gradient = torch.nn.functional.normalize(one.gradient(which), dim=1)
        group = one.text * GROUPS // (int(one.text.max()) + 1)
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
    found = {}
    for name, columns in draws.items():
        if not columns:
            found[name] = [float("nan"), float("nan")]
            continue
        log = name == "effective_rank"  # its mean over hooks is the geometric one
        each = np.mean(np.log(columns) if log else columns, axis=0)
        middle = float(np.mean(np.log(whole[name]) if log else whole[name]))
        interval = jackknife(torch.tensor(middle, dtype=torch.float64, device="cpu"), torch.from_numpy(each))
        ends = [float(interval.low), float(interval.high)]
        found[name] = [float(np.exp(end)) for end in ends] if log else ends
    return found


def _figures_of(state: StreamingCovariance) -> tuple[float, float, float]:
    return shares_and_rank(state.eigenvalues().numpy())


def interval_words(own: Own) -> str:
    """The intervals of the model given, for a sentence."""
    if not own.interval:
        return "None of the model given"
    found = own.interval["means_over_hooks"]
    return (
        f"Of the model given, jackknife over {GROUPS} groups of prompts: first component "
        f"[{found['top1'][0]:.1%}, {found['top1'][1]:.1%}], first three [{found['top3'][0]:.1%}, "
        f"{found['top3'][1]:.1%}], effective rank [{found['effective_rank'][0]:.1f}, {found['effective_rank'][1]:.1f}]"
    )
