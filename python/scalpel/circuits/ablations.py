"""What replaces a deleted node: its mean, zero, or a value that it has elsewhere."""

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

# Where a circuit's nodes are (Gao et al. 2025, appendix A.5): outputs of norms, channels of q, k and v, neurons, and
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
    """List the hooks whose channels are the nodes of circuits.

    Args:
        model: The model.

    Returns:
        The names of the hooks, in the order of the forward pass.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> scalpel.circuits.node_hooks(model)[:3]
        ['0.attn.act_in', '0.attn.k', '0.attn.q']
    """
    return [name for name in model.hook_names if name.partition(".")[2] in NODE_HOOKS]


def nodes_at(model: CircuitGPT) -> dict[str, int]:
    """Count the nodes at each hook."""
    return {name: hook_width(model, name) for name in node_hooks(model)}


@dataclass(frozen=True)
class Substitute:
    """Values that replace deleted nodes.

    Attributes:
        kind: The kind of ablation, "mean", "zero" or "resample".
        values: The values at each hook, (width,) for all tokens, or (samples, width) to draw from.
        generator: The source of the draws; None if nothing is drawn.
    """

    kind: str
    values: dict[str, Tensor]
    generator: torch.Generator | None = None

    def again(self, seed: int) -> "Substitute":
        """Restart the draws, because a result must not depend on what was drawn before."""
        return replace(self, generator=torch.Generator().manual_seed(seed))

    def at(self, name: str, value: Tensor) -> Tensor:
        """Return what replaces ``value`` (batch, length, width) at a hook, of its shape or broadcast to it.

        Where samples are drawn, all nodes of a token at a hook get their values from one token of the reference.
        """
        values = self.values[name]
        if self.kind != "resample":
            return values.to(value.device)
        draw = torch.randint(len(values), value.shape[:-1], generator=self.generator, device="cpu")
        return values[draw].to(value.device)


def substitute(model: CircuitGPT, kind: str, reference: Any, hooks: list[str], seed: int = 0) -> Substitute:
    """Make the values that replace deleted nodes at some hooks.

    Args:
        model: The model.
        kind: The kind of ablation, "mean", "zero" or "resample".
        reference: The prompts for means and samples, as in ``model.ablate``. Without them, "mean" uses the means that
            came with the model.
        hooks: The names of the hooks.
        seed: The seed of the draws.

    Returns:
        The values.

    Raises:
        ValueError: If there is no such kind.
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
    """Compute the SHA-256 of all values."""
    sha256 = hashlib.sha256()
    for stand_in in stand_ins:
        sha256.update(stand_in.kind.encode())
        for name, values in stand_in.values.items():
            sha256.update(name.encode())
            sha256.update(values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def training_text(model: CircuitGPT) -> list[list[int]] | None:
    """Return prompts from the text that a model was trained on, if this library can make that text again; else None.

    For bracket-mini this reads the interpreter's library, which takes about 15 seconds.
    """
    if "text" not in model.card or model.tokenizer is None:
        return None
    return reference_prompts(model, interpreter_sources())


def masked(masks: dict[str, Tensor], stand_in: Substitute) -> Tap:
    """Return a tap that keeps nodes where their mask is 1, substitutes them where it is 0, and mixes in between."""

    def tap(name: str, value: Tensor) -> Tensor:
        if name not in masks:
            return value
        mask = masks[name].to(value)
        replacement = stand_in.at(name, value)
        return replacement + mask * (value - replacement)

    return tap
