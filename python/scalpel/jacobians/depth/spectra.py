"""Figures computed from the spectra of a chain of layers: ranks with their uncertainty, and alignment.

They include bounds on the rank of a layer, which tell how many directions it loses.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...hooks.standing import as_analysed
from ...models.circuitgpt.model import CircuitGPT
from .graded import GradedProduct

_ERRORS = 3.0  # standard errors on either side of an estimated tail energy


@dataclass(frozen=True)
class Spectra:
    """The T largest singular values of D maps, and what is known of the remaining ones.

    ``log_values``: (D, T) float64, natural logarithms, descending; −inf for a value that is zero to rounding.
    ``sizes``: how many singular values of each map may be nonzero: min(m, n), or the bound on its rank.
    ``tail_energy``: (D, 2) float64, or None where it was not estimated: Σ_{i>T} σ_i² in units of σ_1², and its standard
    error, by Hutchinson's estimator on the map with its T leading right singular vectors projected out.
    """

    log_values: Tensor
    sizes: tuple[int, ...]
    tail_energy: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The singular values σ_i, (D, T) float64; those outside the range of float64 are 0 or infinite."""
        return self.log_values.exp()

    @property
    def zeros(self) -> Tensor:
        """How many of the T values of each map are zero to rounding, (D,) int64."""
        return (self.log_values == -math.inf).sum(dim=1)

    def effective_rank(self, of: Literal["singular", "eigen"] = "singular", certain: bool = True) -> Tensor:
        """Bound the effective rank exp(−Σ p_i ln p_i) from below and above: (D, 2) float64.

        of="singular": p_i = σ_i / Σσ (Roy and Vetterli 2007); of="eigen": p_i = σ_i² / Σσ². It is 0 for a zero map.

        The unseen values, ``sizes`` − T of them, each lie in [0, σ_T]. The entropy is quasi-concave in them and
        grows with the smallest value. So the lower bound has all of them at 0, the upper bound has all of them at σ_T,
        and both can be attained; they are certain as far as the T values are right. ``certain=False`` also limits the
        energy of the unseen values to ``tail_energy`` plus three standard errors. The upper bound then has that energy
        shared equally among them; the lower bound stays certain.
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

        It is 0 for a zero map. ``certain`` is as in :meth:`effective_rank`, but here the estimate narrows both bounds.
        """
        ranks = []
        for row, unseen, tail in self._rows(certain):
            seen = float((row**2).sum())
            most = unseen * float(row[-1]) ** 2
            low, high = (0.0, most) if tail is None else (min(tail[0], most), min(tail[1], most))
            ranks.append([seen + low, seen + high])
        return torch.tensor(ranks, dtype=torch.float64, device="cpu")

    def _rows(self, certain: bool) -> list[tuple[Tensor, int, tuple[float, float] | None]]:
        """For each map: σ / σ_1, the number of unseen values, and the interval of their energy, which may be None.

        The energy has an interval only where ``certain`` is False.
        """
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
    """The value that every unseen singular value has at the upper bound of the effective rank."""
    last = float(row[-1])
    return last if tail is None or unseen == 0 else min(last, math.sqrt(tail[1] / unseen))


def _exp_entropy(weights: Tensor, more: int, size: float) -> float:
    """Compute exp of the entropy of ``weights`` together with ``more`` further weights of ``size`` each."""
    total = float(weights.sum()) + more * size
    if total <= 0:
        return 0.0
    p = torch.tensor(size / total, dtype=torch.float64, device="cpu")
    return math.exp(float(torch.special.entr(weights / total).sum()) + more * float(torch.special.entr(p)))


@dataclass(frozen=True)
class Alignment:
    """How the directions that a layer writes align with those that the next one reads, and the effect on the product.

    Layer l, counted from 1, has r_l ≤ T singular triples (u, σ, v) with σ > 0, in spaces of n dimensions. Where σ_T is
    hardly larger than σ_{T+1}, as in the cluster near 1 that a residual path leaves, it is arbitrary which directions
    are among the T. Choose T at a gap.

    ``cosines``: (D − 1, T), descending: the cosines of the principal angles between the span of the u of layer l and
    the span of the v of layer l + 1, which are the singular values of V_{l+1}ᵀ U_l; 0 past the smaller rank.
    ``overlap``: (D − 1,), the mean of their squares, ‖V_{l+1}ᵀ U_l‖_F² / min(r_l, r_{l+1}): 1 where one span contains
    the other, nan where a rank is 0.
    ``expected``: (D − 1,), the mean overlap of random subspaces, max(r_l, r_{l+1}) / n.
    ``exponents``: (T,), (1/D) log σ_i of the product of the layers *cut to their T triples*.
    ``null_exponents``: (draws, T), the same where every layer keeps its singular values but has random singular vectors
    (Haar). Compare these two with each other: ``exponents`` are those of the uncut product only where T is the whole
    space. All are float64, and −inf where the value is zero.
    """

    cosines: Tensor
    overlap: Tensor
    expected: Tensor
    exponents: Tensor
    null_exponents: Tensor


Triples = tuple[Tensor, Tensor, Tensor]


def measure_alignment(layers: list[Triples], floor: float, draws: int, seed: int) -> Alignment:
    """Measure the :class:`Alignment` of layers given as (U (n, T), S (T,), Vh (T, n)).

    Singular values of up to the fraction ``floor`` of a layer's largest count as zero. The null has ``draws`` products
    of random singular vectors.
    """
    T = len(layers[0][1])
    layers_cut = []
    for U, S, Vh in layers:
        rank = int((floor * S[0] < S).sum())
        layers_cut.append((U[:, :rank], S[:rank].cpu().double().numpy(), Vh[:rank]))
    cosines = torch.zeros(len(layers_cut) - 1, T, dtype=torch.float64, device="cpu")
    overlap, expected, meetings = [], [], []
    for i, ((U, _, _), (_, _, Vh)) in enumerate(pairwise(layers_cut)):
        meeting = (Vh.double() @ U.double()).cpu().numpy()
        pair_cosines = np.linalg.svd(meeting, compute_uv=False).clip(0, 1)
        cosines[i, : len(pair_cosines)] = torch.from_numpy(pair_cosines)
        overlap.append(float((pair_cosines**2).mean()) if len(pair_cosines) else math.nan)
        expected.append(max(meeting.shape) / U.shape[0])
        meetings.append(meeting)
    values = [S for _, S, _ in layers_cut]
    rng = np.random.default_rng(seed)
    null_exponents = []
    for _ in range(draws):
        random_meetings = []
        for meeting, (U, _, _) in zip(meetings, layers_cut, strict=False):
            rows, columns = meeting.shape
            random_meetings.append(haar_block(rows, columns, U.shape[0], rng))
        null_exponents.append(_exponents(values, random_meetings, floor, T))
    return Alignment(
        cosines,
        torch.tensor(overlap, dtype=torch.float64, device="cpu"),
        torch.tensor(expected, dtype=torch.float64, device="cpu"),
        _exponents(values, meetings, floor, T),
        torch.stack(null_exponents) if null_exponents else torch.zeros(0, T, dtype=torch.float64, device="cpu"),
    )


def _exponents(values: list[np.ndarray], meetings: list[np.ndarray], floor: float, width: int) -> Tensor:
    """The exponents of S_D C_{D−1} S_{D−1} … C_1 S_1, with S_l the ``values`` and C_l the ``meetings``.

    This is the product of the cut layers, each written in its own singular vectors.
    """
    product = GradedProduct(len(values[0]))
    for i, S in enumerate(values):
        # the entries of a meeting are known only down to their rounding
        if i:
            product.extend(meetings[i - 1], floor)
        product.extend(np.diag(S), 0.0)
    return padded(product.svd()[1], width) / len(values)


def padded(logs: np.ndarray, width: int) -> Tensor:
    """Return ``logs`` as a tensor (width,), cut off or filled up with −inf, since values past the rank are zero."""
    full = torch.full((width,), -math.inf, dtype=torch.float64, device="cpu")
    full[: len(logs)] = torch.from_numpy(logs[:width])
    return full


def haar_block(rows: int, columns: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the upper left (rows, columns) corner of a random orthogonal matrix (n, n) without making the whole matrix.

    An n × columns Gaussian matrix has Haar columns once the Cholesky factor of its Gram matrix orthonormalises it. Its
    rows below the corner enter through their Gram matrix alone. That is a Wishart matrix, which Bartlett's
    decomposition (1933) draws directly.
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
    block: np.ndarray = Q[:rows] * np.where(np.diagonal(R) < 0, -1.0, 1.0)  # the sign that Cholesky gives R
    return block


def rank_bound(model: Any, source: str, target: str, tokens: int, identity: bool) -> int | None:
    """Bound the rank of a layer's map over ``tokens`` tokens by the TopKs and widths of a CircuitGPT.

    With the identity path, only a TopK on the residual stream itself bounds the rank, by tokens · k, where k is the
    smaller one of resid_post_attn and resid_post_mlp. Without the identity path (J − I), the map is the sum of the
    attention's and the MLP's. The rank of each is at most tokens times the fewest channels that it passes through, and
    the bound is the sum of both.

    Returns None where there is no bound below the width of the residual stream; for other models, other hooks, and
    modules with forward hooks; and for J − I where a TopK or ReLU on the residual stream, or an intervention, adds more
    to it than attention and MLP.
    """
    model = as_analysed(model)
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
    kept_on_stream = [k for k in on_stream if k is not None]
    if identity:
        most = min(kept_on_stream, default=width)
    else:
        is_one_layer = stream.index(target) == stream.index(source) + 1
        if kept_on_stream or config.residual_activation_type == "relu" or model._interventions or not is_one_layer:
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
