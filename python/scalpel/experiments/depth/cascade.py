"""The Jacobians of a chain of layers: ranks, surviving directions, volume and exponents, and what the nulls do to them.

All of it is taken from the last token to the last, but for the exponents that are taken from all tokens to all. Under
causal attention the block of the product from the last token to the last is the product of the layers' own blocks
there. These are (width, width) each, so whole spectra are found without any matrix over all tokens.
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
    """``count`` prompts (token ids) of at most ``most`` tokens, and notes about them.

    They are prompts of the bracket task. If too few of these are short enough, or the model has no tokenizer or one
    that splits the task's answers, they are random token ids, and a note says so.

    Raises:
        Refused: The context holds fewer than two tokens.
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
    """The fewest channels that a TopK keeps of what a block writes or of the residual; None without such a TopK."""
    kept = [model.config.k_at(location, model.config.d_model) for location in _WRITES]
    return min((k for k in kept if k is not None), default=None)


def without_topk(model: CircuitGPT) -> CircuitGPT:
    """A model with the same weights and every TopK turned off."""
    other = CircuitGPT(replace(model.config, afrac=None))
    other.load_state_dict(model.state_dict())
    other.tokenizer = model.tokenizer
    return other.to(model.dtype).eval()


# ---- what is measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cascade:
    """The layers' Jacobians for one prompt, from the last token to the last.

    Attributes:
        layers: One Jacobian a layer, float64 (width, width).
        values: Singular values of their product, descending, (width,).
        log_volume: Σ log σ over all layers; -inf if a layer is singular to rounding.
        ranks: By layer, the rank of its Jacobian ("rank"), of that less the identity ("rank_added") and of its two
            sublayers, and how many channels are live in each sublayer's output.
    """

    layers: list[np.ndarray]
    values: np.ndarray
    log_volume: float
    ranks: list[dict[str, int]]


def cascades(model: CircuitGPT, texts: Sequence[Sequence[int]], ranks: bool = True) -> list[Cascade]:
    """One :class:`Cascade` for each prompt; without ``ranks``, the rank tables stay empty."""
    return [
        _cascade(model, torch.tensor([list(text)], device=model.device, dtype=torch.int64), ranks) for text in texts
    ]


def _cascade(model: CircuitGPT, ids: torch.Tensor, with_ranks: bool) -> Cascade:
    def block(source: str, target: str) -> tuple[np.ndarray, int]:
        J = jacobian(model, ids, source, target, positions=-1)
        return J.to_dense().double().cpu().numpy(), int(J.primal.count_nonzero())

    floor = rounding(model)
    layers, ranks, volume = [], [], 0.0
    for i, (source, target) in enumerate(pairwise(stream(model))):
        J = block(source, target)[0]
        values = np.linalg.svd(J, compute_uv=False)
        if with_ranks:
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
    """Singular values of the product of the layers, the first layer innermost: float64 (width,), descending.

    The product is rescaled at each step, so that it neither overflows nor vanishes. Values below 1e-14 of the largest
    are rounding; no tolerance used here is that small.
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


def rotated(cascade: Cascade, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The rotated null: singular values of the product if each layer has random singular vectors.

    Each layer keeps its singular values. The logarithms of the product's values are averaged over ``draws`` products.
    Only the rotation between one layer and the next matters, so one rotation a layer is drawn.
    """
    values = [np.linalg.svd(layer, compute_uv=False) for layer in cascade.layers]
    width, logs = len(values[0]), []
    for _ in range(draws):
        rotations = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in values]
        singular_values = product_values([rotation * size for rotation, size in zip(rotations, values, strict=True)])
        logs.append(np.log(np.maximum(singular_values, np.finfo(float).tiny)))
    mean: np.ndarray = np.exp(np.mean(logs, axis=0))
    return mean


def survive(values: np.ndarray, tolerance: float) -> np.ndarray:
    """How many singular values of each row (rows, width) exceed ``tolerance`` times the row's largest; int (rows,)."""
    survivors: np.ndarray = (values > tolerance * values[:, :1]).sum(axis=1)
    return survivors


def sweep_exponents(
    model: CircuitGPT, texts: Sequence[Sequence[int]], directions: int, seed: int
) -> dict[str, np.ndarray]:
    """Leading exponents by alternating sweeps, one row a prompt, in nats a layer.

    Returns:
        "all" and "last": exponents from all tokens to all and from the last to the last, (prompts, T). "frame_growth":
        growth of the frame in a single forward sweep, (prompts, T). "growth" and "growth_without_first": growth of the
        residual's norm over all tokens, with and without position 0, (prompts,). "converged": whether the sweeps
        converged, (prompts,).
    """
    rows: dict[str, list[Any]] = {
        name: [] for name in ("all", "last", "frame_growth", "growth", "growth_without_first", "converged")
    }
    T = min(directions, model.config.d_model)
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # sweeps that don't converge are counted below
            whole, last = (
                lyapunov(model, ids, T, positions=positions, cumulative=False, probes=0, draws=0, seed=seed)
                for positions in (None, -1)
            )
        rows["all"].append(whole.exponents.numpy())
        rows["last"].append(last.exponents.numpy())
        rows["frame_growth"].append(whole.mean_frame_growth.numpy())
        rows["growth"].append(whole.log_norm_growth)
        rows["growth_without_first"].append(whole.log_norm_growth_without_first)
        rows["converged"].append(whole.converged and last.converged)
    return {name: np.array(by_prompt, dtype=float) for name, by_prompt in rows.items()}


def stream(model: CircuitGPT) -> list[str]:
    """The hooks of the residual stream before each layer and after the last one."""
    return [*(f"{i}.resid_in" for i in range(model.config.n_layer)), "final_resid"]


def rounding(model: CircuitGPT) -> float:
    """The share of a layer's largest singular value below which a value counts as rounding."""
    return ROUNDING * float(torch.finfo(model.dtype).eps)


def effective_ranks(values: np.ndarray) -> np.ndarray:
    """exp of the entropy of each row's normalised singular values (Roy and Vetterli 2007), (rows,)."""
    ranks: np.ndarray = np.exp(stats.entropy(values, axis=1))
    return ranks


def reordered(layers: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The layers in a random order other than their own."""
    order = rng.permutation(len(layers))
    while (order == np.arange(len(layers))).all():
        order = rng.permutation(len(layers))
    return [layers[i] for i in order]


def _rank(values: np.ndarray, relative: float) -> int:
    return int((values > relative * values[0]).sum())
