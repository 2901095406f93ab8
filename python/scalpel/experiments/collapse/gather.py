"""Activations, gradients and masks at the AbsTopKs of a model, one row for each token, and models to compare with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...hooks.masks import watch_masks
from ...models.circuitgpt.model import CircuitGPT
from ...models.circuitgpt.recording import hook_width
from ...tasks.refused import Refused
from ...topk import topk_mask

__all__ = ["Gathered", "Rows", "Texts", "gather", "masked_afterwards", "shuffled", "topk_hooks"]

_BYTES = 2**29  # the most bytes of rows that are held at once
_HOOKS = {
    "attn_in": "attn.act_in",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_out": "attn.resid_delta",
    "mlp_in": "mlp.act_in",
    "mlp_neuron": "mlp.post_act",
    "mlp_out": "mlp.resid_delta",
    "resid_post_attn": "resid_mid",
}


_Three = tuple[Tensor, Tensor, Tensor]


class Texts(NamedTuple):
    """A batch: ``ids`` int64 and ``mask`` bool (texts, length), padded on the right; ``positions`` or None."""

    ids: Tensor
    mask: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """What one hook holds, one row for each token that has a next one.

    Attributes:
        activation: float32 (tokens, width).
        post: The gradient behind the mask, float32 (tokens, width).
        mask: Which channels the AbsTopK keeps, bool (tokens, width); all True without an AbsTopK.
        text: The number of the text that holds each token, (tokens,).
    """

    activation: Tensor
    post: Tensor
    mask: Tensor
    text: Tensor

    def gradient(self, which: str) -> Tensor:
        """The gradient behind the mask ("post") or before it ("pre"), (tokens, width)."""
        return self.post if which == "post" else self.post * self.mask


@dataclass(frozen=True)
class Gathered:
    """Rows by hook, and the mean loss of their tokens in nats."""

    rows: dict[str, Rows]
    loss: float


def topk_hooks(model: CircuitGPT) -> list[str]:
    """The hooks that hold an AbsTopK's output, in forward order; not those where it keeps all channels."""
    config = model.config
    hooks = set()
    for location in config.topk_locations:
        for i in range(config.n_layer):
            hook = _hook(f"{i}.{location}", config.n_layer)
            width = hook_width(model, hook)
            k = config.k_at(location, width)
            if k is not None and k < width:
                hooks.add(hook)
    return [name for name in model.hook_names if name in hooks]


def _hook(name: str, n_layer: int) -> str:
    """The hook that belongs to "layer.location", or to a name that watch_masks gives."""
    layer, _, location = name.partition(".")
    if location == "resid_post_mlp":
        return "final_resid" if int(layer) + 1 == n_layer else f"{int(layer) + 1}.resid_in"
    return f"{layer}.{_HOOKS.get(location, location)}"


def masked_afterwards(dense: CircuitGPT, like: CircuitGPT) -> CircuitGPT:
    """The weights of ``dense`` with the AbsTopKs of ``like``, so that training knew nothing of the mask."""
    config = replace(dense.config, afrac=like.config.afrac, afrac_loctypes=like.config.afrac_loctypes)
    other = CircuitGPT(config)
    other.load_state_dict(dense.state_dict())
    other.tokenizer, other.card = dense.tokenizer, {**dense.card, "name": "dense, mask afterwards"}
    return other.eval()


def gather(model: CircuitGPT, texts: Sequence[Texts], hooks: Sequence[str]) -> Gathered:
    """Gather activations, gradients and masks at ``hooks`` over all tokens of ``texts`` that have a next token.

    The gradient at a token is that of the loss summed over its text.

    Raises:
        Refused: No token has a next one.
    """
    tokens = sum(int(batch.mask[:, 1:].sum()) for batch in texts)
    if not tokens:
        raise Refused("no text has two tokens, so there is no next token and no gradient; give longer texts")
    rows: dict[str, Rows] = {}
    loss = 0.0
    for group in _groups(model, hooks, tokens):
        parts: dict[str, list[_Three]] = {name: [] for name in group}
        numbers, begun, loss = [], 0, 0.0
        for batch in texts:
            batch_loss, here = _batch(model, batch, group)
            loss += batch_loss
            real = batch.mask[:, 1:]
            for name in group:
                value, gradient, mask = (part[:, :-1][real] for part in here[name])
                parts[name].append((value.float(), gradient.float(), mask))
            numbers.append(begun + real.nonzero()[:, 0])
            begun += len(batch.ids)
        text = torch.cat(numbers)
        for name, by_batch in parts.items():
            value, gradient, mask = (torch.cat(pieces) for pieces in zip(*by_batch, strict=True))
            rows[name] = Rows(value, gradient, mask, text)
    return Gathered({name: rows[name] for name in hooks}, loss / tokens)


def _groups(model: CircuitGPT, hooks: Sequence[str], tokens: int) -> Iterator[list[str]]:
    """Groups of hooks whose rows fit into memory together."""
    group: list[str] = []
    held = 0
    for name in hooks:
        size = tokens * hook_width(model, name) * 9  # two float32 and a bool
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _batch(model: CircuitGPT, texts: Texts, hooks: Sequence[str]) -> tuple[float, dict[str, _Three]]:
    """The summed loss of a batch, and value, gradient and mask (texts, length, width) at each hook."""
    values: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    wanted = set(hooks)

    def tap(name: str, value: Tensor) -> Tensor:
        if name in wanted:
            value = value if value.requires_grad else value.detach().requires_grad_()
            values[name] = value
        return value

    def watch(name: str, x: Tensor, k: int | None) -> None:
        hook = _hook(name, model.config.n_layer)
        if k is not None and hook in wanted:
            masks[hook] = topk_mask(x.detach(), k)

    targets = texts.ids[:, 1:].masked_fill(~texts.mask[:, 1:], -100)
    with torch.enable_grad(), watch_masks(watch):
        logits = model(texts.ids, position_ids=texts.positions, tap=tap)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [values[name] for name in hooks], allow_unused=True)
    here: dict[str, _Three] = {}
    for name, gradient in zip(hooks, gradients, strict=True):
        value = values[name].detach()
        all_kept = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        here[name] = (value, torch.zeros_like(value) if gradient is None else gradient, masks.get(name, all_kept))
    return float(loss.detach()), here


def shuffled(rows: Mapping[str, Rows], rng: np.random.Generator) -> dict[str, Rows]:
    """Put each token's gradient behind the mask of another token.

    How often a channel is in a support stays the same; which tokens have it is lost.
    """
    return {
        name: replace(of_hook, mask=of_hook.mask[torch.from_numpy(rng.permutation(len(of_hook.mask)))])
        for name, of_hook in rows.items()
    }
