"""The head that carries the evidence to the answer: how it is found, what it measures, and where the answer turns.

Everything is read at the position that answers. The head is found by exchange: of all heads, it is the one whose
output, replaced by that of a prompt of the other depth, changes the logit difference most. Its direction u is the
gradient of the logit difference with respect to the head's output, averaged over short prompts. Its threshold θ is
found by intervention: the component of its output along u is varied until the logit difference is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...models.circuitgpt.model import CircuitGPT
from ...tasks.brackets import LongLists, closers, long_lists
from ...tasks.refused import Refused

__all__ = ["Head", "Reading", "find_head", "read", "threshold"]

SHORT_TOKENS = 48
_SALT = 10  # added to the seed, so that no other lists come from the same random stream
_CANDIDATES = 8  # how many heads, the first by gradient, are tried by exchange


@dataclass(frozen=True)
class Head:
    """An attention head that carries the depth to the answer.

    Attributes:
        layer: Its layer.
        index: Its number within the layer.
        u: The direction (d_head,), of length 1, along which the answer reads its output.
        share: Share of the difference in logits between the depths that its output accounts for.
        shares: That share for every head that was tried, by name.
    """

    layer: int
    index: int
    u: Tensor
    share: float
    shares: dict[str, float]

    @property
    def name(self) -> str:
        """The head as "layer.index"."""
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True)
class Reading:
    """What a head does at questions. Arrays are (prompts, questions) unless another shape is stated.

    Attributes:
        n: Number of attended keys.
        m: The statistic Σ a u.
        attended: A = Σ a, the weight on real keys.
        sigma: The sink term n (1 - A) / A, in tokens.
        uniformity: A² / (n Σ a²); 1 if all keys have the same weight.
        decay: Slope of log a on the distance t - j, per token.
        logits: Attention logits (prompts, questions, keys); -inf beyond the question.
        u: Values along the direction u (prompts, questions, keys); 0 beyond the question.
    """

    n: np.ndarray
    m: np.ndarray
    attended: np.ndarray
    sigma: np.ndarray
    uniformity: np.ndarray
    decay: np.ndarray
    logits: np.ndarray
    u: np.ndarray


def short_lists(model: CircuitGPT, k: int, depth: int, prompts: int, seed: int) -> LongLists:
    """Lists like those that the experiments ask, but of the first few elements only."""
    assert model.tokenizer is not None
    length = min(SHORT_TOKENS, model.config.block_size)
    block = model.config.block_size
    return long_lists(model.tokenizer, k, length, prompts, block_size=block, depth=depth, seed=1000 * seed + _SALT)


def _difference(model: CircuitGPT, logits: Tensor) -> Tensor:
    """logit("]]\\n") - logit("]\\n"), over the last dimension."""
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    return logits[..., ids.two] - logits[..., ids.one]


def _last(lists: LongLists) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions, and the index of each row's last question."""
    return lists.ids, lists.positions, lists.asked[:, -1]


def find_head(model: CircuitGPT, prompts: int = 32, seed: int = 0) -> Head:
    """Find the head whose output at the answer carries the depth, from pairs of short prompts at depths 2 and 1.

    Args:
        model: A CircuitGPT with a tokenizer.
        prompts: Prompts of each depth.
        seed: Seed of the prompts.

    Returns:
        The head with the largest effect when its output is exchanged between the depths.

    Raises:
        Refused: The model answers alike at both depths, so that no head carries the depth.
    """
    nested, flat = _last(short_lists(model, 2, 2, prompts, seed)), _last(short_lists(model, 1, 1, prompts, seed))
    outputs = {depth: _outputs(model, *lists) for depth, lists in ((2, nested), (1, flat))}
    total = float((outputs[2][2] - outputs[1][2]).mean())
    if not abs(total) > 1e-6:
        raise Refused("the model's answers at both depths are the same on short prompts; no head carries the depth")
    config = model.config
    moved = torch.stack([(g * (a - b)) for g, a, b in zip(outputs[2][1], outputs[2][0], outputs[1][0], strict=True)])
    by_head = moved.unflatten(-1, (config.n_head, -1)).sum(-1).mean(1)  # (layers, heads)
    order = by_head.abs().flatten().argsort(descending=True)[:_CANDIDATES].tolist()
    shares = {}
    for flat_index in order:
        layer, index = divmod(flat_index, config.n_head)
        with torch.no_grad():
            changed = _with_head(model, nested, layer, index, partial(_instead, outputs[1][0][layer]))
        shares[f"{layer}.{index}"] = float((outputs[2][2] - changed).mean()) / total
    best = max(shares, key=lambda name: abs(shares[name]))
    layer, index = map(int, best.split("."))
    part = _part(model, index)
    gradient = torch.cat([outputs[depth][1][layer][:, part] for depth in (2, 1)])
    # Saturated prompts have tiny gradients. Each gradient is normalised, so that every prompt counts the same.
    u = torch.nn.functional.normalize(gradient, dim=-1).mean(0)
    return Head(layer, index, torch.nn.functional.normalize(u, dim=0), shares[best], shares)


def _instead(replacement: Tensor, own: Tensor) -> Tensor:
    return replacement


def _part(model: CircuitGPT, index: int) -> slice:
    """The channels of one head among the concatenated outputs of a layer's heads."""
    width = model.config.d_attn // model.config.n_head
    return slice(index * width, (index + 1) * width)


def _outputs(
    model: CircuitGPT, ids: Tensor, positions: Tensor, asked: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """By layer, the heads' outputs at the question (prompts, width) and the gradients with respect to them; and d.

    d (prompts,) is the logit difference, of which the gradients are taken.
    """
    rows = torch.arange(len(ids), device="cpu")
    kept: list[Tensor] = []
    own: list[Tensor] = []

    def keep(value: Tensor, name: str) -> Tensor:
        at = value[rows, asked].detach().requires_grad_(True)
        own.append(at)
        kept.append(at.detach())
        changed = value.clone()
        changed[rows, asked] = at
        return changed

    hooks = [(f"{layer}.attn.y", keep) for layer in range(model.config.n_layer)]
    with torch.enable_grad():
        logits = model.run_with_hooks(ids, hooks, position_ids=positions)[rows, asked]
        difference = _difference(model, logits)
        gradients = torch.autograd.grad(difference.sum(), own, allow_unused=True)
    filled = [torch.zeros_like(a) if g is None else g for a, g in zip(own, gradients, strict=True)]
    return kept, filled, difference.detach()


def _with_head(
    model: CircuitGPT,
    prompts: tuple[Tensor, Tensor, Tensor],
    layer: int,
    index: int,
    replace: Callable[[Tensor], Tensor],
) -> Tensor:
    """The logit difference when the head's output at the question is replaced.

    ``replace`` takes the layer's concatenated outputs (prompts, width) and gives the new ones; only the head's own
    channels are used.
    """
    ids, positions, asked = prompts
    rows = torch.arange(len(ids), device="cpu")
    part = _part(model, index)

    def put(value: Tensor, name: str) -> Tensor:
        own = value[rows, asked]
        changed = value.clone()
        at = own.clone()
        at[:, part] = replace(own)[:, part]
        changed[rows, asked] = at
        return changed

    logits = model.run_with_hooks(ids, [(f"{layer}.attn.y", put)], position_ids=positions)
    return _difference(model, logits[rows, asked])


@torch.no_grad()
def threshold(
    model: CircuitGPT, head: Head, *, prompts: int = 32, seed: int = 0, u: Tensor | None = None
) -> np.ndarray:
    """θ of each short prompt of both depths, (prompts,): the output along u at which the logit difference is zero.

    NaN if no value within four times the observed range turns the answer. ``u`` replaces the head's own direction, for
    the rotated null.
    """
    direction = head.u if u is None else u
    part = _part(model, head.index)
    cases = [_last(short_lists(model, k, depth, prompts, seed)) for k, depth in ((2, 2), (1, 1))]
    own = torch.cat([_outputs(model, *case)[0][head.layer][:, part] @ direction for case in cases])
    middle, reach = float(own.mean()), 4 * max(float(own.max() - own.min()), 1e-6)
    thetas = []
    for case in cases:

        def at(z: Tensor, case: tuple[Tensor, Tensor, Tensor] = case) -> Tensor:
            def set_component(value: Tensor) -> Tensor:
                changed = value.clone()
                inside = changed[:, part]
                changed[:, part] = inside + (z - inside @ direction)[:, None] * direction
                return changed

            return _with_head(model, case, head.layer, head.index, set_component)

        count = len(case[0])
        grid = torch.linspace(middle - reach, middle + reach, 25, dtype=torch.float32, device="cpu")
        values = torch.stack([at(z.expand(count)) for z in grid])  # (grid, prompts)
        turns = (values[1:] > 0) != (values[:-1] > 0)
        # If the answer turns at several values, the one nearest to the head's usual output counts.
        distance = torch.where(turns, (grid[:-1, None] - middle).abs(), torch.inf)
        first = distance.argmin(0)
        low, high = grid[first], grid[first + 1]
        rising = values[first + 1, torch.arange(count, device="cpu")] > 0
        for _ in range(20):
            centre = (low + high) / 2
            above = (at(centre) > 0) == rising
            low, high = torch.where(above, low, centre), torch.where(above, centre, high)
        thetas.append(torch.where(turns.any(0), (low + high) / 2, torch.nan))
    return torch.cat(thetas).double().numpy()


@torch.no_grad()
def read(model: CircuitGPT, head: Head, lists: LongLists, questions: Tensor, u: Tensor | None = None) -> Reading:
    """Read the head at the questions numbered ``questions`` (count,) of each prompt, along its u or along ``u``."""
    config = model.config
    _, cache = model.run_with_cache(
        lists.ids,
        [f"{head.layer}.attn.{what}" for what in "qkv"],
        stop_at=f"{head.layer}.attn.y",
        position_ids=lists.positions,
    )
    part = _part(model, head.index)
    q, k, v = (cache[f"{head.layer}.attn.{what}"][..., part].double() for what in "qkv")
    asked = lists.asked[:, questions]
    rows = torch.arange(len(asked), device="cpu")[:, None]
    logits = q[rows, asked] @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    seen = torch.arange(k.shape[1], device="cpu") <= asked[..., None]
    logits = logits.masked_fill(~seen, -torch.inf)
    values = (v @ (head.u if u is None else u).double())[:, None].expand_as(logits).masked_fill(~seen, 0.0)
    sink = model.transformer.h[head.layer].attn.attn_imp.sink_logit[head.index].double() if config.sink else None
    all_logits = logits if sink is None else torch.cat([sink.expand(*logits.shape[:-1], 1), logits], -1)
    log_a = logits - all_logits.logsumexp(-1, keepdim=True)
    a = log_a.exp()
    n = seen.sum(-1).double()
    attended = a.sum(-1)
    distance = (asked[..., None] - torch.arange(k.shape[1], device="cpu")).double()
    return Reading(
        n=n.numpy(),
        m=(a * values).sum(-1).numpy(),
        attended=attended.numpy(),
        sigma=(n * (1 - attended) / attended).numpy(),
        uniformity=(attended**2 / (n * a.square().sum(-1))).numpy(),
        decay=_slope(distance, log_a, seen).numpy(),
        logits=logits.numpy(),
        u=values.numpy(),
    )


def _slope(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """Least-squares slope of y on x along the last dimension, over the points ``where``; NaN for fewer than two."""
    count = where.sum(-1, keepdim=True)
    y = torch.where(where, y, 0.0)
    x = torch.where(where, x, 0.0)
    dx = torch.where(where, x - x.sum(-1, keepdim=True) / count, 0.0)
    return (dx * y).sum(-1) / dx.square().sum(-1)
