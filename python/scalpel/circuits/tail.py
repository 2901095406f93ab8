"""The rest of a forward pass after one node was replaced, computed for many nodes at once.

``model.ablate`` runs the whole model for every node. A `Tail` runs the model once, keeps the values of all hooks, and
starts each variant where its node is. A changed channel that a matrix reads adds a multiple of one of the matrix's
columns to the product. A changed channel of q, k or v changes the output of one head. From there on, the model's own
stages (:mod:`scalpel.models.circuitgpt.layers`) run for all variants side by side. They compute each distinct prefix of
the prompts only once (see :mod:`.packing`), and in the last layer only the rows of the questions, because nothing else
is read there.

Shapes: with G variants, N distinct prefixes and P prompts, a value is (G, N, width). In the last layer it is
(G, P, width) once the keys and values are computed. A value that is still the same for all variants is (1, N, width).
"""

import torch
from torch import Tensor

from ..lanes import apply_linear
from ..models.circuitgpt.attention import attend
from ..models.circuitgpt.layers import Block, LayerInputs
from ..models.circuitgpt.model import CircuitGPT
from .packing import Packed

__all__ = ["Tail"]


class Tail:
    """Compute the logits of the answers to packed prompts with one channel of a hook replaced.

    Args:
        model: The model.
        prompts: The prompts, packed.
        answers: The token ids to choose among.

    Attributes:
        values: The value at every hook in the pass without ablation, (N, width) each.
        logits: The logits of the answers in that pass, (P, answers).
    """

    def __init__(self, model: CircuitGPT, prompts: Packed, answers: tuple[int, ...]) -> None:
        self.model, self.prompts, self.answers = model, prompts.on(model.device), list(answers)
        _, values = model.run_with_cache(prompts.ids)
        self.values = {name: value.flatten(0, 1)[prompts.first] for name, value in values.items()}
        self._products: dict[str, Tensor] = {}
        self._asked_ids = self.prompts.ids.flatten()[self.prompts.first[self.prompts.asked]]
        self._inputs = [self._layer_inputs(i) for i in range(model.config.n_layer)]
        self.logits = self._answered(self._base("final_resid")[:, self.prompts.asked])[0]

    def _layer_inputs(self, layer: int) -> LayerInputs:
        """Return what the stages of a layer need besides the residual.

        The stages may overwrite their own intermediate values, because nothing else reads these and allocating new
        memory takes longer than the selection by AbsTopK itself.
        """
        prompts, model = self.prompts, self.model
        positions = model.transformer.wpe.weight[prompts.depth] if model.config.d_pos_emb is not None else None
        last = layer == model.config.n_layer - 1
        return LayerInputs(
            str(layer),
            tap=lambda name, value: value,
            allowed=prompts.ancestors[prompts.asked] if last else prompts.ancestors,
            positions=positions,
            rows=prompts.asked if last else None,
            overwrite=True,
        )

    def replaced(self, hook: str, channels: Tensor, change: Tensor) -> Tensor:
        """Compute the logits (G, P, answers) of variants that each change one channel of a hook.

        Args:
            hook: The name of the hook.
            channels: The channel that each variant changes, (G,).
            change: What each variant adds to its channel at each prefix, (G, N).
        """
        if hook == "final_resid":
            asked = self.prompts.asked
            return self._answered(_changed(self._base(hook)[:, asked], channels, change[:, asked]))
        number, _, place = hook.partition(".")
        layer = int(number)
        x = self._after_layer(layer, place, channels, change)
        for i in range(layer + 1, len(self._inputs)):
            x = self._block(i)(x, self._inputs[i])
        return self._answered(x)

    def _after_layer(self, layer: int, place: str, channels: Tensor, change: Tensor) -> Tensor:
        """Compute the residual after a layer in which one of its own hooks is changed."""
        block, inputs = self._block(layer), self._inputs[layer]
        if place == "resid_in":
            return block(_changed(self._base(f"{layer}.resid_in"), channels, change), inputs)
        if place == "resid_mid":
            x, change = self._wanted(layer, "resid_mid"), self._of_wanted(layer, change)
            return block.from_middle(_changed(x, channels, change), inputs)
        if place.startswith("attn."):
            delta = self._attention(layer, place, channels, change)
            return block.from_attention(self._wanted(layer, "resid_in"), delta, inputs)
        delta = self._mlp(layer, place, channels, self._of_wanted(layer, change))
        return block.from_mlp(self._wanted(layer, "resid_mid"), delta, inputs)

    def _attention(self, layer: int, place: str, channels: Tensor, change: Tensor) -> Tensor:
        """Compute what attention adds to the residual if one of its hooks is changed."""
        attention, inputs = self._block(layer).attn, self._inputs[layer]
        if place == "attn.act_in":
            product = _column(self._product(layer, place, attention.c_attn), attention.c_attn, channels, change)
            q, k, v = product.split(self.model.config.d_attn, dim=-1)
            return attention.from_qkv(inputs.wanted(q), k, v, inputs)
        if place in ("attn.q", "attn.k", "attn.v"):
            return attention.from_product(self._one_head(layer, place, channels, change), inputs)
        change = self._of_wanted(layer, change)
        if place == "attn.y":
            product = inputs.wanted(self._product(layer, place, attention.c_proj))
            return attention.from_product(_column(product, attention.c_proj, channels, change), inputs)
        return _changed(self._wanted(layer, place), channels, change)

    def _mlp(self, layer: int, place: str, channels: Tensor, change: Tensor) -> Tensor:
        """Compute what the MLP adds to the residual if one of its hooks is changed."""
        mlp, inputs = self._block(layer).mlp, self._inputs[layer]
        if place == "mlp.resid_delta":
            return _changed(self._wanted(layer, place), channels, change)
        matrix, enter = (mlp.c_fc, mlp.from_hidden) if place == "mlp.act_in" else (mlp.c_proj, mlp.from_product)
        product = inputs.wanted(self._product(layer, place, matrix))
        return enter(_column(product, matrix, channels, change), inputs)

    def _one_head(self, layer: int, place: str, channels: Tensor, change: Tensor) -> Tensor:
        """Compute the product of the output projection, (G, N or P, d_model), with one channel of q, k or v changed.

        Each variant computes only the head that its channel belongs to and keeps the outputs of all other heads. The
        heads of all variants are computed side by side, as if they were the heads of one attention.
        """
        config, attention, inputs = self.model.config, self._block(layer).attn, self._inputs[layer]
        width, count = config.d_attn // config.n_head, len(channels)
        heads = channels // width
        values = {}
        for name in ("attn.q", "attn.k", "attn.v", "attn.y"):
            value = self.values[f"{layer}.{name}"].unflatten(-1, (config.n_head, width))[:, heads]
            if name == place:
                value[:, torch.arange(count, device=channels.device), channels % width] += change.T
            values[name] = value.flatten(1)[None]
        q, k, v, before = values.values()
        sink = None if attention.sink_logit is None else attention.sink_logit[heads]
        y = attend(inputs.wanted(q), k, v, count, inputs.allowed, sink)
        moved = (y - inputs.wanted(before))[0].unflatten(-1, (count, width)).transpose(0, 1)
        matrices = attention.c_proj.weight.unflatten(1, (config.n_head, width))[:, heads]  # (d_model, G, width)
        return (moved @ matrices.permute(1, 2, 0)).add_(inputs.wanted(self._product(layer, "attn.y", attention.c_proj)))

    def _answered(self, x: Tensor) -> Tensor:
        """Compute the logits of the answers, (G, P, answers), from the last residual, (G, P, d_model)."""
        return self.model.unembed(x, self._asked_ids, self.answers)

    def _block(self, layer: int) -> Block:
        block: Block = self.model.transformer.h[layer]
        return block

    def _base(self, hook: str) -> Tensor:
        """Return the value of a hook without ablation, (1, N, width)."""
        return self.values[hook][None]

    def _wanted(self, layer: int, place: str) -> Tensor:
        """Return the value of a hook without ablation in the rows that are read after the layer, (1, N or P, width)."""
        return self._inputs[layer].wanted(self._base(f"{layer}.{place}"))

    def _of_wanted(self, layer: int, change: Tensor) -> Tensor:
        """Select from a change (G, N) the rows that are read after the layer, (G, N or P)."""
        rows = self._inputs[layer].rows
        return change if rows is None else change[:, rows]

    def _product(self, layer: int, place: str, matrix: torch.nn.Linear) -> Tensor:
        """Apply a matrix to the value of a hook without ablation, (1, N, out), and keep the product for later calls."""
        hook = f"{layer}.{place}"
        if hook not in self._products:
            self._products[hook] = apply_linear(matrix, self.values[hook])[None]
        return self._products[hook]


def _changed(value: Tensor, channels: Tensor, change: Tensor) -> Tensor:
    """Copy ``value`` (1, N, width) for each variant and change one channel in each copy, (G, N, width)."""
    variants = value.repeat(len(channels), 1, 1)
    variants[torch.arange(len(channels), device=channels.device), :, channels] += change
    return variants


def _column(product: Tensor, matrix: torch.nn.Linear, channels: Tensor, change: Tensor) -> Tensor:
    """Compute the product (1, N, out) of a matrix with one input channel changed for each variant, (G, N, out)."""
    return torch.baddbmm(product.expand(len(channels), -1, -1), change[..., None], matrix.weight.T[channels][:, None])
