"""The rest of a forward pass from any hook on, for many variants of one node each, and only what the answer needs.

``model.ablate`` runs the whole model for every node. Here the pass without ablation is kept, and a node's change is
taken up where it happens: a channel that a matrix reads changes the product by one column of it, a channel of q, k or
v changes one head. Behind that everything is computed for all variants side by side, and in the last layer, where only
the question's position is read, only there. The arithmetic is that of :mod:`scalpel.models.circuitgpt`.

Shapes: G variants, P prompts of one length L, the question at the last position: (G, P, L, width); what no variant has
changed yet is (1, P, L, width).
"""

from typing import Any

import torch
from torch import Tensor

from ..lanes import apply_linear
from ..models.attention import attend
from ..models.circuitgpt import CircuitGPT

__all__ = ["Tail"]


class Tail:
    """Answers' logits of prompts of one length, ids (P, L), with one channel of a hook replaced.

    ``values``: what every hook had in the pass without ablation, (P, L, width) each.
    """

    def __init__(self, model: CircuitGPT, ids: Tensor, answers: tuple[int, ...]) -> None:
        self.model, self.ids, self.answers = model, ids, list(answers)
        logits, self.values = model.run_with_cache(ids)
        assert logits is not None
        self.logits = logits[:, -1, self.answers]
        length = ids.shape[1]
        self._causal = torch.ones(length, length, dtype=torch.bool).tril()
        self._before: dict[str, Tensor] = {}
        concatenated = model.config.d_pos_emb is not None
        self._positions = model.transformer.wpe.weight[:length] if concatenated else None

    def replaced(self, hook: str, channels: Tensor, change: Tensor) -> Tensor:
        """Logits (G, P, answers) with ``change`` (G, P, L), added to one channel a variant, ``channels`` (G,)."""
        if hook == "final_resid":
            return self._end(self._changed(hook, channels, change))
        number, _, kind = hook.partition(".")
        layer = int(number)
        enter = getattr(self, "_from_" + kind.replace(".", "_"))
        found: Tensor = enter(layer, channels, change)
        return found

    # One entrance a kind of hook.

    def _from_resid_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._block(layer, self._changed(f"{layer}.resid_in", channels, change))

    def _from_attn_act_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).attn.c_attn
        product = self._product(f"{layer}.attn.act_in", linear) + _column(linear, channels, change)
        return self._after_qkv(layer, self._base(f"{layer}.resid_in"), product)

    def _from_attn_q(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "q", channels, change)

    def _from_attn_k(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "k", channels, change)

    def _from_attn_v(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._one_head(layer, "v", channels, change)

    def _from_attn_y(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).attn.c_proj
        product = self._product(f"{layer}.attn.y", linear) + _column(linear, channels, change)
        return self._after_attention(layer, self._base(f"{layer}.resid_in"), product)

    def _from_attn_resid_delta(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        delta = self._changed(f"{layer}.attn.resid_delta", channels, change)
        return self._middle(layer, self._base(f"{layer}.resid_in") + delta)

    def _from_resid_mid(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        return self._mlp(layer, self._changed(f"{layer}.resid_mid", channels, change))

    def _from_mlp_act_in(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).mlp.c_fc
        product = self._product(f"{layer}.mlp.act_in", linear) + _column(linear, channels, change)
        return self._after_fc(layer, self._base(f"{layer}.resid_mid"), product)

    def _from_mlp_post_act(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        linear = self._at(layer).mlp.c_proj
        product = self._product(f"{layer}.mlp.post_act", linear) + _column(linear, channels, change)
        return self._after_mlp(layer, self._base(f"{layer}.resid_mid"), product)

    def _from_mlp_resid_delta(self, layer: int, channels: Tensor, change: Tensor) -> Tensor:
        delta = self._changed(f"{layer}.mlp.resid_delta", channels, change)
        return self._leave(layer, self._base(f"{layer}.resid_mid") + delta)

    # The way from there to the answer, stage by stage.

    def _block(self, layer: int, x: Tensor) -> Tensor:
        block = self._at(layer)
        read = self._read(block.ln_1(x), getattr(block, "ln_p1", None))
        read = block.attn._sparsify(read, "attn_in", f"{layer}.attn.act_in")
        return self._after_qkv(layer, x, apply_linear(block.attn.c_attn, read))

    def _after_qkv(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        attention = self._at(layer).attn
        q, k, v = product.split(self.model.config.d_attn, dim=-1)
        if self._last(layer):
            q, x = q[:, :, -1:], x[:, :, -1:]
        k = attention._sparsify(k, "attn_k", f"{layer}.attn.k")
        q = attention._sparsify(q, "attn_q", f"{layer}.attn.q")
        v = attention._sparsify(v, "attn_v", f"{layer}.attn.v")
        allowed = self._causal[-q.shape[2] :]
        sink = attention.attn_imp.sink_logit if self.model.config.sink else None
        y = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.model.config.n_head, allowed, sink)
        return self._after_attention(layer, x, apply_linear(attention.c_proj, y.unflatten(0, q.shape[:2])))

    def _one_head(self, layer: int, part: str, channels: Tensor, change: Tensor) -> Tensor:
        """One head a variant is computed anew; the others' outputs stand."""
        config, attention = self.model.config, self._at(layer).attn
        width = config.d_attn // config.n_head
        heads = channels // width
        own = torch.arange(len(channels))
        parts = {}
        for name in "qkv":
            value = self.values[f"{layer}.attn.{name}"].unflatten(-1, (config.n_head, width))
            parts[name] = value[:, :, heads].permute(2, 0, 1, 3).clone()
        parts[part][own, :, :, channels % width] += change
        q, k, v = parts["q"], parts["k"], parts["v"]
        was = self.values[f"{layer}.attn.y"].unflatten(-1, (config.n_head, width))[:, :, heads].permute(2, 0, 1, 3)
        product = self._product(f"{layer}.attn.y", attention.c_proj)
        x = self._base(f"{layer}.resid_in")
        if self._last(layer):
            q, was, product, x = q[:, :, -1:], was[:, :, -1:], product[:, :, -1:], x[:, :, -1:]
        scores = q @ k.transpose(-1, -2) / width**0.5
        scores = scores.masked_fill(~self._causal[-q.shape[2] :], float("-inf"))
        if config.sink:
            sink = attention.attn_imp.sink_logit[heads].view(-1, 1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
        else:
            weights = scores.softmax(-1)
        matrices = attention.c_proj.weight.unflatten(1, (config.n_head, width))[:, heads]  # (d_model, G, width)
        moved = (weights @ v - was).flatten(1, 2) @ matrices.permute(1, 2, 0)
        return self._after_attention(layer, x, product + moved.unflatten(1, was.shape[1:3]))

    def _after_attention(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        if self._last(layer):
            x, product = x[:, :, -1:], product[:, :, -1:]
        delta = self._at(layer).attn._sparsify(product, "attn_out", f"{layer}.attn.resid_delta")
        return self._middle(layer, x + delta)

    def _middle(self, layer: int, x: Tensor) -> Tensor:
        return self._mlp(layer, self._at(layer)._settle(x, "resid_post_attn", str(layer)))

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self._at(layer)
        if self._last(layer):
            x = x[:, :, -1:]
        read = self._read(block.ln_2(x), getattr(block, "ln_p2", None))
        read = block.mlp._sparsify(read, "mlp_in", f"{layer}.mlp.act_in")
        return self._after_fc(layer, x, apply_linear(block.mlp.c_fc, read))

    def _after_fc(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        mlp = self._at(layer).mlp
        if self._last(layer):
            x, product = x[:, :, -1:], product[:, :, -1:]
        neurons = mlp._sparsify(mlp.activation(product), "mlp_neuron", f"{layer}.mlp.post_act")
        return self._after_mlp(layer, x, apply_linear(mlp.c_proj, neurons))

    def _after_mlp(self, layer: int, x: Tensor, product: Tensor) -> Tensor:
        if self._last(layer):
            x, product = x[:, :, -1:], product[:, :, -1:]
        delta = self._at(layer).mlp._sparsify(product, "mlp_out", f"{layer}.mlp.resid_delta")
        return self._leave(layer, x + delta)

    def _leave(self, layer: int, x: Tensor) -> Tensor:
        x = self._at(layer)._settle(x, "resid_post_mlp", str(layer))
        return self._end(x) if self._last(layer) else self._block(layer + 1, x)

    def _end(self, x: Tensor) -> Tensor:
        model = self.model
        weight = model.lm_head.weight[self.answers]
        logits = model.transformer.ln_f(x[:, :, -1]) @ weight.T + model.final_logits_bias[self.answers].to(x.dtype)
        if model.bigram_table is not None:
            logits = logits + model.bigram_table[self.ids[:, -1]][:, self.answers].to(x.dtype)
        return logits

    # Pieces.

    def _at(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

    def _last(self, layer: int) -> bool:
        return layer == self.model.config.n_layer - 1

    def _base(self, hook: str) -> Tensor:
        return self.values[hook][None]

    def _changed(self, hook: str, channels: Tensor, change: Tensor) -> Tensor:
        value = self._base(hook).repeat(len(channels), 1, 1, 1)
        value[torch.arange(len(channels)), :, :, channels] += change
        return value

    def _product(self, hook: str, linear: torch.nn.Linear) -> Tensor:
        """What a matrix makes of a hook's value without ablation, (1, P, L, out); made once."""
        if hook not in self._before:
            self._before[hook] = apply_linear(linear, self.values[hook])[None]
        return self._before[hook]

    def _read(self, normed: Tensor, norm: Any) -> Tensor:
        """The normed residual, beside it the normed positions where the model concatenates them."""
        if self._positions is None:
            return normed
        positions = norm(self._positions[-normed.shape[2] :])
        return torch.cat([normed, positions.expand(*normed.shape[:-1], -1)], dim=-1)


def _column(linear: torch.nn.Linear, channels: Tensor, change: Tensor) -> Tensor:
    """What a product gains where one input channel a variant changes: (G, P, L, out)."""
    return change[..., None] * linear.weight.T[channels][:, None, None]
