"""The figures of one chunk of text: of a model in memory, as plain data.

Logarithms are natural; a list by layer has D entries, by hook D + 1; −inf (a singular value that is zero to rounding)
is None. See :class:`scalpel.jacobians.depth.result.Lyapunov` for each figure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.positions import Selected, read_at
from ..jacobians.depth.layers import layer_hooks
from ..jacobians.depth.lyapunov import lyapunov_of
from ..jacobians.depth.spectra import Spectra
from ..jacobians.entry import jacobians_between

Figures = dict[str, Any]


def measure(
    model: nn.Module,
    ids: Tensor,
    T: int,
    seed: int,
    depths: Sequence[int],
    counted: list[int] | None = None,
    step: Callable[[str, float], None] | None = None,
) -> Figures:
    """Measure ``model`` at ``ids`` (1, L), from the tokens that count to the tokens that count, with T directions.

    All tokens are attended to. ``counted`` lists the positions of those that count; None if all do. Tangents start at
    these tokens of the first hook and are read at these tokens of the last, with all tokens taking part between them; a
    layer by itself leads from these to these. Norms, active fractions and margins are taken over these tokens.

    The model runs once: one trace gives the layers' Jacobians, the active fractions and the margins.
    ``depths``: the numbers l of layers for which the spectra of the first l layers' product are wanted; empty for none.
    ``step(what, done)`` is called before each layer and each product, with ``done`` from 0 to 1.
    """
    names, values = layer_hooks(model, None), _Values(None if counted is None else tuple(counted))
    layers = jacobians_between(model, ids, names, see=values.see, see_mask=values.see_mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        cumulative = list(depths) or False
        depth = lyapunov_of(model, names, layers, T, positions=counted, seed=seed, cumulative=cumulative, step=step)
    for warning in caught:  # "converged" and "residual" hold what lyapunov says of its own residuals
        if "lyapunov stopped" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    residuals = [float(depth.residual.max()), *depth.layer_residual.tolist()]
    products: Figures = {}
    if depth.cumulative is not None and depth.cumulative_residual is not None:
        of_products = depth.cumulative_residual.tolist()
        residuals += of_products
        products = {"depths": list(depth.depths), **spectra(depth.cumulative), "residual": of_products}
    return {
        "hooks": list(depth.hooks),
        "exponents": plain(depth.exponents),
        "exponents_less_growth": plain(depth.exponents_less_growth),
        "exponents_less_growth_without_first": plain(depth.exponents_less_growth_without_first),
        "log_norms": plain(depth.log_norms),
        "log_norms_without_first": plain(depth.log_norms_without_first),
        "frame_growth": plain(depth.frame_growth),
        "mean_frame_growth": plain(depth.mean_frame_growth),
        "layers": spectra(depth.layers) | {"residual": depth.layer_residual.tolist()},
        **({"products": products} if products else {}),
        "alignment": {
            "overlap": plain(depth.alignment.overlap),
            "expected_at_random": plain(depth.alignment.expected),
            "exponents": plain(depth.alignment.exponents),
            "null_exponents": plain(depth.alignment.null_exponents.mean(dim=0)),
        },
        "rank_bounds": list(depth.rank_bounds),
        "lost": list(depth.lost),
        "active": values.active,
        "margins": values.margins,
        "converged": depth.converged,
        "residual": max(residuals),
        "sweeps": depth.sweeps,
    }


def spectra(of: Spectra) -> Figures:
    """The singular values and ranks of D maps."""
    return {
        "log_singular_values": plain(of.log_values),
        "zeros": plain(of.zeros),
        "sizes": list(of.sizes),
        "effective_rank": plain(of.effective_rank()),
        "effective_rank_estimated": plain(of.effective_rank(certain=False)),
        "stable_rank": plain(of.stable_rank()),
        "stable_rank_estimated": plain(of.stable_rank(certain=False)),
    }


def plain(values: Tensor | None) -> Any:
    """Tensors as nested lists, with None for what is not finite."""
    return None if values is None else _finite(values.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def share(value: Tensor) -> float:
    """The share of entries that are not zero."""
    return int(value.count_nonzero()) / max(1, value.numel())


# ---- active fractions and margins ----------------------------------------------------------------


class _Values:
    """What is kept of the values that pass the hooks of a trace, at the tokens that count: numbers alone."""

    def __init__(self, counted: Selected) -> None:
        self._counted = counted
        self.active: dict[str, float] = {}
        self.margins: dict[str, Figures] = {}

    def see(self, name: str, value: Tensor) -> None:
        self.active[name] = share(read_at(value, self._counted))

    def see_mask(self, name: str, x: Tensor, k: int | None) -> None:
        if k is not None and k < x.shape[-1]:
            self.margins[name] = _margins(read_at(x.detach(), self._counted), k)


def _margins(x: Tensor, k: int) -> Figures:
    """How far the k-th largest magnitude of each token's row lies above the next: what would change the mask."""
    largest = x.abs().flatten(0, -2).double().topk(k + 1, dim=-1).values
    last, next_ = largest[:, k - 1], largest[:, k]
    gap = last - next_
    relative = torch.where(last > 0, gap / last, 0.0)
    at = torch.tensor([0.05, 0.5], dtype=torch.float64, device=gap.device)
    low, median = gap.quantile(at).tolist()
    relative_low, relative_median = relative.quantile(at).tolist()
    return {
        "k": k,
        "width": x.shape[-1],
        "rows": len(gap),
        "ties": int((gap == 0).sum()),
        "median": median,
        "quantile_5": low,
        "relative_median": relative_median,
        "relative_quantile_5": relative_low,
    }
