"""Which hooks read which, and which tokens: whether a path leads from one hook to another.

Only the wiring is asked, not the weights. A path that a zero weight, a TopK or an ablation cuts is a path here, and its
Jacobian is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .names import FINAL, LOGITS, PATTERN
from .positions import Selected, describe, read_at

__all__ = ["check_path", "hook_of_mask", "parents_of", "tokens_moved", "tokens_read"]

# Within a layer: hook → the hooks that it reads, and whether it also reads them at earlier tokens.
_READS = {
    "attn.act_in": (("resid_in", False),),
    "attn.k": (("attn.act_in", False),),
    "attn.q": (("attn.act_in", False),),
    "attn.v": (("attn.act_in", False),),
    PATTERN: (("attn.q", False), ("attn.k", True)),
    "attn.y": (("attn.q", False), ("attn.k", True), ("attn.v", True)),
    "attn.resid_delta": (("attn.y", False),),
    "resid_mid": (("resid_in", False), ("attn.resid_delta", False)),
    "mlp.act_in": (("resid_mid", False),),
    "mlp.post_act": (("mlp.act_in", False),),
    "mlp.resid_delta": (("mlp.post_act", False),),
}


def parents_of(name: str, hooks: Sequence[str]) -> list[tuple[str, bool]]:
    """List the hooks that a hook reads, each with whether it also reads earlier tokens there.

    ``hooks`` are the model's own, from :func:`scalpel.hooks.names.hook_names`, with or without ``"logits"`` and the
    attention weights. No hook is said to read these: they are made of q and k, which ``"attn.y"`` reads already.

    Example:
        >>> parents_of("0.attn.y", ["0.attn.y"])
        [('0.attn.q', False), ('0.attn.k', True), ('0.attn.v', True)]
    """
    layer, _, hook = name.partition(".")
    if hook == "mlp.act_in" and f"{layer}.resid_mid" not in hooks:  # attention and MLP in parallel
        return [(f"{layer}.resid_in", False)]
    if hook in _READS:
        return [(f"{layer}.{parent}", mixes) for parent, mixes in _READS[hook]]
    if name == LOGITS:
        return [(FINAL, False)]
    # The rest is the residual stream at the start of a layer, or after the last one: the sum that a layer leaves.
    before = hooks[hooks.index(name) - 1].partition(".")[0] if hooks.index(name) else ""
    if not before:
        return []
    summed = ["resid_mid"] if f"{before}.resid_mid" in hooks else ["resid_in", "attn.resid_delta"]
    return [(f"{before}.{parent}", False) for parent in (*summed, "mlp.resid_delta")]


def check_path(
    hooks: Sequence[str],
    source: str,
    target: str,
    at: tuple[Selected, Selected],
    allowed: Tensor,
) -> None:
    """Check that some chosen token at the source can move some chosen token at the target.

    Args:
        hooks: The model's hooks in the order of the forward pass, ``"logits"`` last.
        source: The hook where the path begins.
        target: The hook where it ends.
        at: The tokens chosen at the source and at the target.
        allowed: (L, L) or (B, 1, L, L) bool: the keys that each query may read.

    Raises:
        ValueError: If no path leads there; the message says whether the hooks or the tokens are the reason.
    """
    if hooks.index(target) < hooks.index(source):
        raise ValueError(
            f"no path from {source!r} to {target!r}: the forward pass reaches {target!r} first. "
            "Swap them, or choose a later target"
        )
    reads = allowed if allowed.dim() == 2 else allowed[:, 0]
    if not bool(tokens_moved(hooks, source, target, None, reads).any()):
        raise ValueError(
            f"no path from {source!r} to {target!r}: {target!r} does not read {source!r} and nothing between "
            "does. Choose a target further on"
        )
    if not bool(read_at(tokens_moved(hooks, source, target, at[0], reads), at[1]).any()):
        raise ValueError(
            f"no path from {source!r} at {describe(at[0])} to {target!r} at {describe(at[1])}: a token is "
            "read only by itself and, through attention, by the later tokens whose mask allows it. Choose "
            "later target positions"
        )


def tokens_moved(hooks: Sequence[str], source: str, target: str, chosen: Selected, reads: Tensor) -> Tensor:
    """Find the tokens of ``target`` that a chosen token of ``source`` can move.

    ``reads`` is (L, L) or (B, L, L) bool: the keys that each query may read. Returns (1 or B, L) bool.
    """
    nothing = _no_token(reads)
    start = nothing.clone()
    start[:, slice(None) if chosen is None else list(chosen)] = True
    moved = {source: start}
    for name in hooks[hooks.index(source) + 1 : hooks.index(target) + 1]:
        tokens = nothing
        for parent, mixes in parents_of(name, hooks):
            if parent in moved:
                tokens = tokens | ((reads & moved[parent][:, None, :]).any(-1) if mixes else moved[parent])
        moved[name] = tokens
    return moved[target]


def tokens_read(hooks: Sequence[str], target: str, chosen: Selected, reads: Tensor) -> dict[str, Tensor]:
    """Find, at every hook that the chosen tokens of ``target`` read, the tokens that they read there.

    What cannot change the target is left out: k where the target is q, and tokens after the chosen ones.
    ``reads`` is as for :func:`tokens_moved`. Returns {hook: (1 or B, L) bool}, the target itself included.
    """
    reads = reads if reads.dim() == 3 else reads[None]
    ends = _no_token(reads)
    ends[:, slice(None) if chosen is None else list(chosen)] = True
    read = {target: ends}
    for name in reversed(hooks[: hooks.index(target) + 1]):
        if name in read:
            for parent, mixes in parents_of(name, hooks):
                tokens = (reads & read[name][:, :, None]).any(1) if mixes else read[name]
                read[parent] = read[parent] | tokens if parent in read else tokens
    return read


def hook_of_mask(name: str, hooks: Sequence[str]) -> str:
    """Find the first hook whose value a mask makes.

    ``name`` is what :func:`scalpel.hooks.masks.watch_masks` calls the mask: the hook itself, or ``"0.resid_post_attn"``
    or ``"0.resid_post_mlp"`` for a mask on the residual stream after attention or after the MLP.
    """
    layer, _, place = name.partition(".")
    if place == "resid_post_attn":
        return f"{layer}.resid_mid"
    if place == "resid_post_mlp":
        return hooks[hooks.index(f"{layer}.mlp.resid_delta") + 1]
    return name


def _no_token(reads: Tensor) -> Tensor:
    """(1 or B, L) bool, all False."""
    rows = reads.shape[0] if reads.dim() == 3 else 1
    return torch.zeros(rows, reads.shape[-1], dtype=torch.bool, device=reads.device)
