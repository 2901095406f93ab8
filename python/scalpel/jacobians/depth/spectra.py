"""Figures of the spectra of a chain of layers: rank by depth with its uncertainty, alignment, and what is lost."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from .graded import GradedProduct

_ERRORS = 3.0  # standard errors either side of an estimated tail


@dataclass(frozen=True)
class Spectra:
    """The T largest singular values of D maps, and what is known of the rest.

    ``log_values``: (D, T) float64, natural logarithms, descending; −inf for a value that is zero to rounding.
    ``sizes``: how many singular values each map has that may be other than zero: min(m, n), or the bound on its
    rank. ``tail_energy``: (D, 2) float64, or None: Σ_{i>T} σ_i² in units of σ_1², and its standard error, by
    Hutchinson's estimator on the map with its T leading right singular vectors projected out.
    """

    log_values: Tensor
    sizes: tuple[int, ...]
    tail_energy: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """(D, T) float64: σ_i themselves; where the logarithm leaves float64's range they are 0 or infinite."""
        return self.log_values.exp()

    @property
    def zeros(self) -> Tensor:
        """(D,) int64: how many of the T values are zero to rounding."""
        return (self.log_values == -math.inf).sum(dim=1)

    def effective_rank(self, of: Literal["singular", "eigen"] = "singular", certain: bool = True) -> Tensor:
        """(D, 2) float64: the least and the most that exp(−Σ p_i ln p_i) can be.

        of="singular": p_i = σ_i / Σσ (Roy and Vetterli 2007); of="eigen": p_i = σ_i² / Σσ². 0 for a zero map.
        The unseen values, ``sizes`` − T of them, each lie in [0, σ_T]. The entropy is quasi-concave in them and
        grows with the smallest value, so the least is at none of them and the most at all of them equal to σ_T: both
        are attained, and certain as far as the T values are right. ``certain=False`` also holds their energy to
        ``tail_energy`` plus three standard errors, which lowers the upper end to where they share it equally; the lower
        end stays certain.
        """
        if of not in ("singular", "eigen"):
            raise ValueError(f"of is {of!r}; allowed: 'singular', 'eigen'")
        power = 1 if of == "singular" else 2
        ranks = []
        for row, unseen, tail in self._rows(certain):
            ends = []
            for size in (0.0, _largest_tail(row, unseen, tail)):
                ends.append(_exp_entropy(row**power, unseen if size > 0 else 0, size**power))
            ranks.append(ends)
        return torch.tensor(ranks, dtype=torch.float64, device="cpu")

    def stable_rank(self, certain: bool = True) -> Tensor:
        """Bound Σ σ_i² / σ_1² (Rudelson and Vershynin 2007) from below and above: (D, 2) float64.

        It is 0 for a zero map. ``certain`` is as in :meth:`effective_rank`; here the estimate narrows both ends.
        """
        ranks = []
        for row, unseen, tail in self._rows(certain):
            seen = float((row**2).sum())
            most = unseen * float(row[-1]) ** 2
            low, high = (0.0, most) if tail is None else (min(tail[0], most), min(tail[1], most))
            ranks.append([seen + low, seen + high])
        return torch.tensor(ranks, dtype=torch.float64, device="cpu")

    def _rows(self, certain: bool) -> list[tuple[Tensor, int, tuple[float, float] | None]]:
        """For each map: σ / σ_1, the number unseen, and the interval of its tail's energy where it is estimated."""
        if not certain and self.tail_energy is None:
            raise ValueError("certain is False and no tail was estimated: ask for probes, or leave certain at True")
        rows = []
        for i, row in enumerate(self.log_values):
            scaled = (row - row[0]).exp() if row[0] > -math.inf else torch.zeros_like(row)
            tail = None
            if not certain and self.tail_energy is not None:
                mean, error = self.tail_energy[i].tolist()
                tail = (max(0.0, mean - _ERRORS * error), mean + _ERRORS * error)
            rows.append((scaled, max(0, self.sizes[i] - len(row)), tail))
        return rows


def _largest_tail(row: Tensor, unseen: int, tail: tuple[float, float] | None) -> float:
    last = float(row[-1])
    return last if tail is None or unseen == 0 else min(last, math.sqrt(tail[1] / unseen))


def _exp_entropy(weights: Tensor, more: int, size: float) -> float:
    """Compute exp of the entropy of ``weights`` with ``more`` weights of ``size`` beside them."""
    total = float(weights.sum()) + more * size
    if total <= 0:
        return 0.0
    p = torch.tensor(size / total, dtype=torch.float64, device="cpu")
    return math.exp(float(torch.special.entr(weights / total).sum()) + more * float(torch.special.entr(p)))


@dataclass(frozen=True)
class Alignment:
    """How the directions that a layer writes meet those that the next one reads, and what that does to the product.

    Layer l has r_l ≤ T singular triples (u, σ, v) that aren't zero, in spaces of n dimensions; l counts from 1. Where
    σ_T is hardly above σ_{T+1}, as in the cluster near 1 that a residual path leaves, which directions are among the T
    is arbitrary: choose T at a gap.
    ``cosines``: (D − 1, T), descending, of the principal angles between the span of layer l's u and of layer l + 1's
    v, the singular values of V_{l+1}ᵀ U_l; 0 past the smaller rank. ``overlap``: (D − 1,), the mean of their
    squares, ‖V_{l+1}ᵀ U_l‖_F² / min(r_l, r_{l+1}): 1 where one span holds the other, nan where a rank is 0.
    ``expected``: (D − 1,), its mean for random subspaces, max(r_l, r_{l+1}) / n.
    ``exponents``: (T,), (1/D) log σ_i of the product of the layers *cut to their T triples*, singular vectors as they
    are. ``null_exponents``: (draws, T), the same with every layer's singular values kept and its singular vectors drawn
    at random (Haar). Compare these two with each other: only where T is the whole space are the first the exponents of
    the product. All float64; −inf where the value is zero.
    """

    cosines: Tensor
    overlap: Tensor
    expected: Tensor
    exponents: Tensor
    null_exponents: Tensor


Triples = tuple[Tensor, Tensor, Tensor]


def measure_alignment(layers: list[Triples], floor: float, draws: int, seed: int) -> Alignment:
    """Measure the :class:`Alignment` of layers given as (U (n, T), S (T,), Vh (T, n)).

    ``floor``: values of at most this fraction of a layer's largest count as zero.
    """
    width = len(layers[0][1])
    cut = []
    for U, S, Vh in layers:
        rank = int((floor * S[0] < S).sum())
        cut.append((U[:, :rank], S[:rank].cpu().double().numpy(), Vh[:rank]))
    cosines = torch.zeros(len(cut) - 1, width, dtype=torch.float64, device="cpu")
    overlap, expected, meetings = [], [], []
    for i, ((U, _, _), (_, _, Vh)) in enumerate(pairwise(cut)):
        meeting = (Vh.double() @ U.double()).cpu().numpy()
        between = np.linalg.svd(meeting, compute_uv=False).clip(0, 1)
        cosines[i, : len(between)] = torch.from_numpy(between)
        overlap.append(float((between**2).mean()) if len(between) else math.nan)
        expected.append(max(meeting.shape) / U.shape[0])
        meetings.append(meeting)
    values = [S for _, S, _ in cut]
    rng = np.random.default_rng(seed)
    nulls = []
    for _ in range(draws):
        drawn = []
        for meeting, (U, _, _) in zip(meetings, cut, strict=False):
            rows, columns = meeting.shape
            drawn.append(haar_block(rows, columns, U.shape[0], rng))
        nulls.append(_exponents(values, drawn, floor, width))
    return Alignment(
        cosines,
        torch.tensor(overlap, dtype=torch.float64, device="cpu"),
        torch.tensor(expected, dtype=torch.float64, device="cpu"),
        _exponents(values, meetings, floor, width),
        torch.stack(nulls) if nulls else torch.zeros(0, width, dtype=torch.float64, device="cpu"),
    )


def _exponents(values: list[np.ndarray], meetings: list[np.ndarray], floor: float, width: int) -> Tensor:
    """Of S_D C_{D−1} S_{D−1} … C_1 S_1, the cut layers between their own singular vectors."""
    product = GradedProduct(len(values[0]))
    for i, S in enumerate(values):
        # neither the values nor the cosines of a meeting are known below their own rounding
        if i:
            product.extend(meetings[i - 1], floor)
        product.extend(np.diag(S), 0.0)
    return padded(product.svd()[1], width) / len(values)


def padded(logs: np.ndarray, width: int) -> Tensor:
    """``logs`` as a tensor (width,), cut, or filled with −inf: the values past the rank are zero."""
    full = torch.full((width,), -math.inf, dtype=torch.float64, device="cpu")
    full[: len(logs)] = torch.from_numpy(logs[:width])
    return full


def haar_block(rows: int, columns: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """The upper left (rows, columns) corner of a random orthogonal matrix (n, n), without making it.

    An n × columns Gaussian matrix, orthonormalised by the Cholesky factor of its Gram matrix, has Haar columns; of its
    rows past the corner only their Gram matrix counts, a Wishart matrix, drawn by Bartlett's decomposition (1933).
    """
    corner = rng.standard_normal((rows, columns))
    freedom = n - rows
    if freedom >= columns:
        below = np.tril(rng.standard_normal((columns, columns)), -1)
        below[np.diag_indices(columns)] = np.sqrt(rng.chisquare(freedom - np.arange(columns)))
        rest = below.T
    else:
        rest = rng.standard_normal((freedom, columns))
    Q, R = np.linalg.qr(np.concatenate([corner, rest]))
    block: np.ndarray = Q[:rows] * np.where(np.diagonal(R) < 0, -1.0, 1.0)  # Cholesky's sign, which doesn't depend on Q
    return block


def rank_bound(model: Any, source: str, target: str, tokens: int, identity: bool) -> int | None:
    """Bound the rank of a layer's map, of ``tokens`` tokens, by the TopKs and widths of a CircuitGPT.

    None where they set no bound below the width of the residual stream.

    With the identity path only a TopK on the residual stream itself bounds the rank: tokens · k, whichever of
    resid_post_attn and resid_post_mlp keeps less. Without it (J − I) the map is the attention's plus the MLP's, and
    each has at most tokens · (the fewest channels that it passes through): the sum of the two. There is no bound
    without it where a TopK or ReLU on the residual stream, or an intervention, makes J − I more than these two; nor for
    other models, other hooks, or modules with forward hooks.
    """
    if not isinstance(model, CircuitGPT):
        return None
    config = model.config
    stream = [f"{i}.resid_in" for i in range(config.n_layer)] + ["final_resid"]
    if source not in stream or target not in stream:
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    width = config.d_model
    on_stream = [config.k_at(location, width) for location in ("resid_post_attn", "resid_post_mlp")]
    kept = [k for k in on_stream if k is not None]
    if identity:
        most = min(kept, default=width)
    else:
        is_one_layer = stream.index(target) == stream.index(source) + 1
        if kept or config.residual_activation_type == "relu" or model._interventions or not is_one_layer:
            return None

        def k(location: str, of: int | None) -> int:
            assert of is not None
            kept = config.k_at(location, of)
            return of if kept is None else kept

        qkv = sum(k(location, config.d_attn) for location in ("attn_q", "attn_k", "attn_v"))
        attention = min(width, k("attn_in", config.d_in), qkv, config.d_attn, k("attn_out", width))
        mlp = min(width, k("mlp_in", config.d_in), k("mlp_neuron", config.d_mlp), k("mlp_out", width))
        most = attention + mlp
    return tokens * most if most < width else None
