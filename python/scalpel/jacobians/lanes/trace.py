"""The primal of a CircuitGPT, which can be cut at any of its hooks: what the rules of its sublayers need.

It runs once, from the embedding to the last hook that is asked for, in the order of models.circuitgpt, and leaves for
each sublayer the supports that its TopKs keep, its norm, attention's q, k, v and y, and the slopes of its neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._native import runs_on
from ...hooks.masks import watched
from ...hooks.modules import hooks_on
from ...hooks.stopping import Stop
from ...lanes import Attention, Norm, apply_linear
from ...models.circuitgpt.attention import attend
from ...models.circuitgpt.core import CircuitCore
from ...models.circuitgpt.model import CircuitGPT
from ...topk import keep_topk, topk_indices

if TYPE_CHECKING:
    from ..passes import CircuitPass

Function = Callable[[Tensor], Tensor]


def has_products(model: CircuitGPT) -> bool:
    """Whether the rules here are the model's: float32 or float64, on a device that has kernels, its own modules, none
    hooked.
    """
    if not runs_on(model.device) or model.dtype not in (torch.float32, torch.float64):
        return False
    known = {CircuitGPT, nn.Linear, nn.Embedding, nn.RMSNorm, nn.ModuleDict, nn.ModuleList}
    for module in model.modules():
        if type(module).__module__ != CircuitCore.__module__ and type(module) not in known:
            return False
        if hooks_on(module) or module._backward_hooks:
            return False
    return True


@dataclass
class Sublayer:
    """The primal of one attention or MLP block, between two values of the residual stream."""

    norm: Norm | None = None
    kept: dict[str, Tensor | None] = field(default_factory=dict)  # support (N, entries) by hook; None: all
    attention: Attention | None = None
    slope: Tensor | None = None  # derivative of the activation at the kept neurons (N, entries)
    residual: Tensor | None = None  # 1 where the residual stream passes after the block (N, d_model)


@dataclass
class Layer:
    number: int
    block: Any
    attn: Sublayer = field(default_factory=Sublayer)
    mlp: Sublayer = field(default_factory=Sublayer)


class CircuitTrace:
    """One forward pass, kept as what products need.

    Args:
        run: A pass of the model at the inputs, under the interventions of that moment.
        hooks: Where the primal is to be cut, in the model's order. Layers before the first are not kept, and nothing
            is computed after the last.
        see: Called at every hook up to the last, with its name and the value that it records.

    ``values``: the value at each of ``hooks``, all tokens. ``changed``: the hooks at which an intervention moves it.
    """

    def __init__(
        self, run: CircuitPass, hooks: Sequence[str], see: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self.run = run
        self.see = see
        self.model = run._frozen
        self.config = self.model.config
        self.hooks = hooks
        self.values: dict[str, Tensor] = {}
        self.first = self._number(hooks[0])
        self._stop = Stop()
        self._layers: list[Layer] = []
        self.changed: dict[str, tuple[Function, Tensor]] = {}  # hooks at which an intervention moves the value
        self.final: Norm | None = None
        self.tap = self.model._composed_tap(None)
        allowed = run.allowed
        self.allowed = (allowed[None] if allowed.dim() == 2 else allowed[:, 0]).contiguous()
        with torch.no_grad(), self._stop:
            self._hook("logits", self._run())

    def has(self, source: str, target: str) -> bool:
        """Whether it can be cut at ``source`` and, no earlier in the model, at ``target``."""
        kept = list(self.hooks)
        return source in kept and target in kept[kept.index(source) :]

    def layers(self, source: str, target: str) -> list[Layer]:
        """Those that a tangent meets on its way from one hook to another."""
        return self._layers[self._number(source) - self.first : self._number(target) + 1 - self.first]

    def _number(self, hook: str) -> int:
        """The layer of a hook; how many layers there are, for a hook after the last."""
        at = hook.partition(".")[0]
        return int(at) if at.isdecimal() else self.config.n_layer

    def _run(self) -> Tensor:
        ids, mask, position_ids = self.run.inputs
        allowed = self.run.allowed
        positions = self.model._positions(ids, mask, position_ids)
        concatenated = self.config.d_pos_emb is not None
        x = self.model.transformer.wte(ids)
        if not concatenated:
            x = x + positions
        for number, block in enumerate(self.model.transformer.h):
            x = self._layer(number, block, x, positions if concatenated else None, allowed)
        x = self._hook("final_resid", x)
        self.final = Norm.of(self.model.transformer.ln_f, self._tokens(x))
        logits = apply_linear(self.model.lm_head, self.model.transformer.ln_f(x)) + self.model.final_logits_bias.to(
            x.dtype
        )
        if self.model.bigram_table is not None:
            logits = logits + self.model.bigram_table[ids].to(x.dtype)
        return logits

    def _layer(self, number: int, block: Any, x: Tensor, positions: Tensor | None, allowed: Tensor) -> Tensor:
        config = self.config
        layer = Layer(number, block)
        if number >= self.first:
            self._layers.append(layer)
        x = self._hook(f"{number}.resid_in", x)
        attn, mlp = layer.attn, layer.mlp
        attn.norm = self._norm(block.ln_1, x)

        def kept(of: Sublayer, value: Tensor, location: str, hook: str) -> Tensor:
            value, of.kept[hook] = self._sparsified(value, location, f"{number}.{hook}")
            return self._hook(f"{number}.{hook}", value)

        read = kept(attn, self._read(block, "1", x, positions), "attn_in", "attn.act_in")
        q, k, v = apply_linear(block.attn.c_attn, read).split(config.d_attn, dim=-1)
        k = kept(attn, k, "attn_k", "attn.k")
        q = kept(attn, q, "attn_q", "attn.q")
        v = kept(attn, v, "attn_v", "attn.v")
        sink = block.attn.attn_imp.sink_logit.detach() if config.sink else None
        y = attend(q, k, v, config.n_head, allowed, sink)
        scale = (config.d_attn // config.n_head) ** -0.5
        attn.attention = Attention(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            y.contiguous(),
            self.allowed,
            sink,
            config.n_head,
            config.n_head,
            scale,
        )
        y = self._hook(f"{number}.attn.y", y)
        delta = kept(attn, apply_linear(block.attn.c_proj, y), "attn_out", "attn.resid_delta")
        x, attn.residual = self._settled(x + delta, "resid_post_attn", number)
        x = self._hook(f"{number}.resid_mid", x)

        mlp.norm = self._norm(block.ln_2, x)
        read = kept(mlp, self._read(block, "2", x, positions), "mlp_in", "mlp.act_in")
        before = apply_linear(block.mlp.c_fc, read)
        after, support = self._sparsified(block.mlp.activation(before), "mlp_neuron", f"{number}.mlp.post_act")
        mlp.kept["mlp.post_act"] = support
        mlp.slope = self._slope(before, support)
        after = self._hook(f"{number}.mlp.post_act", after)
        delta = kept(mlp, apply_linear(block.mlp.c_proj, after), "mlp_out", "mlp.resid_delta")
        x, mlp.residual = self._settled(x + delta, "resid_post_mlp", number)
        return x

    def _hook(self, name: str, value: Tensor) -> Tensor:
        after = self.tap(name, value)
        if after is not value:
            self.changed[name] = (lambda each: self.tap(name, each), value)
        if self.see is not None:
            self.see(name, after)
        if name in self.hooks:
            self.values[name] = after
            if name == self.hooks[-1]:
                self._stop(after)
        return after

    def _tokens(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def _norm(self, module: nn.Module, x: Tensor) -> Norm:
        """The norm of the residual stream; concatenated positions follow it as channels of gain zero."""
        norm = Norm.of(module, self._tokens(x))
        return norm if self.config.d_pos_emb is None else norm.padded(self.config.d_in)

    def _read(self, block: Any, which: str, x: Tensor, positions: Tensor | None) -> Tensor:
        read: Tensor = getattr(block, f"ln_{which}")(x)
        if positions is None:
            return read
        beside = getattr(block, f"ln_p{which}")(positions).expand(*read.shape[:-1], -1)
        return torch.cat([read, beside], dim=-1)

    def _sparsified(self, x: Tensor, location: str, name: str) -> tuple[Tensor, Tensor | None]:
        k = self.config.k_at(location, x.shape[-1])
        if k is None:
            return x, None
        watched(name, x, k)
        return keep_topk(x, k), topk_indices(self._tokens(x), k)

    def _settled(self, x: Tensor, location: str, number: int) -> tuple[Tensor, Tensor | None]:
        passes = None
        if self.config.residual_activation_type == "relu":
            x = x.relu()
            passes = (x > 0).to(x.dtype)
        x, support = self._sparsified(x, location, f"{number}.{location}")
        if support is not None:
            kept = torch.zeros_like(self._tokens(x)).scatter_(1, support, 1.0).view_as(x)
            passes = kept if passes is None else passes * kept
        return x, None if passes is None else self._tokens(passes).contiguous()

    def _slope(self, before: Tensor, support: Tensor | None) -> Tensor:
        x = self._tokens(before)
        x = x if support is None else x.gather(1, support)
        if self.config.activation_type == "relu":
            return (x > 0).to(x.dtype)
        normal = 0.5 * (1 + torch.erf(x * 0.5**0.5))  # the exact GELU is x times this
        return normal + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
