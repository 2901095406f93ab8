"""Activations, gradients and masks at the AbsTopKs of a model, a row a token; and the models to compare them with."""

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

_BYTES = 2**29  # of rows that are held at once
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
    """One hook, a row a token that has a next one: ``activation`` and ``post`` (tokens, width) float32, ``mask`` bool
    of that shape (all True where there is no AbsTopK), ``text`` (tokens,) the number of its text."""

    activation: Tensor
    post: Tensor
    mask: Tensor
    text: Tensor

    def gradient(self, which: str) -> Tensor:
        """g_post or g_pre, (tokens, width)."""
        return self.post if which == "post" else self.post * self.mask


@dataclass(frozen=True)
class Gathered:
    """Rows by hook, and the mean loss in nats of the tokens that they stand for."""

    rows: dict[str, Rows]
    loss: float


def topk_hooks(model: CircuitGPT) -> list[str]:
    """The hooks that hold what an AbsTopK gives, in the forward pass's order; those where it keeps all are none."""
    config = model.config
    found = set()
    for location in config.topk_locations:
        for i in range(config.n_layer):
            hook = _hook(f"{i}.{location}", config.n_layer)
            width = hook_width(model, hook)
            k = config.k_at(location, width)
            if k is not None and k < width:
                found.add(hook)
    return [name for name in model.hook_names if name in found]


def _hook(name: str, n_layer: int) -> str:
    """The hook of "layer.location", or of a name that watch_masks gives."""
    layer, _, location = name.partition(".")
    if location == "resid_post_mlp":
        return "final_resid" if int(layer) + 1 == n_layer else f"{int(layer) + 1}.resid_in"
    return f"{layer}.{_HOOKS.get(location, location)}"


def masked_afterwards(dense: CircuitGPT, like: CircuitGPT) -> CircuitGPT:
    """``dense``'s weights with the AbsTopKs of ``like``: a mask that the training knew nothing of."""
    config = replace(dense.config, afrac=like.config.afrac, afrac_loctypes=like.config.afrac_loctypes)
    other = CircuitGPT(config)
    other.load_state_dict(dense.state_dict())
    other.tokenizer, other.card = dense.tokenizer, {**dense.card, "name": "dense, mask afterwards"}
    return other.eval()


def gather(model: CircuitGPT, texts: Sequence[Texts], hooks: Sequence[str]) -> Gathered:
    """Activations, gradients and masks at ``hooks`` over all tokens of ``texts`` that have a next token.

    The gradient at a token is that of the loss summed over its text. Refused where no token has a next one.
    """
    tokens = sum(int(one.mask[:, 1:].sum()) for one in texts)
    if not tokens:
        raise Refused("no text has two tokens, so there is no next token and no gradient; give longer texts")
    rows: dict[str, Rows] = {}
    loss = 0.0
    for group in _groups(model, hooks, tokens):
        parts: dict[str, list[_Three]] = {name: [] for name in group}
        numbers, begun, loss = [], 0, 0.0
        for one in texts:
            of, here = _batch(model, one, group)
            loss += of
            real = one.mask[:, 1:]
            for name in group:
                value, gradient, mask = (part[:, :-1][real] for part in here[name])
                parts[name].append((value.float(), gradient.float(), mask))
            numbers.append(begun + real.nonzero()[:, 0])
            begun += len(one.ids)
        text = torch.cat(numbers)
        for name, found in parts.items():
            value, gradient, mask = (torch.cat(each) for each in zip(*found, strict=True))
            rows[name] = Rows(value, gradient, mask, text)
    return Gathered({name: rows[name] for name in hooks}, loss / tokens)


def _groups(model: CircuitGPT, hooks: Sequence[str], tokens: int) -> Iterator[list[str]]:
    """Hooks whose rows fit into memory together."""
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
        found = torch.autograd.grad(loss, [values[name] for name in hooks], allow_unused=True)
    here: dict[str, _Three] = {}
    for name, gradient in zip(hooks, found, strict=True):
        value = values[name].detach()
        all_kept = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        here[name] = (value, torch.zeros_like(value) if gradient is None else gradient, masks.get(name, all_kept))
    return float(loss.detach()), here


def shuffled(rows: Mapping[str, Rows], rng: np.random.Generator) -> dict[str, Rows]:
    """Each token's gradient behind the mask of another token: supports keep how often a channel is in them, and
    nothing of which token it is in."""
    return {
        name: replace(one, mask=one.mask[torch.from_numpy(rng.permutation(len(one.mask)))])
        for name, one in rows.items()
    }
