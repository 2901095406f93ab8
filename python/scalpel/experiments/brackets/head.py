"""The head that carries the evidence to the answer: which it is, what it measures, and at which value the answer turns.

All of it is read at the position that answers. The head is the one whose output, exchanged for that of a prompt of the
other depth, takes most of the difference in logits with it. Its direction u is the gradient of the logit difference by
the head's output, averaged over short prompts. The threshold θ is found by intervention: the output's component along u
is set until the logit difference is zero.
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
_SALT = 10  # no other lists are drawn from this stream
_CANDIDATES = 8  # heads whose effect is measured by an exchange; the gradient picks them


@dataclass(frozen=True)
class Head:
    """``layer`` and ``index`` of the head; ``u`` (d_head,) of length 1; ``share`` of the depths' difference in logits
    that goes with its output; ``shares`` of the heads tried, by name.
    """

    layer: int
    index: int
    u: Tensor
    share: float
    shares: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True)
class Reading:
    """What a head does at questions: all (prompts, questions) but where said.

    ``n`` attended keys; ``m`` the statistic Σ a u; ``attended`` A = Σ a; ``sigma`` n (1 - A) / A in tokens;
    ``uniformity`` A² / (n Σ a²); ``decay`` the slope of log a on the distance t - j, a token; ``logits`` and ``u``
    (prompts, questions, keys) of every key, -inf and 0 beyond the question.
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
    """Lists as the experiments ask them, but of the first few elements only."""
    assert model.tokenizer is not None
    length = min(SHORT_TOKENS, model.config.block_size)
    block = model.config.block_size
    return long_lists(model.tokenizer, k, length, prompts, block_size=block, depth=depth, seed=1000 * seed + _SALT)


def _difference(model: CircuitGPT, logits: Tensor) -> Tensor:
    assert model.tokenizer is not None
    ids = closers(model.tokenizer)
    return logits[..., ids.two] - logits[..., ids.one]


def _last(lists: LongLists) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions up to the last question that all rows share, and each row's last question."""
    return lists.ids, lists.positions, lists.asked[:, -1]


def find_head(model: CircuitGPT, prompts: int = 32, seed: int = 0) -> Head:
    """The head whose output at the answer carries the depth, from pairs of short prompts at depth 2 and 1.

    Refused where no prompt of the two depths is answered differently: then nothing carries the depth.
    """
    nested, flat = _last(short_lists(model, 2, 2, prompts, seed)), _last(short_lists(model, 1, 1, prompts, seed))
    y = {depth: _outputs(model, *one) for depth, one in ((2, nested), (1, flat))}
    total = float((y[2][2] - y[1][2]).mean())
    if not abs(total) > 1e-6:
        raise Refused("the model's answers at both depths are the same on short prompts; no head carries the depth")
    config = model.config
    moved = torch.stack([(g * (a - b)) for g, a, b in zip(y[2][1], y[2][0], y[1][0], strict=True)])
    by_head = moved.unflatten(-1, (config.n_head, -1)).sum(-1).mean(1)  # (layers, heads)
    order = by_head.abs().flatten().argsort(descending=True)[:_CANDIDATES].tolist()
    shares = {}
    for flat_index in order:
        layer, index = divmod(flat_index, config.n_head)
        with torch.no_grad():
            changed = _with_head(model, nested, layer, index, partial(_instead, y[1][0][layer]))
        shares[f"{layer}.{index}"] = float((y[2][2] - changed).mean()) / total
    best = max(shares, key=lambda name: abs(shares[name]))
    layer, index = map(int, best.split("."))
    part = _part(model, index)
    gradient = torch.cat([y[depth][1][layer][:, part] for depth in (2, 1)])
    # Saturated prompts have tiny gradients; each counts the same, so that the direction is one of all prompts.
    u = torch.nn.functional.normalize(gradient, dim=-1).mean(0)
    return Head(layer, index, torch.nn.functional.normalize(u, dim=0), shares[best], shares)


def _instead(given: Tensor, own: Tensor) -> Tensor:
    return given


def _part(model: CircuitGPT, index: int) -> slice:
    """The channels of a head in a layer's side-by-side outputs."""
    width = model.config.d_attn // model.config.n_head
    return slice(index * width, (index + 1) * width)


def _outputs(
    model: CircuitGPT, ids: Tensor, positions: Tensor, asked: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's head outputs at the question (prompts, width), the logit difference's gradient by them, and it."""
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
    given: Callable[[Tensor], Tensor],
) -> Tensor:
    """The logit difference when the head's output at the question is what ``given(layer's output)`` says."""
    ids, positions, asked = prompts
    rows = torch.arange(len(ids), device="cpu")
    part = _part(model, index)

    def put(value: Tensor, name: str) -> Tensor:
        own = value[rows, asked]
        changed = value.clone()
        at = own.clone()
        at[:, part] = given(own)[:, part]
        changed[rows, asked] = at
        return changed

    logits = model.run_with_hooks(ids, [(f"{layer}.attn.y", put)], position_ids=positions)
    return _difference(model, logits[rows, asked])


@torch.no_grad()
def threshold(
    model: CircuitGPT, head: Head, *, prompts: int = 32, seed: int = 0, u: Tensor | None = None
) -> np.ndarray:
    """θ of each short prompt (prompts,): the head's output along u at which the logit difference is zero.

    Prompts of both depths; NaN where no value within four times the range seen turns the answer. ``u`` replaces the
    head's own direction: the rotated null.
    """
    direction = head.u if u is None else u
    part = _part(model, head.index)
    cases = [_last(short_lists(model, k, depth, prompts, seed)) for k, depth in ((2, 2), (1, 1))]
    own = torch.cat([_outputs(model, *case)[0][head.layer][:, part] @ direction for case in cases])
    middle, reach = float(own.mean()), 4 * max(float(own.max() - own.min()), 1e-6)
    found = []
    for case in cases:

        def at(z: Tensor, case: tuple[Tensor, Tensor, Tensor] = case) -> Tensor:
            def given(value: Tensor) -> Tensor:
                changed = value.clone()
                inside = changed[:, part]
                changed[:, part] = inside + (z - inside @ direction)[:, None] * direction
                return changed

            return _with_head(model, case, head.layer, head.index, given)

        count = len(case[0])
        grid = torch.linspace(middle - reach, middle + reach, 25, dtype=torch.float32, device="cpu")
        values = torch.stack([at(z.expand(count)) for z in grid])  # (grid, prompts)
        turns = (values[1:] > 0) != (values[:-1] > 0)
        # The turn nearest to what the head really says, where there are several.
        distance = torch.where(turns, (grid[:-1, None] - middle).abs(), torch.inf)
        first = distance.argmin(0)
        low, high = grid[first], grid[first + 1]
        rising = values[first + 1, torch.arange(count, device="cpu")] > 0
        for _ in range(20):
            centre = (low + high) / 2
            above = (at(centre) > 0) == rising
            low, high = torch.where(above, low, centre), torch.where(above, centre, high)
        found.append(torch.where(turns.any(0), (low + high) / 2, torch.nan))
    return torch.cat(found).double().numpy()


@torch.no_grad()
def read(model: CircuitGPT, head: Head, lists: LongLists, questions: Tensor, u: Tensor | None = None) -> Reading:
    """What the head does at the questions numbered ``questions`` (count,) of each prompt."""
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
    every = logits if sink is None else torch.cat([sink.expand(*logits.shape[:-1], 1), logits], -1)
    log_a = logits - every.logsumexp(-1, keepdim=True)
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
    """Least-squares slope of y on x along the last dimension, over ``where`` (at least two points, else NaN)."""
    count = where.sum(-1, keepdim=True)
    y = torch.where(where, y, 0.0)
    x = torch.where(where, x, 0.0)
    dx = torch.where(where, x - x.sum(-1, keepdim=True) / count, 0.0)
    return (dx * y).sum(-1) / dx.square().sum(-1)
