"""Continuing texts token by token."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..._integers import integer
from ...hooks.modules import user_hooks
from ...hooks.recorder import recording
from .key_values import KeyValueCache
from .loaded import LoadedCore

__all__ = ["generate", "needs_whole_texts"]


@torch.no_grad()
def generate(
    model: LoadedCore,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    stop: int | str | Collection[int | str] | None = None,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    use_cache: bool | None = None,
) -> Tensor:
    """Continue texts token by token: :meth:`scalpel.CircuitGPT.generate`."""
    if use_cache not in (None, True, False):
        raise TypeError(f"use_cache is {use_cache!r}; allowed: True, False, None")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is {type(attention_mask).__name__}; it must be a tensor")
    max_new_tokens = integer(max_new_tokens, "max_new_tokens")
    if max_new_tokens < 0 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_k {top_k}; allowed: "
            "max_new_tokens >= 0, temperature >= 0 and finite, top_k >= 1 or None"
        )
    input_ids = model._checked_ids(input_ids)
    length, context = input_ids.shape[1], model.config.block_size
    if length + max_new_tokens > context:
        raise ValueError(
            f"{length} tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
            f"ask for at most {context - length}"
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {tuple(input_ids.shape)}"
            )
        if not bool(attention_mask[:, -1].bool().all()):
            raise ValueError("a row ends in padding; pad on the left: tokenizer.batch(texts, side='left')")
        attention_mask = attention_mask.to(input_ids.device)
    stops = torch.tensor(sorted(_stop_ids(model, stop)), dtype=input_ids.dtype, device=input_ids.device)
    generator = torch.Generator().manual_seed(seed)
    cache = _cache(model, use_cache, len(input_ids), length + max_new_tokens)
    unread = input_ids  # the tokens that the next pass computes: all of them, where nothing is kept
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        logits = model(unread, attention_mask, past=cache)[:, -1]
        for process in processors:
            logits = process(input_ids, logits)
        new = _pick(logits, temperature, top_k, generator).to(input_ids.dtype)
        new = torch.where(done, input_ids[:, -1], new)
        done = done | torch.isin(new, stops)
        input_ids = torch.cat([input_ids, new[:, None]], dim=1)
        unread = input_ids if cache is None else new[:, None]
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        if bool(done.all()):
            break
    return input_ids


def _cache(model: LoadedCore, wanted: bool | None, rows: int, room: int) -> KeyValueCache | None:
    """Make the cache, or return None where every step runs the whole text."""
    reason = needs_whole_texts(model)
    if wanted and reason is not None:
        raise ValueError(f"use_cache=True, but {reason}: leave use_cache out")
    if wanted is False or reason is not None:
        return None
    return KeyValueCache(model.config, rows, room, model.device, model.dtype)


def needs_whole_texts(model: LoadedCore) -> str | None:
    """Say why a step that computes new tokens alone could differ from one over the whole text; None if it can't."""
    if not all(getattr(tap, "tokenwise", False) for tap in model._interventions):
        return "an intervention is in force that may depend on the whole text, such as a resampling ablation"
    if recording():
        return "a hook_recorder is in force, which records the values of a pass"
    # accelerate replaces the forward methods of modules, too, to move tensors between devices
    moved = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    ours = {f"the forward method of the module {name!r}" for name in moved}
    where = next((where for where, _ in user_hooks(model) if where not in ours), None)
    return None if where is None else f"{where} has been hooked or replaced, and would see the new tokens alone"


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Pick the next token of each row (B,)."""
    if temperature == 0:
        # argmax makes no promise about ties
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[-1]).amin(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return _drawn((logits / temperature).softmax(-1), generator)[:, 0]
    values, ids = logits.topk(top_k, dim=-1)
    return ids.gather(-1, _drawn((values / temperature).softmax(-1), generator))[:, 0]


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index for each row (B, 1), on the CPU, so that the draws of a seed do not depend on the device."""
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).to(probabilities.device)


def _stop_ids(model: LoadedCore, stop: int | str | Collection[int | str] | None) -> set[int]:
    if stop is None:
        return set()
    ids = set()
    for token in [stop] if isinstance(stop, int | str) else stop:
        if isinstance(token, str):
            if model.tokenizer is None:
                raise ValueError(f"stop {token!r} is text and the model has no tokenizer; give the token's id")
            token = model.tokenizer.single(token)
        ids.add(int(token))
    return ids
