"""What stands in for a deleted node: its mean, zero, or a value that it has elsewhere."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.circuitgpt.ablation import KINDS, _activations, _stored_means, hook_means
from ..models.circuitgpt.layers import Tap
from ..models.circuitgpt.model import CircuitGPT
from ..models.circuitgpt.recording import hook_width
from ..tasks.corpus import interpreter_sources, reference_prompts

__all__ = ["NODE_HOOKS", "Substitute", "digest", "masked", "node_hooks", "nodes_at", "substitute", "training_text"]

# Where a circuit's nodes are (Gao et al. 2025, appendix A.5): what norms give out, channels of q, k and v, neurons, and
# what attention and MLP add to the residual.
NODE_HOOKS = (
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)


def node_hooks(model: CircuitGPT) -> list[str]:
    """The hooks whose channels are nodes, in the order of the forward pass."""
    return [name for name in model.hook_names if name.partition(".")[2] in NODE_HOOKS]


def nodes_at(model: CircuitGPT) -> dict[str, int]:
    """Hook → number of its nodes."""
    return {name: hook_width(model, name) for name in node_hooks(model)}


@dataclass(frozen=True)
class Substitute:
    """Values to put in place of deleted nodes, by hook: (width,) for all tokens, or (samples, width) to draw from."""

    kind: str
    values: dict[str, Tensor]
    generator: torch.Generator | None = None

    def again(self, seed: int) -> "Substitute":
        """The same, its draws beginning anew: what is found must not depend on what was drawn before."""
        return replace(self, generator=torch.Generator().manual_seed(seed))

    def at(self, name: str, value: Tensor) -> Tensor:
        """What replaces ``value`` (batch, length, width) at a hook, of its shape or broadcast to it.

        Where samples are drawn, all nodes of a token at a hook get theirs from one token of the reference.
        """
        given = self.values[name]
        if self.kind != "resample":
            return given.to(value.device)
        draw = torch.randint(len(given), value.shape[:-1], generator=self.generator, device="cpu")
        return given[draw].to(value.device)


def substitute(model: CircuitGPT, kind: str, reference: Any, hooks: list[str], seed: int = 0) -> Substitute:
    """The substitute of a kind, "mean", "zero" or "resample", over ``reference`` (prompts, as in ``model.ablate``).

    Without a reference "mean" takes the means that came with the model.
    """
    if kind not in KINDS:
        raise ValueError(f"ablation kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if kind == "zero":
        return Substitute(
            kind, {name: torch.zeros(hook_width(model, name), dtype=model.dtype, device="cpu") for name in hooks}
        )
    if kind == "mean":
        means = _stored_means(model, hooks) if reference is None else hook_means(model, reference, hooks)
        return Substitute(kind, {name: mean.to(model.dtype).cpu() for name, mean in means.items()})
    parts: dict[str, list[Tensor]] = {name: [] for name in hooks}
    for values, real in _activations(model, reference, hooks):
        for name, value in values.items():
            parts[name].append(value[real].cpu())
    generator = torch.Generator().manual_seed(seed)
    return Substitute(kind, {name: torch.cat(rows) for name, rows in parts.items()}, generator)


def digest(*stand_ins: Substitute) -> str:
    """SHA-256 of all values."""
    found = hashlib.sha256()
    for one in stand_ins:
        found.update(one.kind.encode())
        for name, values in one.values.items():
            found.update(name.encode())
            found.update(values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def training_text(model: CircuitGPT) -> list[list[int]] | None:
    """Prompts from the text that a model was trained on, where this library can make it again; else None.

    For bracket-mini about 15 seconds of reading the interpreter's library.
    """
    if "text" not in model.card or model.tokenizer is None:
        return None
    return reference_prompts(model, interpreter_sources())


def masked(masks: dict[str, Tensor], stand_in: Substitute) -> Tap:
    """A tap that keeps nodes where their mask is 1 and puts the substitute where it is 0; between, a mixture."""

    def tap(name: str, value: Tensor) -> Tensor:
        if name not in masks:
            return value
        mask = masks[name].to(value)
        other = stand_in.at(name, value)
        return other + mask * (value - other)

    return tap
