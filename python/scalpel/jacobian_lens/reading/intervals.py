"""Intervals of a readout: how far logits and ranks of chosen tokens depend on the prompts that a lens was fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

__all__ = ["Intervals", "intervals"]

_NUMBERS = 1 << 25  # logits in memory at a time


@dataclass(frozen=True)
class Intervals:
    """Logits and ranks of chosen tokens, each with the ends of its 95 % interval, all (n, tokens) float64.

    A rank counts from 1, the token of the largest logit; of equal logits the lower id comes first.
    """

    logits: Tensor
    logits_low: Tensor
    logits_high: Tensor
    ranks: Tensor
    ranks_low: Tensor
    ranks_high: Tensor


def intervals(
    unembed: Callable[[Tensor], Tensor],
    per_prompt: Tensor,
    tokens: Sequence[int] | Tensor,
    *,
    resamples: int = 400,
    seed: int = 0,
    mean: Tensor | None = None,
    n_prompts: int | None = None,
) -> Intervals:
    """Compute intervals by a bootstrap over prompts, in which the final norm and the unembedding act on every mean.

    Prompts are drawn with replacement (Efron 1979). The deviations of the drawn means are widened by
    t(n − 1) / z · √(n / (n − 1)), Student's t against the normal, without which few prompts would give intervals that
    are too short (Hesterberg 2015, "What teachers should know about the bootstrap", section 5).

    Args:
        unembed: The readout, (..., width) to (..., vocab): final norm, unembedding, and a cap where the model has one.
        per_prompt: (prompts, n, width), J_p h of each prompt, such as ``transported(...).per_prompt[layer]``, or the
            products of each prompt's own matrix with n vectors.
        tokens: The ids whose logits and ranks are wanted.
        resamples: How many times prompts are drawn.
        seed: Of the draws.
        mean: (n, width), J̄ h of a lens, whose readout gets the intervals; by default the mean over these prompts.
        n_prompts: How many prompts that lens was fitted on, if others than these: the scatter of these, for a mean over
            so many.

    Returns:
        The figures of the mean over prompts with their intervals; the ends are NaN for a single prompt.

    Raises:
        ValueError: If there is no prompt or no draw, or the shape is another.

    Example:
        >>> import torch
        >>> from scalpel.jacobian_lens.reading.intervals import intervals
        >>> values = torch.tensor([[[1.0, 0.0]], [[1.2, 0.1]], [[0.8, -0.1]]])
        >>> found = intervals(lambda x: x @ torch.eye(2), values, [0])
        >>> float(found.ranks), bool(found.logits_low < 1 < found.logits_high)
        (1.0, True)
    """
    if per_prompt.dim() != 3 or not len(per_prompt):
        raise ValueError(f"per_prompt has shape {tuple(per_prompt.shape)}; it must be (prompts, n, width), not empty")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be 1 or more")
    count = len(per_prompt)
    chosen = torch.as_tensor(tokens, dtype=torch.int64, device=per_prompt.device)
    values = per_prompt.double()
    center = values.mean(0)
    mean = center if mean is None else mean.double()
    logits, ranks = _read(unembed, mean.to(per_prompt.dtype), chosen)
    if count == 1:
        none = torch.full_like(logits, torch.nan)
        return Intervals(logits, none, none, ranks, none, none)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    shares = torch.as_tensor(drawn, dtype=values.dtype, device=values.device)
    wider = float(stdtrit(count - 1, 0.975)) / 1.959964 * (count / (count - 1)) ** 0.5
    wider *= 1 if n_prompts is None else (count / n_prompts) ** 0.5
    means = mean + wider * torch.einsum("rp,pnw->rnw", shares, values - center)
    vocabulary = unembed(mean[:1].to(per_prompt.dtype)).shape[-1]
    at_once = max(1, _NUMBERS // (vocabulary * max(1, len(mean))))
    read = [_read(unembed, part.to(per_prompt.dtype), chosen) for part in means.split(at_once)]
    levels = torch.tensor([0.025, 0.975], dtype=values.dtype, device=values.device)
    of_logits, of_ranks = (torch.cat(each).quantile(levels, 0) for each in zip(*read, strict=True))
    return Intervals(logits, of_logits[0], of_logits[1], ranks, of_ranks[0], of_ranks[1])


def _read(unembed: Callable[[Tensor], Tensor], x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the ranks of ``tokens`` (..., tokens), in float64."""
    logits = unembed(x)
    own = logits[..., tokens]
    ranks = []
    for place, token in enumerate(tokens.tolist()):
        this = own[..., place, None]
        before = (logits > this).sum(-1) + (logits[..., :token] == this).sum(-1)
        ranks.append(1 + before.double())
    return own.double(), torch.stack(ranks, -1)
