"""CircuitGPT as a model of transformers: a forward pass in its terms, for generate, pipelines and Trainer."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..._files import replace_text
from ...hooks.names import FINAL, PATTERN
from ..circuitgpt.checkpoint import (
    CONFIG_FILES,
    HUB_OPTIONS,
    Checkpoint,
    checked_weights,
    find_checkpoint,
    read_checkpoint,
    read_config,
    remove_public_layout,
)
from ..circuitgpt.generation import needs_whole_texts
from ..circuitgpt.model import CircuitGPT
from .cache import TransformersKeyValues, new_cache
from .configuration import CircuitGPTHubConfig
from .published import PublishedGPT

__all__ = ["CircuitGPTForCausalLM"]

# transformers 5.24 renamed the cache in arguments and outputs
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class CircuitGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`scalpel.CircuitGPT` that transformers treats as one of its own models.

    ``AutoModelForCausalLM.from_pretrained`` gives it for a folder in the public layout, and for a folder or a hub id in
    the hub's. The checkpoint is read as :meth:`scalpel.CircuitGPT.from_pretrained` reads it: strictly, and without
    running code that comes with it. The logits are the same to the bit.

    Every function of Scalpel that takes a model takes this one, and analyses its :attr:`circuitgpt`.

    Args:
        config: The configuration. Weights are drawn as :class:`scalpel.CircuitGPT` draws them, with a seed that comes
            from torch's generator.

    Example:
        >>> import scalpel
        >>> from transformers import AutoModelForCausalLM
        >>> folder = scalpel.CircuitGPT.from_pretrained("bracket-mini").folder
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> type(model).__name__, model.circuitgpt.config.n_layer
        ('CircuitGPTForCausalLM', 2)
    """

    config_class = CircuitGPTHubConfig
    base_model_prefix = "circuit_model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"circuit_model.lm_head.weight": "circuit_model.transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012  # PreTrainedModel declares both as a model's own
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: CircuitGPTHubConfig) -> None:
        super().__init__(config)
        without_numbers = torch.get_default_device().type == "meta"
        seed = 0 if without_numbers else int(torch.randint(2**31, (), device="cpu"))
        device = torch.device("meta" if without_numbers else "cpu")
        core = CircuitGPT(config.circuitgpt(), seed=seed, device=device, dtype=torch.get_default_dtype())
        self.circuit_model = PublishedGPT(core)
        self.post_init()

    @property
    def circuitgpt(self) -> CircuitGPT:
        """The model with all that Scalpel does with a CircuitGPT; its weights are this model's own, and no copy."""
        return self.circuit_model.core

    @property
    def scalpel_model(self) -> CircuitGPT:
        """What Scalpel's functions analyse in this model's place."""
        return self.circuitgpt

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the core has drawn its weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        embedding: nn.Module = self.circuit_model.transformer["wte"]
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding of tokens in the place of the present one."""
        self.circuit_model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        """The matrix that gives the logits."""
        head: nn.Module = self.circuit_model.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another matrix in the place of the one that gives the logits."""
        self.circuit_model.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *arguments: Any, **options: Any) -> Any:
        """Refuse another vocabulary, since the biases and the bigram table of the logits have one entry a token."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise NotImplementedError(
                f"the vocabulary has {self.config.vocab_size} tokens and can't be resized to {new_num_tokens}: the "
                "model also has a bias for each token's logit. Build a model with the new vocab_size and train it"
            )
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute the logits of texts, in transformers' terms.

        Args:
            input_ids: Token ids (B, L) of the tokens that are not in the cache.
            attention_mask: (B, tokens in the cache + L) with 1 at real tokens, on whichever side the padding is; or
                transformers' (B, 1, L, tokens in the cache + L), which says for each query which keys it may read.
            position_ids: (B, L); by default a real token's rank among the real tokens of its row.
            cache: transformers' cache of keys and values, to which those of ``input_ids`` are added.
            past_key_values: The same under transformers' older name.
            inputs_embeds: Refused, since the model also reads the ids themselves.
            labels: (B, L) token ids, of which each is predicted from the tokens before it; -100 is left out.
            use_cache: Whether to make a cache where none is given. By default in evaluation, if the config says so.
            output_attentions: Whether to give the weights of attention of each layer, (B, heads, L, keys), which are
                computed without torch's fused kernels. A row sums to less than 1 where there is a sink.
            output_hidden_states: Whether to give the residual stream before each layer and, as the last entry, the
                normed one that the logits are computed from.
            return_dict: False gives a tuple.
            logits_to_keep: Compute the logits of so many last tokens, or of the tokens at these columns; 0 means all.
            token_type_ids: Passed over; tokenizers may give them.
            **loss_options: For transformers' loss, such as ``num_items_in_batch``.

        Returns:
            The logits (B, L or tokens kept, vocab), and what was asked for beside them.

        Raises:
            ValueError: An argument is refused, or for the reasons of :meth:`scalpel.CircuitGPT.forward`.

        Example:
            >>> import scalpel, torch
            >>> from transformers import AutoModelForCausalLM
            >>> core = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> model = AutoModelForCausalLM.from_pretrained(core.folder)
            >>> ids, mask = core.tokenizer.batch(["[[1,2],3", "[4,5"])
            >>> torch.equal(model(ids, attention_mask=mask).logits, core(ids, mask))
            True
        """
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("a CircuitGPT takes input_ids and no inputs_embeds: its bigram table reads the ids")
        core = self.circuitgpt
        if any(parameter.is_meta for parameter in core.parameters()):
            raise ValueError(
                "some weights are offloaded, or have a shape and no numbers; a CircuitGPT also reads weights outside "
                "of their modules' forward passes, so it has to be on one device"
            )
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None and core.config.n_layer:
            cache = new_cache(self.config)
        patterns, weights, last = [], [], []
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            patterns = [f"{i}.{PATTERN}" for i in range(core.config.n_layer)]
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

        def tap(name: str, value: Tensor) -> Tensor:
            if name in patterns:
                weights.append(value.unflatten(-1, (core.config.n_head, -1)).transpose(1, 2))
            elif with_states and name == FINAL:
                last.append(core.transformer.ln_f(value))
            return value

        past = None if cache is None or not core.config.n_layer else TransformersKeyValues(cache, core.config.n_head)
        input_ids = input_ids.to(core.device)
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = _for_each_query(attention_mask, input_ids, past)
        logits, _, states = self.circuit_model(
            input_ids,
            keep=slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep,
            tap=tap,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past,
            patterns=patterns,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(*states, *last) if with_states else None,
            attentions=tuple(weights) if patterns else None,
            **{_CACHE: cache if use_cache else None},
        )
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if as_tuple else output

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Continue texts, as all models of transformers do.

        While an intervention or a recorder that may look at several tokens is in force, every step runs the whole text.
        """
        reason = needs_whole_texts(self.circuitgpt)
        if reason is not None and options.get("use_cache"):
            raise ValueError(f"use_cache=True, but {reason}: leave use_cache out")
        if reason is not None or not self.config.n_layer:
            options["use_cache"] = False
        return super().generate(*arguments, **options)

    @classmethod
    def from_pretrained(  # noqa: D417  # transformers documents its options
        cls, pretrained_model_name_or_path: Any, *model_arguments: Any, **options: Any
    ) -> Any:
        """Load a checkpoint in any layout that :meth:`scalpel.CircuitGPT.from_pretrained` reads, as strictly.

        Args:
            pretrained_model_name_or_path: A folder or a hub id.
            **options: Those of transformers' ``from_pretrained``.

        Returns:
            The model, in evaluation mode.

        Raises:
            scalpel.models.weight_files.CheckpointError: As for :meth:`scalpel.CircuitGPT.from_pretrained`.
        """
        place = {name: options.pop(name) for name in (*HUB_OPTIONS, "subfolder") if name in options}
        asked: dict[str, Any] = {name: options.pop(name) for name in ("dtype", "torch_dtype") if name in options}
        config, given = options.pop("config", None), options.pop("state_dict", None)
        folder = None if given is not None else find_checkpoint(pretrained_model_name_or_path, **place)
        if not isinstance(config, CircuitGPTHubConfig):
            fields = dict(config) if folder is None else read_config(folder)[0]
            config, options = CircuitGPTHubConfig.from_dict(dict(fields), return_unused_kwargs=True, **options)
        own_config = config.circuitgpt()
        if folder is None:
            checkpoint = Checkpoint(Path(), own_config, *checked_weights(own_config, given))
        else:
            checkpoint = read_checkpoint(folder, own_config)
            if "generation_config" not in options and (folder / "generation_config.json").is_file():
                options["generation_config"] = GenerationConfig.from_pretrained(folder)
        dtype = _dtype_of(asked, checkpoint)
        weights = checkpoint.weights_as(dtype, None)
        prefixed = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in weights.items()}
        adapter = (options.get("adapter_kwargs") or {}).pop("_adapter_model_path", None)
        result = super().from_pretrained(
            None, *model_arguments, config=config, state_dict=prefixed, dtype=dtype, **options
        )
        model = result[0] if isinstance(result, tuple) else result
        if config.sinusoidal_cat_pos_emb:
            model.circuit_model.transformer["wpe"].weight.requires_grad_(False)
        if folder is not None:
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
            checkpoint.describe(model.circuitgpt)
        if adapter is not None:
            model.load_adapter(adapter)
        return result

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> Any:  # noqa: D417
        """Write the hub's layout, as transformers does, and the card that the checkpoint came with.

        An earlier CircuitGPT in the public layout is removed from the folder, since it would be read in place of this.

        Args:
            save_directory: The folder.
            **options: Those of transformers' ``save_pretrained``.
        """
        result = super().save_pretrained(save_directory, *arguments, **options)
        folder, card = Path(save_directory), self.circuitgpt.card
        if folder.is_dir() and (folder / CONFIG_FILES[1]).is_file():
            remove_public_layout(folder)
            if card:
                replace_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
        return result


def _for_each_query(mask: Tensor, input_ids: Tensor, past: TransformersKeyValues | None) -> Tensor:
    """Turn a mask (B or 1, 1, L, K or more), bool or what is added to scores, into the core's (B, L, K)."""
    if mask.shape[1] != 1:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the same keys must be open to all heads")
    allowed = mask[:, 0] > -1 if mask.dtype.is_floating_point else mask[:, 0].bool()
    keys = input_ids.shape[1] + (0 if past is None else past.length)
    return allowed[..., :keys].expand(len(input_ids), -1, -1)


def _dtype_of(options: dict[str, Any], checkpoint: Checkpoint) -> torch.dtype:
    """Take the dtype out of transformers' options: ``"auto"`` is the widest that is stored."""
    dtype = next((asked for asked in options.values() if asked is not None), checkpoint.default_dtype)
    if dtype == "auto":
        return functools.reduce(torch.promote_types, {tensor.dtype for tensor in checkpoint.weights.values()})
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; allowed: a floating-point torch.dtype, its name, or 'auto'")
    return found
