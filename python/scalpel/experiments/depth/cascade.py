"""What a chain of layers does from the last token to the last: ranks, survivors, volume, exponents, and their nulls.

Under causal attention the product's block from the last token to the last is the product of the layers' own blocks
there, (width, width) each, so whole spectra are had without a matrix over all tokens.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...circuits.task import bracket_counting
from ...jacobians.depth.lyapunov import lyapunov
from ...jacobians.depth.sweeps import ROUNDING
from ...jacobians.entry import jacobian
from ...models.circuitgpt.model import CircuitGPT
from ...tasks.refused import Refused

__all__ = [
    "Cascade",
    "cascades",
    "effective_ranks",
    "live_channels",
    "product_values",
    "reordered",
    "rotated",
    "rounding",
    "short_prompts",
    "stream",
    "survive",
    "sweep_exponents",
    "without_topk",
]

_WRITES = ("attn_out", "mlp_out", "resid_post_attn", "resid_post_mlp")


def short_prompts(model: CircuitGPT, count: int, seed: int, most: int) -> tuple[list[list[int]], list[str]]:
    """``count`` prompts (token ids) of at most ``most`` tokens, and what has to be said of them.

    Those of the bracket task that are short enough; random ids where the model has no tokenizer, or one that splits
    the task's answers. Refused where the context holds fewer than two tokens.
    """
    most = min(most, model.config.block_size)
    if most < 2:
        raise Refused(f"the context holds {model.config.block_size} tokens; two or more are needed")
    kept: list[list[int]] = []
    try:
        task = bracket_counting(model, 16 * count, seed)
        kept = [list(row) for row in dict.fromkeys(map(task.prompt, range(len(task)))) if len(row) <= most][:count]
        why = f"only {len(kept)} bracket prompts have at most {most} tokens"
    except Refused as error:
        why = str(error)
    if len(kept) == count:
        return kept, []
    rng = np.random.default_rng([seed, 72])
    lengths = rng.integers(max(2, most // 2), most + 1, size=count)
    return (
        [rng.integers(model.config.vocab_size, size=n).tolist() for n in lengths],
        [f"The prompts are random token ids: {why}."],
    )


def live_channels(model: CircuitGPT) -> int | None:
    """The fewest channels that a TopK leaves of what a block adds, or of the residual; None without such a TopK."""
    found = [model.config.k_at(location, model.config.d_model) for location in _WRITES]
    return min((k for k in found if k is not None), default=None)


def without_topk(model: CircuitGPT) -> CircuitGPT:
    """The same weights, with every TopK off."""
    other = CircuitGPT(replace(model.config, afrac=None))
    other.load_state_dict(model.state_dict())
    other.tokenizer = model.tokenizer
    return other.to(model.dtype).eval()


# ---- what is measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cascade:
    """One prompt, last token to last: ``layers`` float64 (width, width) each; ``values`` (width,), the singular values
    of their product, descending; ``log_volume``: Σ log σ of all layers, -inf where one is singular to rounding;
    ``ranks``: of each layer {"rank", "rank_added", "attention", "mlp", and what is live there}."""

    layers: list[np.ndarray]
    values: np.ndarray
    log_volume: float
    ranks: list[dict[str, int]]


def cascades(model: CircuitGPT, texts: Sequence[Sequence[int]], ranks: bool = True) -> list[Cascade]:
    """One :class:`Cascade` a prompt; without ``ranks``, theirs are empty."""
    return [
        _cascade(model, torch.tensor([list(text)], device=model.device, dtype=torch.int64), ranks) for text in texts
    ]


def _cascade(model: CircuitGPT, ids: torch.Tensor, wanted: bool) -> Cascade:
    def block(source: str, target: str) -> tuple[np.ndarray, int]:
        J = jacobian(model, ids, source, target, positions=-1)
        return J.to_dense().double().cpu().numpy(), int(J.primal.count_nonzero())

    floor = rounding(model)
    layers, ranks, volume = [], [], 0.0
    for i, (source, target) in enumerate(pairwise(stream(model))):
        J = block(source, target)[0]
        values = np.linalg.svd(J, compute_uv=False)
        if wanted:
            attention, live = block(source, f"{i}.attn.resid_delta")
            mlp, live_mlp = block(f"{i}.resid_mid", f"{i}.mlp.resid_delta")
            added = np.linalg.svd(J - np.eye(len(J)), compute_uv=False)
            ranks.append(
                {
                    "rank": _rank(values, floor),
                    "rank_added": int((added > floor * max(values[0], added[0])).sum()),
                    "rank_attention": _rank(np.linalg.svd(attention, compute_uv=False), floor),
                    "live_attention": live,
                    "rank_mlp": _rank(np.linalg.svd(mlp, compute_uv=False), floor),
                    "live_mlp": live_mlp,
                }
            )
        layers.append(J)
        singular = values[-1] <= floor * values[0]
        volume += -np.inf if singular else float(np.log(values).sum())
    return Cascade(layers, product_values(layers), volume, ranks)


def product_values(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Singular values of the product, the first layer innermost, relative to nothing: float64 (width,).

    The product is scaled on the way, so it neither overflows nor vanishes; values below 1e-14 of the largest are
    rounding, which no tolerance here reaches.
    """
    product, log_scale = np.eye(layers[0].shape[1]), 0.0
    for layer in layers:
        product = layer @ product
        size = float(np.abs(product).max())
        if size == 0:
            return np.zeros(len(product))
        product, log_scale = product / size, log_scale + np.log(size)
    values: np.ndarray = np.linalg.svd(product, compute_uv=False) * np.exp(log_scale)
    return values


def rotated(one: Cascade, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The product's singular values, averaged in the logarithm over ``draws``, where each layer keeps its singular
    values and has random singular vectors. Only the turn between one layer and the next counts."""
    values = [np.linalg.svd(layer, compute_uv=False) for layer in one.layers]
    width, logs = len(values[0]), []
    for _ in range(draws):
        turns = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in values]
        found = product_values([turn * size for turn, size in zip(turns, values, strict=True)])
        logs.append(np.log(np.maximum(found, np.finfo(float).tiny)))
    mean: np.ndarray = np.exp(np.mean(logs, axis=0))
    return mean


def survive(values: np.ndarray, tolerance: float) -> np.ndarray:
    """How many of each row's singular values (rows, width) are above ``tolerance`` of its largest; int (rows,)."""
    found: np.ndarray = (values > tolerance * values[:, :1]).sum(axis=1)
    return found


def sweep_exponents(
    model: CircuitGPT, texts: Sequence[Sequence[int]], directions: int, seed: int
) -> dict[str, np.ndarray]:
    """Exponents by alternating sweeps, a row a prompt, in nats a layer: ``all`` → all and ``last`` → last (prompts, T);
    ``frame_growth`` of one forward sweep; growth of the residual's norm with and without position 0, over all tokens;
    whether the sweeps ``converged``."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("all", "last", "frame_growth", "growth", "growth_without_first", "converged")
    }
    T = min(directions, model.config.d_model)
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what didn't converge is counted
            whole, last = (
                lyapunov(model, ids, T, positions=at, cumulative=False, probes=0, draws=0, seed=seed)
                for at in (None, -1)
            )
        rows["all"].append(whole.exponents.numpy())
        rows["last"].append(last.exponents.numpy())
        rows["frame_growth"].append(whole.mean_frame_growth.numpy())
        rows["growth"].append(whole.log_norm_growth)
        rows["growth_without_first"].append(whole.log_norm_growth_without_first)
        rows["converged"].append(whole.converged and last.converged)
    return {name: np.array(found, dtype=float) for name, found in rows.items()}


def stream(model: CircuitGPT) -> list[str]:
    return [*(f"{i}.resid_in" for i in range(model.config.n_layer)), "final_resid"]


def rounding(model: CircuitGPT) -> float:
    """What of a layer's largest singular value is rounding."""
    return ROUNDING * float(torch.finfo(model.dtype).eps)


def effective_ranks(values: np.ndarray) -> np.ndarray:
    """exp of the entropy of each row's singular values, normalised (Roy and Vetterli 2007)."""
    found: np.ndarray = np.exp(stats.entropy(values, axis=1))
    return found


def reordered(layers: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The layers in another order."""
    order = rng.permutation(len(layers))
    while (order == np.arange(len(layers))).all():
        order = rng.permutation(len(layers))
    return [layers[i] for i in order]


def _rank(values: np.ndarray, relative: float) -> int:
    return int((values > relative * values[0]).sum())
