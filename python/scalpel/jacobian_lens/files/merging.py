"""Whether lenses may be merged, and the matrices and errors of their merger where only means are known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..matrices import Lens
from ..provenance import SAME

__all__ = ["check_mergeable", "merged_about", "merged_means"]


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
        kinds = [about.get("control", "the lens itself") for about in (one, two)]
        if kinds != ["the lens itself"] * 2:
            raise ValueError(
                f"the lens and number {number} of the others include a control ({' and '.join(kinds)}), which is no "
                "mean over prompts: merge the lenses, then make the control"
            )
        known = [name for name in SAME if name in one and name in two]
        differing = [name for name in known if one[name] != two[name]]
        if differing:
            listed = ", ".join(f"{name} ({one[name]!r} and {two[name]!r})" for name in differing)
            raise ValueError(
                f"the lens and number {number} of the others differ in {listed}, so their mean is a lens of neither"
            )
        unknown = [name for name in SAME if name not in known]
        if unknown:
            warnings.warn(
                f"the lenses that are merged don't all say {', '.join(unknown)}, so it can't be checked that these are "
                "the same",
                stacklevel=4,
            )
    corpora = [lens.about["corpus_sha256"] for lens in lenses if lens.about.get("corpus_sha256") is not None]
    if len(set(map(str, corpora))) < len(corpora):
        warnings.warn(
            "two of the lenses that are merged were fitted on the same prompts, which now count twice: the errors are "
            "those of independent prompts, and too small",
            stacklevel=3,
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
    """What is the same in all lenses; of prompts, how many in all, and of corpora, each one's digest."""
    names = list(dict.fromkeys(name for about in abouts for name in about))
    merged: dict[str, Any] = {}
    for name in names:
        values = [about.get(name) for about in abouts]
        if "corpus" in name:
            merged[name] = values
        elif name.startswith("prompts_") and all(isinstance(value, int) for value in values):
            merged[name] = sum(values)
        elif all(value == values[0] for value in values):
            merged[name] = values[0]
    return merged
