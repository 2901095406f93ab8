"""Replacing nodes of a :class:`scalpel.CircuitGPT` while a context lasts.

A node is a channel at a hook, written ``2.attn.v:2012``; ``2.attn.v`` alone means all channels of the hook. The
replacement is made at the hook, after its own AbsTopK, and everything downstream is computed from it. Ablations are
pure functions of the values, so they also take effect inside Jacobians and transforms of ``torch.func``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .layers import Tap
from .loaded import LoadedCore
from .recording import check_hooks, hook_width, run_with_cache

Model = TypeVar("Model", bound=LoadedCore)

KINDS = ("mean", "zero", "resample")
_ROWS_AT_ONCE = 16


def ablate(
    model: Model,
    nodes: str | Sequence[str],
    kind: str = "mean",
    *,
    reference: Any = None,
    seed: int = 0,
) -> "Ablation[Model]":
    """Make a context in which nodes are replaced: :meth:`scalpel.CircuitGPT.ablate`."""
    if kind not in KINDS:
        raise ValueError(f"ablation kind is {kind!r}; allowed: {', '.join(KINDS)}")
    picked = _parse(model, [nodes] if isinstance(nodes, str) else nodes)
    if kind == "zero":
        zeros = {
            name: (mask, torch.zeros(mask.shape, dtype=torch.float32, device="cpu")) for name, mask in picked.items()
        }
        tap: Tap = _Fixed(zeros)
    elif kind == "mean":
        means = _stored_means(model, picked) if reference is None else hook_means(model, reference, picked)
        tap = _Fixed({name: (mask, means[name]) for name, mask in picked.items()})
    else:
        if reference is None:
            raise ValueError('kind "resample" needs reference: input_ids or prompts to draw activations from')
        tap = _Resampled(picked, _samples(model, reference, picked), seed)
    return Ablation(model, tap)


def hook_means(model: LoadedCore, reference: Any, hooks: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Average the activations of hooks over the real tokens of a reference, without any ablation.

    Args:
        model: The model.
        reference: Prompts, as in :meth:`scalpel.CircuitGPT.ablate`.
        hooks: Names of hooks; all if not given.

    Returns:
        {hook: mean (width,), float64}. Stored as lists under ``model.card["hook_means"]``, these are what
        ``kind="mean"`` takes when it is given no reference.
    """
    names = model.hook_names if hooks is None else list(hooks)
    check_hooks(model, names)
    sums: dict[str, Tensor] = {}
    count = 0
    for values, real in _activations(model, reference, names):
        count += int(real.sum())
        for name, value in values.items():
            total = value[real].double().sum(0)
            sums[name] = sums[name] + total if name in sums else total
    return {name: total / count for name, total in sums.items()}


class Ablation(ContextDecorator, Generic[Model]):
    """The context that :meth:`scalpel.CircuitGPT.ablate` returns: the model's nodes are replaced inside ``with``.

    ``with`` gives the model. The context can be entered any number of times, always with the values that were taken
    when it was made. Inside another ablation, its replacement comes after the other's; inside itself, it stays in force
    until the outermost ``with`` ends. A copy or a pickle of the model that is made inside keeps the nodes replaced for
    good.
    """

    def __init__(self, model: Model, tap: Tap) -> None:
        self._model, self._tap = model, tap

    def __enter__(self) -> Model:
        self._model._interventions.append(self._tap)
        return self._model

    def __exit__(self, *raised: object) -> None:
        standing = self._model._interventions
        for i in reversed(range(len(standing))):  # contexts may be left in any order: each removes its own tap
            if standing[i] is self._tap:
                del standing[i]
                return
        raise RuntimeError("this ablation wasn't entered, so it can't be left: use it in a with statement")


def _parse(model: LoadedCore, nodes: Iterable[str]) -> dict[str, Tensor]:
    """Read names of nodes: {hook: bool mask (width,) of the channels that are named}."""
    picked: dict[str, Tensor] = {}
    for node in nodes:
        name, colon, channel = str(node).partition(":")
        check_hooks(model, [name])
        width = hook_width(model, name)
        mask = picked.setdefault(name, torch.zeros(width, dtype=torch.bool, device="cpu"))
        if not colon:
            mask[:] = True
        elif channel.isdecimal() and int(channel) < width:
            mask[int(channel)] = True
        else:
            raise ValueError(f"node {node!r}: {channel!r} is no channel of {name}, whose channels are 0 to {width - 1}")
    return picked


@dataclass(frozen=True, eq=False)
class _Fixed:
    """Replaces channels by fixed values. ``plan``: {hook: (mask of channels (width,), values (width,))}."""

    plan: Mapping[str, tuple[Tensor, Tensor]]
    tokenwise: ClassVar[bool] = True  # what it does to a token does not depend on the others

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name not in self.plan:
            return value
        mask, replacement = self.plan[name]
        return torch.where(mask.to(value.device), _like(replacement, value), value)


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Replaces channels by values drawn from ``samples`` (tokens, width). ``picked``: {hook: mask (width,)}."""

    picked: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    seed: int

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name not in self.picked:
            return value
        pool = self.samples[name]
        # Seeded anew at each hook: the draw depends on the shape alone, so all nodes of a token get the same sample.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(pool), value.shape[:-1], generator=generator, device="cpu")
        return torch.where(self.picked[name].to(value.device), _like(pool[drawn.to(pool.device)], value), value)


def _like(replacement: Tensor, value: Tensor) -> Tensor:
    return replacement.to(device=value.device, dtype=value.dtype)


def _samples(model: LoadedCore, reference: Any, names: Iterable[str]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for values, real in _activations(model, reference, list(parts)):
        for name, value in values.items():
            parts[name].append(value[real])
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _stored_means(model: LoadedCore, names: Iterable[str]) -> dict[str, Tensor]:
    stored = model.card.get("hook_means", {})
    means = {}
    for name in names:
        if name not in stored:
            raise ValueError(
                f'kind "mean" needs reference: input_ids or prompts to take the mean of {name!r} over '
                "(the model's card has no stored means of it)"
            )
        means[name] = torch.as_tensor(stored[name], dtype=torch.float64, device="cpu")
        if means[name].shape != (hook_width(model, name),):
            raise ValueError(f"the card's stored mean of {name!r} has shape {tuple(means[name].shape)}")
    return means


@torch.no_grad()
def _activations(model: LoadedCore, reference: Any, names: Sequence[str]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield values at ``names`` and the mask of real tokens (B, L), some prompts at a time."""
    input_ids, real = _batch(model, reference)
    last = max(names, key=model.hook_names.index, default=None)
    if last is None:
        return
    for at in range(0, len(input_ids), _ROWS_AT_ONCE):
        rows, mask = input_ids[at : at + _ROWS_AT_ONCE], real[at : at + _ROWS_AT_ONCE]
        standing, model._interventions = model._interventions, []
        try:
            _, values = run_with_cache(model, rows, names, stop_at=last, attention_mask=mask)
        finally:
            model._interventions = standing
        yield values, mask


def _batch(model: LoadedCore, reference: Any) -> tuple[Tensor, Tensor]:
    mask: Any = None
    if isinstance(reference, Mapping):
        if "input_ids" not in reference:
            raise ValueError(f"reference has the keys {sorted(reference)}; it needs input_ids")
        reference, mask = reference["input_ids"], reference.get("attention_mask")
    elif _is_masked_batch(reference):
        reference, mask = reference
    if not isinstance(reference, Tensor):
        if isinstance(reference, str):
            reference = [reference]
        reference = list(reference)
        if reference and all(isinstance(token, int) for token in reference):
            reference = [reference]  # the ids of one prompt
        rows = [_ids(model, prompt) for prompt in reference]
        if not rows:
            raise ValueError("reference is empty; give at least one prompt")
        reference = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
        mask = torch.arange(reference.shape[1], device="cpu") < lengths[:, None]
    reference = (reference if reference.dim() == 2 else reference[None]).to(model.device)
    mask = torch.ones_like(reference) if mask is None else mask
    real = mask.bool().to(model.device)
    if real.shape != reference.shape or not bool(real.any()):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} and a mask of shape {tuple(real.shape)}; "
            "they must agree, and at least one token must be real"
        )
    return reference, real


def _is_masked_batch(reference: Any) -> bool:
    """Whether this is a pair (input_ids, attention_mask). Two prompts of one dimension each are a list of prompts."""
    pair = isinstance(reference, tuple) and len(reference) == 2
    return pair and all(isinstance(part, Tensor) and part.dim() == 2 for part in reference)


def _ids(model: LoadedCore, prompt: Any) -> Tensor:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("reference is text and the model has no tokenizer; give token ids")
        prompt = model.tokenizer.encode(prompt)
    row = torch.as_tensor(prompt, device="cpu")
    if row.numel() == 0:
        raise ValueError("a prompt of the reference is empty; each needs at least one token")
    if row.dtype.is_floating_point or row.dtype.is_complex or row.dtype == torch.bool:
        raise TypeError(f"a prompt of the reference holds {row.dtype}; token ids are integers")
    row = row.to(torch.int64)
    return row if row.dim() == 1 else row.flatten()
