"""The core of CircuitGPT, the weight-sparse transformer of Gao et al. 2025 (arXiv 2511.13653), in every variant.

It computes logits and shows every value on the way, by the name of its hook, to a *tap*. Caching, interventions,
ablation and Jacobians are all taps, so the mathematics stands once: here and, for a single layer, in :mod:`.layers`.
"""

import math
from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.inputs import Limits, checked_ids, positions_after_padding, real_tokens
from ...hooks.names import PATTERN, hook_names
from ...hooks.recorder import recorder_taps
from ...lanes import apply_linear
from ..fresh import embedding, linear, sinusoids, zeros
from .attention import allowed_keys
from .config import CircuitGPTConfig
from .key_values import KeyValues
from .layers import Block, LayerInputs, Tap, norm

__all__ = ["MODULE_PATHS", "CircuitCore"]


class CircuitCore(nn.Module):
    """The transformer itself: it computes logits from token ids and shows every value on the way to a tap.

    The arguments are those of :class:`scalpel.CircuitGPT`, which adds what one does with such a model.
    """

    # torch declares attributes of a module as Tensor | Module; these annotations are more precise
    transformer: Any
    final_logits_bias: Tensor
    bigram_table: Tensor | None

    def __init__(
        self,
        config: CircuitGPTConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}; it must be a torch.dtype, as torch.float32")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; a model's weights are floating point")
        self.config = config
        self._interventions: list[Tap] = []
        made_on = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer = nn.ModuleDict(
                {
                    "wte": embedding(config.vocab_size, config.d_model, made_on),
                    "wpe": embedding(config.block_size, config.d_pos_emb or config.d_model, made_on),
                    "h": nn.ModuleList(Block(config, made_on) for _ in range(config.n_layer)),
                    "ln_f": norm(config, config.d_model, made_on),
                }
            )
            self.lm_head = linear(config.d_model, config.vocab_size, False, made_on)
            if config.tied_unembed:
                self.lm_head.weight = self.transformer.wte.weight
            self._initialise()
        self.register_buffer("final_logits_bias", zeros(config.vocab_size, device=made_on))
        if not config.enable_bigram_table:
            self.bigram_table = None
        elif config.extra.get("learnable_bigram_table"):
            self.bigram_table = nn.Parameter(zeros(config.vocab_size, config.vocab_size, device=made_on))
        else:
            self.register_buffer("bigram_table", zeros(config.vocab_size, config.vocab_size, device=made_on))
        self.to(device=device, dtype=dtype)

    def _initialise(self) -> None:
        """Draw normal weights of standard deviation 0.02, less in projections into the residual (GPT-2's rule).

        Where there are only shapes, nothing is drawn, because for that torch would import its compiler.
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * max(1, self.config.n_layer)))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.sinusoidal_cat_pos_emb:
            table = sinusoids(self.config.block_size, self.config.d_pos_emb or 0)
            with torch.no_grad():
                self.transformer.wpe.weight.copy_(table)
            self.transformer.wpe.weight.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.lm_head.weight.dtype

    @property
    def hook_names(self) -> list[str]:
        """The names of all hooks, in the order in which the forward pass reaches them.

        The weights of attention are no hook of this list, since they are computed only for those who name them:
        ``"0.attn.pattern"``, see :meth:`scalpel.CircuitGPT.run_with_cache`.

        Example:
            >>> from scalpel import CircuitGPT
            >>> names = CircuitGPT.from_pretrained("bracket-mini").hook_names
            >>> names[:3], names[-1], len(names)
            (['0.resid_in', '0.attn.act_in', '0.attn.k'], 'final_resid', 23)
        """
        return hook_names(self.config.n_layer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        tap: Tap | None = None,
        past: KeyValues | None = None,
        patterns: Container[str] = (),
    ) -> Tensor:
        """Compute the logits of texts.

        Args:
            input_ids: Token ids (B, L), integers. These and the following may be on another device than the model.
            attention_mask: (B, L) with 1 at real tokens, or (B, L, L) with 1 where a query may read a key; attention is
                causal in any case. No masked key enters any head, so texts have the logits that they have alone,
                whichever side the padding is on.
            position_ids: (B, L) or (L,). By default a real token's rank among the real tokens of its row; under a mask
                (B, L, L), its place counted from the first token of the row that some query reads.
            tap: A function from (name of a hook, value there) to the value to go on with, called at every hook in turn,
                after the interventions that are in force.
            past: Keys and values of the tokens before ``input_ids``, such as a
                :class:`scalpel.models.circuitgpt.key_values.KeyValueCache`, to which those of ``input_ids`` are added.
                The mask then counts the earlier tokens too, (B, past + L), and positions go on after them.
            patterns: Which attention weights are shown to the tap as well: names such as ``"0.attn.pattern"``, a value
                (B, L, n_head * L) with the weights of a query's heads side by side. They are written out only there;
                elsewhere torch's fused kernels hold none, and round differently.

        Returns:
            The logits (B, L, vocab), on the model's device.

        Raises:
            ValueError: A text is empty or longer than ``block_size``, or an id is outside the vocabulary.

        Example:
            >>> from scalpel import CircuitGPT
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, mask = model.tokenizer.batch(["[[1,2],3", "[4,5"])
            >>> model(ids, mask).shape
            torch.Size([2, 7, 512])
        """
        x = self.residual(input_ids, attention_mask, position_ids, tap=tap, past=past, patterns=patterns)
        return self.unembed(x, input_ids.to(self.device))

    def residual(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        tap: Tap | None = None,
        past: KeyValues | None = None,
        patterns: Container[str] = (),
    ) -> Tensor:
        """Compute the residual stream after the last layer: all of :meth:`forward` but its last stage.

        A caller that wants the logits of a few tokens gives their rows to :meth:`unembed`.

        Args:
            input_ids: Token ids (B, L), as for :meth:`forward`.
            attention_mask: As for :meth:`forward`.
            position_ids: As for :meth:`forward`.
            tap: As for :meth:`forward`.
            past: As for :meth:`forward`.
            patterns: As for :meth:`forward`.

        Returns:
            The value at ``final_resid`` (B, L, d_model).

        Raises:
            ValueError: As for :meth:`forward`.

        Example:
            >>> from scalpel import CircuitGPT
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> x = model.residual(ids)
            >>> torch.allclose(model.unembed(x[:, -1:], ids[:, -1:]), model(ids)[:, -1:], atol=1e-5)
            True
        """
        input_ids = self._checked_ids(input_ids)
        before = 0 if past is None else past.length
        self._check_room(before, input_ids.shape[1])
        at = self._composed_tap(tap)
        allowed = allowed_keys(input_ids, attention_mask, before)
        positions = self._positions(input_ids, attention_mask, position_ids, before)
        x = self.transformer.wte(input_ids)
        concatenated = self.config.d_pos_emb is not None
        if not concatenated:
            x = x + positions
        beside = positions if concatenated else None
        for i, block in enumerate(self.transformer.h):
            remember = None if past is None else partial(past.extend, i)
            shown = f"{i}.{PATTERN}" in patterns
            x = block(x, LayerInputs(str(i), at, allowed, beside, pattern=shown, remember=remember))
        if past is not None:
            past.advance(input_ids.shape[1])
        return at("final_resid", x)

    def unembed(self, x: Tensor, input_ids: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """Compute the logits from the residual stream after the last layer: the last stage of the forward pass.

        Args:
            x: The value at ``final_resid`` (..., d_model).
            input_ids: The token ids (...) at the same places, which the bigram table reads.
            tokens: The tokens whose logits are wanted; all if not given.

        Returns:
            The logits (..., vocab), or (..., number of tokens).

        Example:
            >>> import torch
            >>> from scalpel import CircuitGPT
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> logits, values = model.run_with_cache(ids, ["final_resid"])
            >>> torch.equal(model.unembed(values["final_resid"], ids), logits)
            True
        """
        x = self.transformer.ln_f(x)
        if tokens is None:
            logits, bias = apply_linear(self.lm_head, x), self.final_logits_bias
        else:
            tokens = list(tokens)  # a tuple would be an index of several dimensions
            logits, bias = x @ self.lm_head.weight[tokens].T, self.final_logits_bias[tokens]
        logits = logits + bias.to(x.dtype)
        if self.bigram_table is not None:
            followers = self.bigram_table[input_ids]
            logits = logits + (followers if tokens is None else followers[..., tokens]).to(x.dtype)
        return logits

    def _composed_tap(self, tap: Tap | None) -> Tap:
        chain = [*self._interventions, *recorder_taps(), *([tap] if tap is not None else [])]

        def at(name: str, value: Tensor) -> Tensor:
            for tap in chain:
                value = tap(name, value)
            return value

        return at

    @property
    def token_limits(self) -> Limits:
        """The token ids and lengths that the model takes."""
        return Limits(self.config.vocab_size, self.config.block_size, self.device, others=False)

    def _checked_ids(self, input_ids: Tensor) -> Tensor:
        return checked_ids(input_ids, self.config.vocab_size, self.config.block_size).to(self.device)

    def _places(self, before: int, length: int) -> Tensor:
        """The embeddings of consecutive positions, through the module, so that an adapter or a hook there counts."""
        columns = torch.arange(before, before + length, dtype=torch.int64, device=self.device)
        places: Tensor = self.transformer.wpe(columns)
        return places

    def _check_room(self, before: int, length: int) -> None:
        if before + length > self.config.block_size:
            raise ValueError(
                f"{length} tokens after {before} exceed the model's context of {self.config.block_size}; it has room "
                f"for {max(0, self.config.block_size - before)} more"
            )

    def _positions(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, before: int = 0
    ) -> Tensor:
        """The position embeddings of ``input_ids``, which follow ``before`` tokens: (L, width) or (B, L, width)."""
        length, block_size = input_ids.shape[1], self.config.block_size
        if position_ids is None:
            if mask is None:
                return self._places(before, length)
            if mask.dim() == 2:
                position_ids = (mask.bool().long().cumsum(-1) - 1).clamp(min=0)[:, before:]
            elif before:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, and {before} tokens came before: with a mask for "
                    "each query give position_ids too"
                )
            else:
                position_ids = positions_after_padding(real_tokens(input_ids, mask.to(input_ids.device)))
                if position_ids is None:
                    return self._places(0, length)
        position_ids = position_ids.to(input_ids.device)
        rows = ((length,), (1, length), tuple(input_ids.shape))
        low, high = int(position_ids.min()), int(position_ids.max())
        if position_ids.shape not in rows or low < 0 or high >= block_size:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)} and runs from {low} to {high}; "
                f"it needs {length} positions a row, each from 0 to {block_size - 1}"
            )
        return self.transformer.wpe(position_ids)


# The module whose output, or input where the path ends in ":in", is the value of a hook; {i} stands for the layer.
MODULE_PATHS = {
    "resid_in": "transformer.h.{i}:in",
    "attn.act_in": "transformer.h.{i}.attn.c_attn:in",
    "attn.y": "transformer.h.{i}.attn.c_proj:in",
    "attn.resid_delta": "transformer.h.{i}.attn",
    "resid_mid": "transformer.h.{i}.ln_2:in",
    "mlp.act_in": "transformer.h.{i}.mlp.c_fc:in",
    "mlp.post_act": "transformer.h.{i}.mlp.c_proj:in",
    "mlp.resid_delta": "transformer.h.{i}.mlp",
    "after": "transformer.h.{i}",
    "final_resid": "transformer.ln_f:in",
}
