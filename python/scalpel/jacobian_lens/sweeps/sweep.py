"""The matrices of a Jacobian lens for one prompt, by one sweep of cotangents back through all layers.

With V the valid positions of the prompt (after the first ``skip_first`` tokens, and without the last), the matrix of
layer l is
    J_l = 1/|V| · Σ_{t in V} Σ_{t' in V, t' ≥ t} ∂h_target[t'] / ∂h_l[t]
for ``targets="after"``, and the sum over t' = t alone for ``targets="same"``. Its rows are the target's dimensions.

"after" takes one cotangent for each dimension d of the target: 1 at dimension d of every t' in V at once. What arrives
at a token t is the sum over all t' ≥ t, by causality.

"same" takes random signs z in place of the ones, multiplies what arrives at t by z_t, and takes the mean. Terms of
t' ≠ t have a factor z_t z_t', whose expectation is zero: the matrix is unbiased, and its noise falls with the number of
prompts as their scatter does. Signs are drawn from the prompt's tokens and ``seed``, so that they differ from prompt to
prompt; the same ones for all would leave the same terms in every prompt. ``groups`` makes the noise smaller: positions
fall into that many groups, t and t + groups into the same one, and each group has a sweep of its own, so only terms of
positions of one group are left (probing, Tang and Saad 2012). The cost is groups · width cotangents. With |V| groups no
term is left and the result is exact, for |V| times the price.

``estimator="relevance"`` is the relevance lens (Blank, Bhatia and Nanda 2026): the same sums of the same model's
cotangents, which go back through a layer by other rules than the derivative:
- the denominator of a norm of the residual stream is a constant;
- the slope of an activation f at x is f(x) / x, which is sigmoid(x) for SiLU and Φ(x) for the exact GELU, and its limit
  at zero. Approximations of the GELU are divided by x like it. ReLU's quotient is its derivative, so nothing changes;
- each factor of a gated product gets half of what the derivative gives it.
Attention stays as it is, with the norms of its q and k, and so do the masks of a CircuitGPT's AbsTopKs. The values of
the forward pass keep their bits. The matrix is no Jacobian then: J h is not h's first-order effect on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks.inputs import holds_ids
from ...hooks.modules import module_hooks
from ...hooks.names import known_hook
from ...hooks.standing import as_analysed
from ...jacobians.choosing import pass_between
from ...jacobians.module_pass import ModulePass
from ...jacobians.passes import CircuitPass
from ...jacobians.precision import plain_tensors
from ...jacobians.rows.decoder_pass import DecoderPass
from ...jacobians.sweep import Seen, Sweep, sweep_of
from ...jacobians.trace import has_rules
from ...models.circuitgpt.model import CircuitGPT
from ...models.decoders.families import decoder_inside, decoder_or_reason
from .autograd_sweep import COPIES, AutogradSweep, repeated
from .cotangents import check_options, ones_at, signs_of
from .estimators import check_activation
from .hooks import Layer, ends_of, is_residual
from .positions import text_alone, valid_tokens

__all__ = ["lens_matrices", "lens_of_sweep", "lens_rows", "rows_of_sweep"]

_BESIDE: dict[str, Any] = {"attention_mask": None, "position_ids": None}


def lens_matrices(
    model: nn.Module,
    input_ids: Any,
    *,
    layers: Iterable[Layer],
    target: Layer | None = None,
    skip_first: int = 16,
    targets: str = "after",
    groups: int | None = 1,
    seed: int = 0,
    precision: str | None = None,
    estimator: str = "jacobian",
) -> dict[Any, Tensor]:
    """Compute the matrices of one prompt, as the docstring of this file defines them.

    A model that has rules runs once, and its cotangents go back once, whatever the number of layers. Any other model
    goes through autograd, sixteen copies of the prompt at a time.

    Args:
        model: As :func:`scalpel.jacobian` takes it.
        input_ids: (1, S) integers, or a batch of one text, whose attention mask may say that it is padded.
        layers: Numbers of layers, from 0, whose outputs are the sources; or paths of modules. In a model of no family
            the layers are the blocks that :func:`scalpel.jacobian_lens.sweeps.hooks.blocks_in` finds.
        target: The layer whose output is the target, before the final norm; by default the last one.
        skip_first: How many real tokens at the beginning don't count.
        targets: ``"after"`` or ``"same"``.
        groups: For ``"same"``, how many groups of positions have sweeps of their own; None for the exact matrices.
        seed: For ``"same"``, of the signs.
        precision: As :func:`scalpel.jacobian` takes it.
        estimator: ``"jacobian"``, or ``"relevance"`` for the rules of the relevance lens, which only a model that has
            rules for its layers can follow.

    Returns:
        {layer: (width, width)}, float64 for a float64 model and float32 otherwise.

    Raises:
        ValueError: For a prompt that is too short, several prompts, an unknown layer or option, or the relevance lens
            of a model without rules.
    """
    found: dict[Any, Tensor] = {}

    def see(layer: Any, first: int, rows: Tensor) -> None:
        if layer not in found:
            found[layer] = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
        found[layer][first : first + len(rows)] = rows

    ordered = lens_rows(
        model,
        input_ids,
        see,
        layers=layers,
        target=target,
        skip_first=skip_first,
        targets=targets,
        groups=groups,
        seed=seed,
        precision=precision,
        estimator=estimator,
    )
    return {layer: found[layer] for layer in ordered}


def lens_rows(
    model: nn.Module,
    input_ids: Any,
    see: Callable[[Any, int, Tensor], None],
    *,
    layers: Iterable[Layer],
    target: Layer | None = None,
    skip_first: int = 16,
    targets: str = "after",
    groups: int | None = 1,
    seed: int = 0,
    precision: str | None = None,
    estimator: str = "jacobian",
) -> list[Any]:
    """Compute the matrices of one prompt as :func:`lens_matrices` does, and keep none: their rows are given to ``see``.

    Args:
        model: As there.
        input_ids: As there.
        see: Called with a layer, the number of the first row, and some rows of the layer's matrix, (rows, width), each
            row once. They hold until it returns.
        layers: As there, like the options that follow.
        target: As there.
        skip_first: As there.
        targets: As there.
        groups: As there.
        seed: As there.
        precision: As there.
        estimator: As there.

    Returns:
        The layers in the model's order.

    Raises:
        ValueError: As for :func:`lens_matrices`.
    """
    check_options(targets, precision, skip_first, groups, estimator)
    hooks, end = ends_of(model, layers, target)
    by_hook: dict[str, list[Any]] = {}
    for layer, hook in hooks.items():
        by_hook.setdefault(hook, []).append(layer)

    def see_hook(hook: str, first: int, rows: Tensor) -> None:
        for layer in by_hook[hook]:
            see(layer, first, rows)

    with plain_tensors():
        batch, relevance = text_alone(input_ids), estimator == "relevance"
        sweep, tokens = _sweep(
            model, batch, list(dict.fromkeys([*hooks.values(), end])), end, skip_first, precision, relevance
        )
        count = tokens.stop - tokens.start
        signs = signs_of(batch, count, targets, groups, seed, sweep.dtype, sweep.device)
        rows_of_sweep(sweep, set(by_hook), signs, see_hook)
    return list(hooks)


def lens_of_sweep(
    sweep: Sweep, hooks: Iterable[str], signs: Tensor, dimensions: slice | None = None
) -> dict[str, Tensor]:
    """Reduce a sweep's cotangents to the matrices of ``hooks``, each (width, width); see :func:`rows_of_sweep`.

    Rows of dimensions that are left out are zero.
    """
    wide = sweep.width
    found = {hook: torch.zeros(wide, wide, dtype=sweep.dtype, device=sweep.device) for hook in hooks}

    def see(hook: str, first: int, rows: Tensor) -> None:
        found[hook][first : first + len(rows)] = rows

    rows_of_sweep(sweep, found, signs, see, dimensions)
    return found


def rows_of_sweep(
    sweep: Sweep,
    hooks: Collection[str],
    signs: Tensor,
    see: Callable[[str, int, Tensor], None],
    dimensions: slice | None = None,
) -> None:
    """Reduce a sweep's cotangents to rows of the matrices of ``hooks``, and give each row to ``see`` once.

    Args:
        sweep: The sweep.
        hooks: Where it is seen.
        signs: (groups, tokens), the factor of each valid position in each group of "same"; a row of ones for "after".
        see: Called with a hook, the number of the first row, and some rows, (rows, width).
        dimensions: The target's dimensions whose rows are computed. All by default.
    """
    wide = sweep.width
    first, stop, _ = (dimensions or slice(None)).indices(wide)
    for start in range(first, stop, sweep.block):
        part = slice(start, min(stop, start + sweep.block))
        waiting: dict[tuple[str, int], Tensor] = {}  # sums over groups, of which the last is still to come
        for number, factors in enumerate(signs):
            last = number == len(signs) - 1
            reduce = partial(_reduced, hooks, factors, waiting, part.start, see if last else None)
            sweep.pull(ones_at(part, factors, wide), reduce)


def _reduced(
    hooks: Collection[str],
    factors: Tensor,
    waiting: dict[tuple[str, int], Tensor],
    start: int,
    see: Callable[[str, int, Tensor], None] | None,
    hook: str,
    pulled: Tensor,
    of: int,
) -> None:
    """Sum a group's cotangents over positions; the last group has ``see``, which gets the mean over all of them."""
    if hook not in hooks:
        return
    rows = factors @ pulled[:, 0]
    if (hook, of) in waiting:
        rows = waiting.pop((hook, of)).add_(rows)
    if see is None:
        waiting[hook, of] = rows
    else:
        see(hook, start + of, rows.div_(len(factors)))


def _sweep(
    model: nn.Module,
    batch: Any,
    hooks: list[str],
    end: str,
    skip_first: int,
    precision: str | None,
    relevance: bool,
) -> tuple[Sweep, slice]:
    """The sweep of the kind that the model has, and the prompt's valid tokens. ``hooks`` begin with the earliest."""
    residual = all(map(is_residual, (*hooks, end)))
    run = pass_between(model, batch, _BESIDE, hooks[0], end, precision)
    if isinstance(run, (CircuitPass, DecoderPass)):
        prompts = (run.text.ids if isinstance(run, DecoderPass) else run.inputs[0]).shape[0]
        if prompts != 1:
            raise ValueError(f"input_ids holds {prompts} prompts; the matrices are those of one: give them one by one")
        tokens = valid_tokens(run.length, skip_first)
        if relevance and isinstance(run, DecoderPass):
            check_activation(run.decoder)
        if residual and has_rules(run):
            return sweep_of(run, hooks, tokens, relevance), tokens
    if relevance:
        raise ValueError(_without_rules(model, residual))
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, Tensor) and len(ids) != 1:
        raise ValueError(f"input_ids holds {len(ids)} prompts; the matrices are those of one: give them one by one")
    copies = COPIES if holds_ids(batch) else 1
    many = repeated(batch, copies) if holds_ids(batch) else batch
    if isinstance(run, CircuitPass):
        run = pass_between(model, many, _BESIDE, hooks[0], end)
        places = {hook: hook for hook in hooks}
    else:
        inside = as_analysed(model)
        found = decoder_inside(inside)
        if found is None:
            kind = f"this {type(inside).__name__}, whose hooks are module paths (':in' ends an input's)"
            for hook in hooks:
                known_hook(hook, module_hooks(inside), "layer", kind)
        places = {hook: hook if found is None else found.place(hook, inside, "source") for hook in hooks}
        run = ModulePass(inside, many, {}, places[hooks[0]], places[end])
    sweep = AutogradSweep(run, list(places.values()), places[end], skip_first, copies)
    return _Renamed(sweep, {place: hook for hook, place in places.items()}), sweep.tokens


def _without_rules(model: nn.Module, residual: bool) -> str:
    """The message that a model can't have a relevance lens."""
    inside = as_analysed(model)
    if isinstance(inside, CircuitGPT):
        reason = f"this {type(inside).__name__} has a module or a hook that is not its own, or a dtype without rules"
    else:
        found = decoder_or_reason(inside)
        reason = found if isinstance(found, str) else "the rules of its family don't cover these inputs"
        if not residual and not isinstance(found, str):
            reason = "its layers are given as paths of modules that are none of the residual stream"
    return (
        f"estimator='relevance' follows rules of its own through each layer, and here there are none: {reason}. "
        "Use estimator='jacobian', which any model has"
    )


class _Renamed:
    """A sweep whose hooks are seen under other names."""

    def __init__(self, sweep: Sweep, names: Mapping[str, str]) -> None:
        self._sweep, self._names = sweep, names
        self.width, self.dtype, self.device, self.block = sweep.width, sweep.dtype, sweep.device, sweep.block

    def pull(self, cotangents: Tensor, see: Seen) -> None:
        self._sweep.pull(cotangents, lambda hook, rows, first: see(self._names[hook], rows, first))
