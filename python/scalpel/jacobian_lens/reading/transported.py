"""What a Jacobian lens makes of chosen vectors, without its matrices: J̄_l h by tangents that go forward.

For a prompt with the valid positions V, J_p h is 1/|V| times the sum over the target's positions in V of what becomes
of a tangent that is h at every position in V of layer l at once. Causality leaves t' ≥ t, so this is the product of h
with the matrix that :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices` computes;
:mod:`scalpel.jacobian_lens.sweeps.sweep` defines both kinds of targets, and the signs of "same".

The price of a vector is that of one tangent through the layers behind its own, where a fit carries ``width`` cotangents
through all layers. So T vectors, spread over the layers, cost about T / (2 · width) of a fit on the same prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...jacobians.choosing import pass_between
from ...jacobians.entry import jacobian
from ...jacobians.forward_sweep import ForwardSweep, forward_sweep_of
from ...jacobians.passes import CircuitPass
from ...jacobians.precision import plain_tensors
from ...jacobians.rows.decoder_pass import DecoderPass
from ...jacobians.trace import has_rules
from ..sweeps.cotangents import check_options, signs_of
from ..sweeps.hooks import Layer, ends_of, is_residual
from ..sweeps.positions import text_alone, valid_tokens

__all__ = ["Transported", "transported"]

_BESIDE: dict[str, Any] = {"attention_mask": None, "position_ids": None}


@dataclass(frozen=True)
class Transported:
    """Chosen vectors, carried from their layers to the target, prompt by prompt.

    Attributes:
        per_prompt: {layer: (prompts, n, width)}, J_p h for each prompt that counted.
        skipped: How many prompts were too short to count.
    """

    per_prompt: dict[Any, Tensor]
    skipped: int = 0

    @property
    def n_prompts(self) -> int:
        """How many prompts counted."""
        return len(next(iter(self.per_prompt.values())))

    @property
    def mean(self) -> dict[Any, Tensor]:
        """{layer: (n, width)}, J̄_l h: the mean over prompts, which all weigh the same."""
        return {layer: values.mean(0) for layer, values in self.per_prompt.items()}

    @property
    def standard_error(self) -> dict[Any, Tensor]:
        """{layer: (n, width)}, the standard error of each entry of the mean; NaN for a single prompt."""
        return {layer: values.std(0, correction=1) / len(values) ** 0.5 for layer, values in self._several().items()}

    @property
    def error(self) -> dict[Any, Tensor]:
        """{layer: (n,)}, the relative error of the mean: the norm of its standard error by its own norm."""
        means = self.mean
        return {layer: each.norm(dim=-1) / means[layer].norm(dim=-1) for layer, each in self.standard_error.items()}

    def _several(self) -> dict[Any, Tensor]:
        """The values of the prompts; NaN where a single one has no scatter, without torch's warning."""
        if self.n_prompts > 1:
            return self.per_prompt
        return {layer: torch.full_like(each, torch.nan).expand(2, -1, -1) for layer, each in self.per_prompt.items()}


def transported(
    model: nn.Module,
    prompts: Iterable[Any],
    vectors: Mapping[Any, Tensor],
    *,
    target: Layer | None = None,
    skip_first: int = 16,
    targets: str = "after",
    groups: int | None = 1,
    seed: int = 0,
    precision: str | None = None,
) -> Transported:
    """Compute J_p h for chosen vectors h of chosen layers and every prompt, without a matrix.

    Each prompt has one forward pass of the model and one of all tangents, which join it as it reaches their layers. In
    a model without rules, each layer has a pass of its own through ``torch.func``.

    With T pairs of a vector and a layer, the layers evenly spread, this costs about T / (2 · width) of a fit of all
    layers' matrices on the same prompts. It is cheaper up to T = 2 · width: a few texts at a few positions. On
    SmolLM2-135M (width 576, 30 layers) and a prompt of 64 tokens, one vector for each of 29 layers took 3 % of the time
    of a sweep of all 576 cotangents, and eight took 21 %. A fit is cheaper where many vectors are to be read: its
    matrices serve all of them, and those that come later.

    Args:
        model: As :func:`scalpel.jacobian` takes it.
        prompts: Token ids (1, L) or batches of one text, as :func:`scalpel.jacobian_lens.sweeps.sweep.lens_matrices`
            takes them. A prompt of fewer than ``skip_first`` + 2 tokens is left out with a warning.
        vectors: {layer: (n, width)} or (width,) for a single one; layers by number, from 0, or by the path of a module.
        target: The layer whose output is the target, before the final norm; by default the last one.
        skip_first: How many real tokens at the beginning don't count.
        targets: ``"after"`` or ``"same"``.
        groups: For ``"same"``, how many groups of positions have tangents of their own; None for the exact product.
        seed: For ``"same"``, of the signs.
        precision: As :func:`scalpel.jacobian` takes it.

    Returns:
        The values of each prompt, with their mean and its error by prompt: float64 for a float64 model and float32
        otherwise.

    Raises:
        ValueError: For an unknown layer or option, a vector of another width, or if no prompt is long enough.

    Example:
        >>> from scalpel.jacobian_lens import transported
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> prompts = [torch.tensor([model.tokenizer.encode(text)]) for text in ("[[1, 2], [3", "[4, [5, 6]")]
        >>> found = transported(model, prompts, {0: torch.eye(128)[:3]}, skip_first=2)
        >>> found.mean[0].shape, found.error[0].shape
        (torch.Size([3, 128]), torch.Size([3]))
    """
    check_options(targets, precision, skip_first, groups, "jacobian")
    rows = {layer: each[None] if each.dim() == 1 else each for layer, each in vectors.items()}
    hooks, end = ends_of(model, rows, target)
    of_prompts: list[dict[Any, Tensor]] = []
    skipped = 0
    for prompt in prompts:
        with plain_tensors():
            batch = text_alone(prompt)
            length = _length(batch)
            if length is not None and length < skip_first + 2:
                skipped += 1
                continue
            sweep, tokens = _forward(model, batch, list(hooks.values()), end, skip_first, precision)
            factors = signs_of(batch, tokens.stop - tokens.start, targets, groups, seed, sweep.dtype, sweep.device)
            of_prompts.append(_of_prompt(sweep, hooks, rows, factors))
    if skipped:
        warnings.warn(
            f"{skipped} prompts have fewer than skip_first + 2 = {skip_first + 2} tokens and don't count", stacklevel=2
        )
    if not of_prompts:
        raise ValueError(
            f"no prompt has {skip_first + 2} tokens or more, which skip_first={skip_first} needs: give longer prompts, "
            "or a smaller skip_first"
        )
    return Transported({layer: torch.stack([each[layer] for each in of_prompts]) for layer in hooks}, skipped)


def _length(batch: Any) -> int | None:
    """The number of tokens of a batch of ids; None where there are none to count."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.shape[-1] if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _of_prompt(
    sweep: ForwardSweep, hooks: Mapping[Any, str], vectors: Mapping[Any, Tensor], factors: Tensor
) -> dict[Any, Tensor]:
    """J_p h of one prompt, {layer: (n, width)}."""
    count = factors.shape[1]
    found = {}
    for layer, rows in vectors.items():
        if rows.dim() != 2 or rows.shape[1] != sweep.width:
            raise ValueError(
                f"the vectors of layer {layer!r} have shape {tuple(rows.shape)}; the residual stream needs "
                f"(n, {sweep.width})"
            )
        found[layer] = torch.zeros(len(rows), sweep.width, dtype=sweep.dtype, device=sweep.device)
    numbered = [(layer, number) for layer in hooks for number in range(len(vectors[layer]))]
    for signs in factors:
        for first in range(0, len(numbered), sweep.block):
            parts: dict[Any, list[int]] = {}
            for layer, number in numbered[first : first + sweep.block]:
                parts.setdefault(layer, []).append(number)
            tangents = {
                hooks[layer]: vectors[layer][chosen].to(sweep.device, sweep.dtype)[:, None, None] * signs[:, None]
                for layer, chosen in parts.items()
            }
            pushed = sweep.push(tangents)
            for layer, chosen in parts.items():
                found[layer][chosen] += signs @ pushed[hooks[layer]][:, 0] / count
    return found


def _forward(
    model: nn.Module, batch: Any, hooks: list[str], end: str, skip_first: int, precision: str | None
) -> tuple[ForwardSweep, slice]:
    """The pass of tangents of the kind that the model has, and the prompt's valid tokens."""
    run = pass_between(model, batch, _BESIDE, hooks[0], end, precision)
    if isinstance(run, (CircuitPass, DecoderPass)):
        prompts = (run.text.ids if isinstance(run, DecoderPass) else run.inputs[0]).shape[0]
        if prompts != 1:
            raise ValueError(f"a prompt of the iterable holds {prompts} texts: give them one by one, (1, L) each")
        if all(map(is_residual, (*hooks, end))) and has_rules(run):
            tokens = valid_tokens(run.length, skip_first)
            return forward_sweep_of(run, [*hooks, end], tokens), tokens
    by_layer = _ByLayer(model, batch, hooks, end, skip_first, precision)
    return by_layer, by_layer.tokens


class _ByLayer:
    """The tangents of a model without rules: a pass of their own for those of each layer, through ``torch.func``."""

    block = 1 << 10

    def __init__(
        self, model: nn.Module, batch: Any, hooks: Sequence[str], end: str, skip_first: int, precision: str | None
    ) -> None:
        self._end = end
        self._jacobians = {
            hook: jacobian(model, batch, hook, end, precision=precision) for hook in dict.fromkeys(hooks) if hook != end
        }
        primal = next(iter(self._jacobians.values()), None) or jacobian(model, batch, end, end, precision=precision)
        shape = primal.target_shape
        if len(shape) != 3 or shape[0] != 1 or any(J.source_shape != shape for J in self._jacobians.values()):
            raise ValueError(
                f"the value at {end!r} has shape {tuple(shape)}; a lens needs the same (1, tokens, width) at all layers"
            )
        self._shape = shape
        self.tokens = valid_tokens(shape[1], skip_first)
        self.width, self.dtype, self.device = shape[2], primal.dtype, primal.device

    def push(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pushed = {}
        for hook, rows in tangents.items():
            if hook == self._end:
                pushed[hook] = rows
                continue
            full = rows.new_zeros(len(rows), *self._shape)
            full[:, :, self.tokens] = rows
            pushed[hook] = self._jacobians[hook].jvp(full)[:, :, self.tokens]
        return pushed
