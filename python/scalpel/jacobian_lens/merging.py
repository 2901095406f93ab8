"""Whether lenses may be merged, and the matrices and errors of their merger where only means are known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .matrices import Lens

__all__ = ["check_mergeable", "merged_about", "merged_means"]

# What two lenses must have in common to be means of the same thing. The corpus is not among it.
_ALIKE = (
    "model",
    "weights_sha256",
    "revision",
    "dtype",
    "precision",
    "target",
    "skip_first",
    "max_tokens",
    "targets",
    "estimator",
    "groups",
)
# Names of one model may differ, such as a path and a hub id: equal weights are enough.
_NAMES = ("model", "revision")


def check_mergeable(lenses: Sequence[Lens]) -> None:
    """Check that lenses are means of the same matrices over other prompts.

    Raises:
        ValueError: They differ in what the message names.
    """
    first, *others = lenses
    for number, other in enumerate(others, 1):
        if other.source_layers != first.source_layers or other.d_model != first.d_model:
            raise ValueError(
                f"the lens and number {number} of the others have the layers {first.source_layers} of width "
                f"{first.d_model} and {other.source_layers} of width {other.d_model}; they must be the same"
            )
        one, two = first.about, other.about
        same_weights = one.get("weights_sha256") is not None and one.get("weights_sha256") == two.get("weights_sha256")
        compared = [name for name in _ALIKE if not (same_weights and name in _NAMES)]
        known = [name for name in compared if name in one and name in two]
        differing = [name for name in known if one[name] != two[name]]
        if differing:
            listed = ", ".join(f"{name} ({one[name]!r} and {two[name]!r})" for name in differing)
            raise ValueError(
                f"the lens and number {number} of the others differ in {listed}, so their mean is a lens of neither"
            )
        unknown = [name for name in compared if (name in one) != (name in two)]
        if unknown or not known:
            what = ", ".join(unknown) if unknown else "how they were fitted"
            warnings.warn(
                f"of the lenses that are merged one doesn't say {what}, so it can't be checked that they are alike",
                stacklevel=4,
            )


def merged_means(lenses: Sequence[Any]) -> tuple[dict[Any, Tensor], int, dict[Any, float]]:
    """Merge lenses of which only means are known: the mean of their matrices by their numbers of prompts.

    With n prompts, mean J̄ and relative error e of a lens, Σ‖J_p‖² = n ‖J̄‖² (1 + (n - 1) e²), by the definition of the
    error; for one prompt it is ‖J̄‖². The sums of all lenses give the error of their merger by the same definition.

    Returns:
        The matrices, the number of prompts, and the relative errors; NaN where one of several prompts is unknown.

    Raises:
        ValueError: A lens doesn't say how many prompts it is the mean of.
    """
    counts = [int(lens.n_prompts) for lens in lenses]
    if min(counts) < 1:
        raise ValueError(
            f"the lenses are means over {counts} prompts, and one that doesn't say its number has no weight"
        )
    total = sum(counts)
    matrices, errors = {}, {}
    for layer in lenses[0].source_layers:
        summed, norms = torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
        for lens, n in zip(lenses, counts, strict=True):
            matrix = lens.J[layer].double()
            summed = summed + n * matrix
            spread = 0.0 if n == 1 else (n - 1) * lens.error[layer] ** 2
            norms += n * float(matrix.square().sum()) * (1 + spread)
        mean = summed / total
        square = float(mean.square().sum())
        errors[layer] = _error(norms / total, square, total)
        matrices[layer] = mean.float()
    return matrices, total, errors


def _error(norms: float, square: float, n: int) -> float:
    if n < 2 or math.isnan(norms):
        return math.nan
    if square == 0:
        return 0.0 if norms == 0 else math.inf
    return math.sqrt(max(0.0, norms - square) / ((n - 1) * square))


def merged_about(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all lenses; of the corpora, each one's digest."""
    first, *others = abouts
    merged = {
        name: value for name, value in first.items() if all(name in each and each[name] == value for each in others)
    }
    for name in sorted({name for each in abouts for name in each if "corpus" in name}):
        if name not in merged:
            merged[name] = [each.get(name) for each in abouts]
    return merged
