"""The primal of a CircuitGPT, which can be cut at any of its hooks: what the rules of its sublayers need.

The model runs once, from the embedding to the last hook that is asked for. Each sublayer then has the supports that its
TopKs keep, its norm, attention's q, k, v and y, and the slopes of its neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._native import runs_on
from ...hooks.masks import MaskWatch, watch_activations, watch_masks
from ...hooks.modules import hooks_on
from ...hooks.names import PATTERN
from ...hooks.positions import Selected, read_at
from ...hooks.running import eager
from ...hooks.stopping import Stop
from ...lanes import Attention, Norm
from ...models.circuitgpt import layers
from ...models.circuitgpt.layers import Attention as CoreAttention
from ...models.circuitgpt.model import CircuitGPT
from ...topk import topk_indices
from ..pattern import Pattern

if TYPE_CHECKING:
    from ..passes import CircuitPass

Function = Callable[[Tensor], Tensor]


def has_products(model: CircuitGPT) -> bool:
    """Whether the rules in this folder hold for a model.

    They do for float32 and float64 on a device that has kernels, if all modules are CircuitGPT's own and none has a
    forward or backward hook.
    """
    if not runs_on(model.device) or model.dtype not in (torch.float32, torch.float64):
        return False
    known = {CircuitGPT, nn.Linear, nn.Embedding, nn.RMSNorm, nn.ModuleDict, nn.ModuleList}
    for module in model.modules():
        if type(module).__module__ != layers.__name__ and type(module) not in known:
            return False
        if hooks_on(module) or module._backward_hooks:
            return False
    return True


@dataclass
class Sublayer:
    """The primal of one attention or MLP, between two values of the residual stream."""

    norm: Norm | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)  # {hook: channels (N, entries) that its AbsTopK keeps}
    attention: Attention | None = None
    slope: Tensor | None = None  # derivative of the activation at the kept neurons (N, entries)
    residual: Tensor | None = None  # (N, d_model): 1 where the residual stream passes on after it; None: everywhere


@dataclass
class Layer:
    """The primal of one layer."""

    number: int
    block: Any
    attn: Sublayer = field(default_factory=Sublayer)
    mlp: Sublayer = field(default_factory=Sublayer)


class CircuitTrace:
    """One forward pass of a CircuitGPT, kept as what products need.

    The model's own forward pass runs. A tap and two watches collect from what passes by: supports from the inputs of
    AbsTopKs, slopes from those of activations, norms and attention from the values at hooks.

    Args:
        run: A pass of the model at the inputs, under the interventions of that moment.
        hooks: Where the primal is to be cut, in the model's order. Layers before the first are not kept, and nothing
            is computed after the last.
        see: Called at every hook up to the last, with its name and the value that it records.
        see_mask: Called before every AbsTopK and ReLU on the way, as :func:`scalpel.hooks.masks.watch_masks` says.
        relevance: Whether products follow the rules of the relevance lens instead of the derivative.

    Attributes:
        values: The value at each of ``hooks``, (B, L, width), all tokens.
        changed: From the first layer that is kept, the hooks at which an intervention changes the value, each with
            the intervention and the value before it.
        final: The last norm; None where the pass ends before it.
        pattern: A function from chosen queries to the attention weights at which the pass ends; None if it ends
            elsewhere.
    """

    def __init__(
        self,
        run: CircuitPass,
        hooks: Sequence[str],
        see: Callable[[str, Tensor], None] | None = None,
        see_mask: MaskWatch | None = None,
        relevance: bool = False,
    ) -> None:
        self.run = run
        self.model = run._frozen
        self.config = self.model.config
        self.hooks = hooks
        self.values: dict[str, Tensor] = {}
        self.changed: dict[str, tuple[Function, Tensor]] = {}
        self.final: Norm | None = None
        self.pattern: Callable[[Selected], Pattern] | None = None
        self._first = self._number(hooks[0])
        self._see, self._see_mask = see, see_mask
        self._relevance = relevance
        self._stop = Stop()
        self._layers: list[Layer] = []
        self._heads: dict[str, Tensor] = {}  # the layer's q, k and v, until its attention is kept
        self._hidden: Tensor | None = None  # the input of the layer's activation, until its slope is kept
        self._intervene = self.model._composed_tap(None)
        allowed = run.allowed
        self._allowed = (allowed[None] if allowed.dim() == 2 else allowed[:, 0]).contiguous()
        bare = copy.copy(self.model)
        bare._interventions = []  # the tap here makes them, and so sees the values before and after
        watching = watch_masks(self._watch_mask), watch_activations(self._watch_activation)
        with torch.no_grad(), eager(), watching[0], watching[1], self._stop:  # a compiled graph shows no mask
            self.values["logits"] = bare(*run.inputs, tap=self._tap, patterns=hooks)

    def has(self, source: str, target: str) -> bool:
        """Whether it can be cut at ``source`` and, no earlier in the model, at ``target``."""
        kept = list(self.hooks)
        return source in kept and target in kept[kept.index(source) :]

    def layers(self, source: str, target: str) -> list[Layer]:
        """The layers that a tangent meets on its way from one hook to another."""
        return self._layers[self._number(source) - self._first : self._number(target) + 1 - self._first]

    def _number(self, hook: str) -> int:
        """The layer of a hook; the number of layers for a hook after the last."""
        at = hook.partition(".")[0]
        return int(at) if at.isdecimal() else self.config.n_layer

    def _kept_layer(self, name: str) -> Layer | None:
        """The layer that a hook or a mask belongs to; None before the first that is kept and after the last."""
        number = self._number(name)
        if number < self._first or number == self.config.n_layer:
            return None
        if number == self._first + len(self._layers):
            self._layers.append(Layer(number, self.model.transformer.h[number]))
        return self._layers[number - self._first]

    def _tap(self, name: str, value: Tensor) -> Tensor:
        after = self._intervened(name, value)
        if after is not value and self._number(name) >= self._first:
            self.changed[name] = (lambda each: self._intervene(name, each), value)
        layer, place = self._kept_layer(name), name.partition(".")[2]
        if layer is not None:
            if place == PATTERN:
                self.pattern = partial(self._pattern, self._heads["attn.q"], self._heads["attn.k"], layer)
            if place == "attn.y":
                layer.attn.attention = self._attention(layer.block.attn, value)
            if place == "mlp.post_act":
                layer.mlp.slope = self._slope(layer.mlp.kept.get(place))
        if self._see is not None:
            self._see(name, after)
        if name in self.hooks:
            self.values[name] = after
            if name == self.hooks[-1]:
                self._stop(after)
        if name == "final_resid":
            self.final = Norm.of(self.model.transformer.ln_f, _tokens(after))
        if layer is not None:
            if place == "resid_in":
                layer.attn.norm = self._norm(layer.block.ln_1, after)
            if place == "resid_mid":
                layer.mlp.norm = self._norm(layer.block.ln_2, after)
            if place in ("attn.q", "attn.k", "attn.v"):
                self._heads[place] = after
        return after

    def _intervened(self, name: str, value: Tensor) -> Tensor:
        """Let the interventions act; a model that one of them runs is not this one, and is not watched."""
        if not self.model._interventions:
            return value
        with watch_masks(_ignore), watch_activations(_ignore):
            return self._intervene(name, value)

    def _watch_mask(self, name: str, x: Tensor, k: int | None) -> None:
        if self._see_mask is not None:
            self._see_mask(name, x, k)
        layer, place = self._kept_layer(name), name.partition(".")[2]
        if layer is None:
            return
        if place == "resid_post_attn":
            _narrow(layer.attn, _tokens(x), k)
        elif place == "resid_post_mlp":
            _narrow(layer.mlp, _tokens(x), k)
        elif k is not None:  # a neuron's ReLU counts as its slope
            of = layer.attn if place.startswith("attn.") else layer.mlp
            of.kept[place] = topk_indices(_tokens(x), k)

    def _watch_activation(self, name: str, x: Tensor) -> None:
        if self._kept_layer(name) is not None:
            self._hidden = x

    def _attention(self, module: CoreAttention, y: Tensor) -> Attention:
        q, k, v = (self._heads.pop(place).contiguous() for place in ("attn.q", "attn.k", "attn.v"))
        heads = self.config.n_head
        sink = None if module.sink_logit is None else module.sink_logit.detach()
        scale = (self.config.d_attn // heads) ** -0.5
        return Attention(q, k, v, y.contiguous(), self._allowed, sink, heads, heads, scale)

    def _pattern(self, q: Tensor, k: Tensor, layer: Layer, chosen: Selected) -> Pattern:
        heads, sink = self.config.n_head, layer.block.attn.sink_logit
        q, k = (part.unflatten(-1, (heads, -1)) for part in (q, k))
        sink = None if sink is None else sink.detach()
        return Pattern.at(q, k, chosen, read_at(self._allowed, chosen), q.shape[-1] ** -0.5, sink)

    def _norm(self, module: nn.Module, x: Tensor) -> Norm:
        """The norm of the residual stream; concatenated positions follow it as channels of gain zero."""
        norm = Norm.of(module, _tokens(x))
        if self._relevance:  # without the component along the normed value, the rate is a constant
            norm = replace(norm, normed=torch.zeros_like(norm.normed))
        return norm if self.config.d_pos_emb is None else norm.padded(self.config.d_in)

    def _slope(self, support: Tensor | None) -> Tensor:
        """The activation's derivative at the neurons that are kept, (N, entries); f(x) / x for the relevance lens."""
        assert self._hidden is not None
        x, self._hidden = _tokens(self._hidden), None
        x = x if support is None else x.gather(1, support)
        if self.config.activation_type == "relu":
            return (x > 0).to(x.dtype)
        normal = 0.5 * (1 + torch.erf(x * 0.5**0.5))  # the exact GELU is x times this
        if self._relevance:
            return normal
        return normal + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5


def _ignore(*_: Any) -> None:
    """Watch nothing."""


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _narrow(of: Sublayer, x: Tensor, k: int | None) -> None:
    """Let pass no more of the residual stream than a ReLU (k None) or an AbsTopK of input x (N, d_model) does."""
    passes = (x > 0).to(x.dtype) if k is None else torch.zeros_like(x).scatter_(1, topk_indices(x, k), 1.0)
    of.residual = (passes if of.residual is None else of.residual * passes).contiguous()
