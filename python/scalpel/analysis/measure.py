"""The figures of one chunk of text: of a model in memory, as plain data.

Logarithms are natural; a list by layer has D entries, by hook D + 1; −inf (a singular value that is zero to rounding)
is None. See :class:`scalpel.jacobians.depth.lyapunov.Lyapunov` for each figure.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.masks import watch_masks
from ..jacobians.depth.lyapunov import lyapunov
from ..jacobians.depth.spectra import Spectra
from ..jacobians.rows.primal import DensePrimal, places_of, through_layer
from ..models.circuitgpt.model import CircuitGPT
from ..models.decoders.families import decoder_of

Figures = dict[str, Any]


def measure(model: nn.Module, ids: Tensor, T: int, seed: int, products: bool) -> Figures:
    """Of ``model`` at ``ids`` (1, L), all tokens to all tokens, with T directions; ``products``: at each depth, too."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        found = lyapunov(model, ids, T, seed=seed, cumulative=products)
    # "converged" and "residual" hold what lyapunov says of its sweeps; of the layers' own values only a warning tells.
    stopped = [str(each.message) for each in said if "stopped after" in str(each.message)]
    for each in said:
        if "stopped after" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    active, margins = _circuitgpt(model, ids) if isinstance(model, CircuitGPT) else _decoder(model, ids)
    return {
        "hooks": list(found.hooks),
        "exponents": plain(found.exponents),
        "exponents_less_growth": plain(found.exponents_less_growth),
        "exponents_less_growth_without_first": plain(found.exponents_less_growth_without_first),
        "log_norms": plain(found.log_norms),
        "log_norms_without_first": plain(found.log_norms_without_first),
        "frame_growth": plain(found.frame_growth),
        "mean_frame_growth": plain(found.mean_frame_growth),
        "layers": spectra(found.layers),
        **({} if found.cumulative is None else {"products": spectra(found.cumulative)}),
        "alignment": {
            "overlap": plain(found.alignment.overlap),
            "expected_at_random": plain(found.alignment.expected),
            "exponents": plain(found.alignment.exponents),
            "null_exponents": plain(found.alignment.null_exponents.mean(dim=0)),
        },
        "rank_bounds": list(found.rank_bounds),
        "lost": list(found.lost),
        "active": active,
        "margins": margins,
        "converged": found.converged and not stopped,
        "residual": float(found.residual.max()),
        "sweeps": found.sweeps,
    }


def spectra(of: Spectra) -> Figures:
    """Singular values and ranks of D maps."""
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
    """As nested lists, what is not finite as None."""
    return None if values is None else _finite(values.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def share(value: Tensor) -> float:
    """Of entries that are not zero."""
    return int(value.count_nonzero()) / max(1, value.numel())


# ---- active fractions and margins ----------------------------------------------------------------


def _circuitgpt(model: CircuitGPT, ids: Tensor) -> tuple[dict[str, float], dict[str, Figures]]:
    margins = {}

    def watch(name: str, x: Tensor, k: int | None) -> None:
        if k is not None and k < x.shape[-1]:
            margins[name] = _margins(x.detach(), k)

    with watch_masks(watch), torch.no_grad():
        _, acts = model.run_with_cache(ids)
    return {name: share(value) for name, value in acts.items()}, margins


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


def _decoder(model: nn.Module, ids: Tensor) -> tuple[dict[str, float], dict[str, Figures]]:
    decoder = decoder_of(model)
    assert decoder is not None
    found: dict[str, float] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        found[name] = share(value)
        return value

    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.no_grad():
        x = decoder.embed(ids, positions)
        places = places_of(decoder, positions, None, x.dtype)
        for i in range(decoder.config.layers):
            x = through_layer(decoder, i, decoder.layer(i), x, places, tap, DensePrimal())
        tap("final_resid", x)
    return found, {}
