"""The rest of a forward pass from any hook on, for many variants of one node each, and only what the answer needs.

``model.ablate`` runs the whole model for every node. Here the pass without ablation is kept, and a node's change is
taken up where it happens: a channel that a matrix reads changes the product by one column of it, a channel of q, k or
v changes one head. Behind that everything is computed for all variants side by side: each distinct prefix of the
prompts once (see :mod:`.packing`), and in the last layer, where only the questions are read, only there. The arithmetic
is that of :mod:`scalpel.models.circuitgpt.model`.

Shapes: G variants, N distinct prefixes, P prompts: (G, N, width), in the last layer behind its keys and values
(G, P, width); what no variant has changed yet is (1, N, width).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lanes import FORWARD_BELOW, Linear, apply_linear
from ..models.circuitgpt.attention import attend
from ..models.circuitgpt.model import CircuitGPT
from ..topk import keep_topk
from .packing import Packed

__all__ = ["Tail"]


class Tail:
    """Answers' logits of packed prompts with one channel of a hook replaced.

    ``values``: what every hook had in the pass without ablation, (N, width) each; ``logits`` (P, answers) of that pass.
    """

    def __init__(self, model: CircuitGPT, prompts: Packed, answers: tuple[int, ...]) -> None:
        self.model, self.prompts, self.answers = model, prompts.on(model.device), list(answers)
        _, values = model.run_with_cache(prompts.ids)
        self.values = {name: value.flatten(0, 1)[prompts.first] for name, value in values.items()}
        self._before: dict[str, Tensor] = {}
        concatenated = model.config.d_pos_emb is not None
        self._positions = model.transformer.wpe.weight[prompts.depth] if concatenated else None
        self.logits = self._end(self._base("final_resid")[:, prompts.asked])[0]

    def replaced(self, hook: str, channels: Tensor, change: Tensor) -> Tensor:
        """Logits (G, P, answers) with ``change`` (G, N), added to one channel a variant, ``channels`` (G,)."""
        if hook == "final_resid":
            asked = self.prompts.asked
            return self._end(_changed(self._base(hook)[:, asked], channels, change[:, asked]))
        number, _, kind = hook.partition(".")
        layer = int(number)
        enter = getattr(self, "_from_" + kind.replace(".", "_"))
        found: Tensor = enter(layer, channels, change)
        return found

    # One entrance a kind of hook. Behind the last layer's attention only the questions are kept.

    def _from_resid_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._block(layer, _changed(self._base(f"{layer}.resid_in"), channels, change))

    def _from_attn_act_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).attn.c_attn
        product = _column(self._product(f"{layer}.attn.act_in", linear), linear, channels, change)
        q, k, v = product.split(self.model.config.d_attn, dim=-1)
        q, x = self._late(layer, q, self._base(f"{layer}.resid_in"))
        return self._after_qkv(layer, x, q, k, v)

    def _from_attn_q(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "q", channels, change)

    def _from_attn_k(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "k", channels, change)

    def _from_attn_v(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "v", channels, change)

    def _from_attn_y(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).attn.c_proj
        product, x, change = self._late(
            layer, self._product(f"{layer}.attn.y", linear), self._base(f"{layer}.resid_in"), change
        )
        return self._after_attention(layer, x, _column(product, linear, channels, change))

    def _from_attn_resid_delta(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        x, delta, change = self._late(
            layer, self._base(f"{layer}.resid_in"), self._base(f"{layer}.attn.resid_delta"), change
        )
        return self._middle(layer, x + _changed(delta, channels, change))

    def _from_resid_mid(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        x, change = self._late(layer, self._base(f"{layer}.resid_mid"), change)
        return self._mlp(layer, _changed(x, channels, change))

    def _from_mlp_act_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).mlp.c_fc
        product, x, change = self._late(
            layer, self._product(f"{layer}.mlp.act_in", linear), self._base(f"{layer}.resid_mid"), change
        )
        return self._after_fc(layer, x, _column(product, linear, channels, change))

    def _from_mlp_post_act(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).mlp.c_proj
        product, x, change = self._late(
            layer, self._product(f"{layer}.mlp.post_act", linear), self._base(f"{layer}.resid_mid"), change
        )
        return self._after_mlp(layer, x, _column(product, linear, channels, change))

    def _from_mlp_resid_delta(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        x, delta, change = self._late(
            layer, self._base(f"{layer}.resid_mid"), self._base(f"{layer}.mlp.resid_delta"), change
        )
        return self._leave(layer, x + _changed(delta, channels, change))

    # The way from there to the answer, stage by stage.

    def _block(self, layer: int, x: Tensor) -> Tensor:
        block, width = self._at(layer), self.model.config.d_attn
        read = self._keep(self._read(block.ln_1(x), getattr(block, "ln_p1", None), self._positions), "attn_in")
        linear = block.attn.c_attn
        if not self._last(layer):
            return self._after_qkv(layer, x, *apply_linear(linear, read).split(width, dim=-1))
        asking, x = self._late(layer, read, x)
        k, v = _some_rows(linear, read, slice(width, None)).split(width, dim=-1)
        return self._after_qkv(layer, x, _some_rows(linear, asking, slice(0, width)), k, v)

    def _after_qkv(self, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = self._at(layer).attn
        k, q, v = self._keep(k, "attn_k"), self._keep(q, "attn_q"), self._keep(v, "attn_v")
        sink = attention.attn_imp.sink_logit if self.model.config.sink else None
        y = attend(q, k, v, self.model.config.n_head, self._allowed(layer), sink)
        return self._after_attention(layer, x, apply_linear(attention.c_proj, y))

    def _one_head(self, layer: int, part: str, channels: Tensor, change: Tensor) -> Tensor:
        """One head a variant is computed anew; the others' outputs stand."""
        config, attention = self.model.config, self._at(layer).attn
        width = config.d_attn // config.n_head
        heads = channels // width
        parts = {}
        for name in (*"qkv", "y"):
            value = self.values[f"{layer}.attn.{name}"].unflatten(-1, (config.n_head, width))
            parts[name] = value[:, heads].transpose(0, 1).clone()
        parts[part][torch.arange(len(channels), device=channels.device), :, channels % width] += change
        q, k, v, was = (parts[name] for name in (*"qkv", "y"))
        product = self._product(f"{layer}.attn.y", attention.c_proj)
        x = self._base(f"{layer}.resid_in")
        q, was, product, x = self._late(layer, q, was, product, x)
        scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill_(~self._allowed(layer), float("-inf"))
        if config.sink:
            sink = attention.attn_imp.sink_logit[heads].view(-1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
        else:
            weights = scores.softmax(-1)
        matrices = attention.c_proj.weight.unflatten(1, (config.n_head, width))[:, heads]  # (d_model, G, width)
        moved = (weights @ v - was) @ matrices.permute(1, 2, 0)
        return self._after_attention(layer, x, moved.add_(product))

    def _after_attention(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        delta = self._keep(product, "attn_out")
        return self._middle(layer, delta.add_(x) if len(delta) >= len(x) else x + delta)

    def _middle(self, layer: int, x: Tensor) -> Tensor:
        return self._mlp(layer, self._at(layer)._settle(x, "resid_post_attn", str(layer)))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self._at(layer)
        positions = self._positions
        if positions is not None and self._last(layer):
            positions = positions[self.prompts.asked]
        read = self._read(block.ln_2(x), getattr(block, "ln_p2", None), positions)
        read = self._keep(read, "mlp_in")
        return self._after_fc(layer, x, apply_linear(block.mlp.c_fc, read))

    def _after_fc(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        mlp = self._at(layer).mlp
        neurons = torch.ops.aten.gelu_(product) if mlp.activation is F.gelu else mlp.activation(product)
        neurons = self._keep(neurons, "mlp_neuron")
        return self._after_mlp(layer, x, apply_linear(mlp.c_proj, neurons))

    def _after_mlp(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        delta = self._keep(product, "mlp_out")
        return self._leave(layer, delta.add_(x) if len(delta) >= len(x) else x + delta)

    def _leave(self, layer: int, x: Tensor) -> Tensor:
        x = self._at(layer)._settle(x, "resid_post_mlp", str(layer))
        return self._end(x) if self._last(layer) else self._block(layer + 1, x)

    def _end(self, x: Tensor) -> Tensor:
        model = self.model
        weight = model.lm_head.weight[self.answers]
        logits = model.transformer.ln_f(x) @ weight.T + model.final_logits_bias[self.answers].to(x.dtype)
        if model.bigram_table is not None:
            last = self.prompts.ids.flatten()[self.prompts.first[self.prompts.asked]]
            logits = logits + model.bigram_table[last][:, self.answers].to(x.dtype)
        return logits

    # Pieces.

    def _at(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

    def _last(self, layer: int) -> bool:
        return layer == self.model.config.n_layer - 1

    def _allowed(self, layer: int) -> Tensor:
        """Which tokens the queries read: all queries, or in the last layer the questions'."""
        return self.prompts.ancestors[self.prompts.asked] if self._last(layer) else self.prompts.ancestors

    def _keep(self, value: Tensor, location: str) -> Tensor:
        """AbsTopK at a location, in place: ``value`` was made here, and fresh memory costs more than the selection."""
        k = self.model.config.k_at(location, value.shape[-1])
        return value if k is None else keep_topk(value, k, out=value)

    def _late(self, layer: int, *values: Tensor) -> tuple[Tensor, ...]:
        """Values (G, N, …) as they are behind a layer's keys and values: in the last one the questions', (G, P, …)."""
        return tuple(value[:, self.prompts.asked] for value in values) if self._last(layer) else values

    def _base(self, hook: str) -> Tensor:
        return self.values[hook][None]

    def _product(self, hook: str, linear: torch.nn.Linear) -> Tensor:
        """What a matrix makes of a hook's value without ablation, (1, N, out); made once."""
        if hook not in self._before:
            self._before[hook] = apply_linear(linear, self.values[hook])[None]
        return self._before[hook]

    def _read(self, normed: Tensor, norm: Any, positions: Tensor | None) -> Tensor:
        """The normed residual, beside it the normed positions where the model concatenates them."""
        if positions is None:
            return normed
        return torch.cat([normed, norm(positions).expand(*normed.shape[:-1], -1)], dim=-1)


def _some_rows(linear: torch.nn.Linear, x: Tensor, rows: slice) -> Tensor:
    """Some outputs of a linear layer, by its non-zeros if these are few."""
    part, bias = Linear(linear, rows), None if linear.bias is None else linear.bias[rows]
    if x.dtype != linear.weight.dtype or part.density() >= FORWARD_BELOW:
        return F.linear(x, linear.weight[rows], bias)
    return part.sparse().forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)


def _changed(value: Tensor, channels: Tensor, change: Tensor) -> Tensor:
    """``value`` (1, N, width) with one channel a variant changed: (G, N, width)."""
    variants = value.repeat(len(channels), 1, 1)
    variants[torch.arange(len(channels), device=channels.device), :, channels] += change
    return variants


def _column(product: Tensor, linear: torch.nn.Linear, channels: Tensor, change: Tensor) -> Tensor:
    """A product (1, N, out) with one input channel a variant changed: (G, N, out)."""
    return torch.baddbmm(product.expand(len(channels), -1, -1), change[..., None], linear.weight.T[channels][:, None])
