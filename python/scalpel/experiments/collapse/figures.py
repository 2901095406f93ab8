"""Figures of collapse: by hook and by r on the given model, and over training in the study."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .generators import LEAST, LETTERS
from .measure import Measured, Pair, area, score
from .training import PRIMARY, Study, band

__all__ = ["GRID", "hook_figures", "score_curves", "score_figure", "study_figures"]

GRID = np.arange(1, 32) / 32  # r as a share of the live channels; at 1 there is nothing to score
ROTATIONS = 8

ByHook = Mapping[str, Mapping[str, Measured]]


def score_curves(pairs: Mapping[str, Pair], rotations: int, seed: int) -> dict[str, Any]:
    """Scores at every r, as means over a model's hooks.

    Returns:
        "onto": the score of the activations' directions in the gradient's covariance, (len(GRID),), as the mean over
        hooks at the same share r / width. "reverse": that of the gradient's directions in the activations' covariance.
        "rotated": the score of random orthonormal bases in place of the activations' directions, (rotations,
        len(GRID)); "rotated_area": its areas, (rotations,).
    """
    rng = np.random.default_rng([seed, 7])
    onto, reverse, rotated, areas = [], [], [], []
    for pair in pairs.values():
        if len(pair.gradient.values) < 2:
            continue
        onto.append(_on_grid(score(*pair.onto())))
        reverse.append(_on_grid(score(*pair.reverse())))
        random_bases = [pair.rotated(rng) for _ in range(rotations)]
        rotated.append([_on_grid(score(*basis)) for basis in random_bases])
        areas.append([area(*basis) for basis in random_bases])
    nothing = np.full(len(GRID), np.nan)
    return {
        "onto": np.mean(onto, axis=0) if onto else nothing,
        "reverse": np.mean(reverse, axis=0) if reverse else nothing,
        "rotated": np.mean(rotated, axis=0) if rotated and rotations else np.full((0, len(GRID)), np.nan),
        "rotated_area": np.mean(areas, axis=0) if areas and rotations else np.full(0, np.nan),
    }


def _on_grid(values: np.ndarray) -> np.ndarray:
    """Scores for r = 1 … width, interpolated linearly to the shares of GRID."""
    r = np.arange(1, len(values) + 1) / len(values)
    known = np.isfinite(values)
    return np.interp(GRID, r[known], values[known]) if known.any() else np.full(len(GRID), np.nan)


def hook_figures(measured: Mapping[str, ByHook], variant: str = PRIMARY) -> list[dict[str, Any]]:
    """Top-1 share, top-3 share and effective rank by hook, for the model and its controls."""
    fields = {
        "top1": "Share of the first component",
        "top3": "Share of the first three components",
        "equal_rank": "Effective rank on equally many live channels",
    }
    hooks = list(next(iter(measured.values())))
    return [
        {
            "kind": "curves",
            "title": f"{title}, by hook",
            "summary": "Hooks in the order of the forward pass: " + ", ".join(hooks) + ".",
            "xlabel": "hook, in the order of the forward pass",
            "ylabel": "share of the gradient's variance" if field != "equal_rank" else "effective rank",
            "series": [
                {
                    "label": name,
                    "x": list(range(1, len(hooks) + 1)),
                    "y": [getattr(by_hook[hook][variant], field) for hook in hooks],
                    "style": "line" if name == "model" else "dashed",
                }
                for name, by_hook in measured.items()
            ],
            **({"hlines": [{"y": 0.712, "label": "seed: 71.2 %"}]} if field == "top1" else {}),
            **({"hlines": [{"y": 0.889, "label": "seed: 88.9 %"}]} if field == "top3" else {}),
            **({"hlines": [{"y": 10.0, "label": "seed: 10 of 512"}]} if field == "equal_rank" else {}),
        }
        for field, title in fields.items()
    ]


def score_figure(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The score by r for the model and its controls, with the band of the rotated null."""
    series: list[dict[str, Any]] = []
    for name, scores in curves.items():
        series.append({"label": name, "x": GRID, "y": scores["onto"], "style": "line" if name == "model" else "dashed"})
    own = curves["model"]
    series.append({"label": "model, reverse", "x": GRID, "y": own["reverse"], "style": "dashed"})
    if len(own["rotated"]):
        draws = own["rotated"]
        ends = {"low": draws.min(0), "high": draws.max(0)}
        series.append({"label": "rotated", "x": GRID, "y": draws.mean(0), **ends})
    return {
        "kind": "curves",
        "title": "How well the activations' leading r directions capture the gradient's variance",
        "summary": "1 is as well as the gradient's own components, 0 as well as random directions. Means over hooks.",
        "xlabel": "r as a share of the live channels",
        "ylabel": "(captured - random) / (PCA - random)",
        "series": series,
    }


def study_figures(study: Study) -> dict[str, dict[str, Any]]:
    """Effective rank and score over training by arm, and the accuracy of the generators."""
    x = np.log2(1 + np.array(study.steps, dtype=float))
    xlabel = f"log2(1 + training steps); the last is {study.steps[-1]} steps"
    arms = ("topk", "dense", "afterwards", "shuffled")
    labels = {"afterwards": "dense, mask afterwards", "shuffled": "topk, supports shuffled"}

    def over(field: str, title: str, ylabel: str) -> dict[str, Any]:
        return {
            "kind": "curves",
            "title": title,
            "summary": f"Means over hooks and {len(study.seeds)} seeds; bands are 95 % t intervals over seeds.",
            "xlabel": xlabel,
            "ylabel": ylabel,
            "series": [
                {
                    "label": labels.get(arm, arm),
                    "x": x,
                    **band(study.course(arm, field)),
                    "style": "line" if arm in ("topk", "dense") else "dashed",
                }
                for arm in arms
            ],
        }

    return {
        "rank_over_training": over("equal_rank", "Effective rank of the gradient over training", "effective rank"),
        "score_over_training": over("area", "Activations in the gradient's components over training", "score's area"),
        "generators_over_training": {
            "kind": "curves",
            "title": "Generators as they are learned",
            "summary": "Share of words at which a letter moves the answer as it should, balanced over states.",
            "xlabel": xlabel,
            "ylabel": "accuracy",
            "series": [
                {
                    "label": f"{letter} {arm}",
                    "x": x,
                    **{name: np.clip(y, 0, 1) for name, y in band(study.generators(arm, letter)).items()},
                    "group": letter,
                    "style": "line" if arm == "topk" else "dashed",
                }
                for arm in ("topk", "dense")
                for letter in LETTERS
            ],
            "hlines": [{"y": LEAST, "label": f"{LEAST:.0%}: the generator is present"}],
        },
    }


def table(measured: Mapping[str, ByHook], variants: Sequence[str]) -> dict[str, Any]:
    """Means over hooks, {condition: {variant: {field: mean}}}; of ranks the geometric mean."""

    def mean(values: list[float], log: bool) -> float:
        known = np.array([v for v in values if np.isfinite(v)])
        if not len(known):
            return float("nan")
        return float(np.exp(np.log(known).mean())) if log else float(known.mean())

    fields = ("top1", "top3", "effective_rank", "equal_rank", "area", "reverse_area", "live")
    return {
        name: {
            variant: {
                field: mean(
                    [float(getattr(by_variant[variant], field)) for by_variant in by_hook.values()],
                    field.endswith("_rank"),
                )
                for field in fields
            }
            for variant in variants
        }
        for name, by_hook in measured.items()
    }
