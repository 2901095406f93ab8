"""The direction of a token in a layer's residual stream, from a lens or without one.

With W the output matrix, W[token] J_l h is what token's logit owes to h before the last norm, so the direction of the
token at layer l is v = J_lᵀ W[token]. The last norm's gain g is left out, as in the published formula; with it, v is
J_lᵀ (g ⊙ W[token]).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...jacobians.precision import plain_tensors
from ..attached.model import AttachedModel
from ..matrices import Lens, chosen_layers, matrix_of
from ..sweeps import sweep as sweeps
from ..sweeps.cotangents import check_options
from ..sweeps.hooks import all_layers, ends_of
from ..sweeps.positions import text_alone

__all__ = ["directions", "token_vectors", "vector"]


def vector(lens: Lens, token: Any, layer: Any, norm_gain: bool) -> Tensor:
    """The direction of a token at a layer: :meth:`scalpel.JacobianLens.vector`."""
    if not isinstance(layer, int | str | np.integer):
        raise ValueError(f"layer is {layer!r}; give one of the lens's layers")
    (layer,) = chosen_layers(lens, layer, end=True)
    return _pulled(matrix_of(lens, layer), rows_of(lens.attached, [token], norm_gain))[0]


def directions(lens: Lens, given: Any, layers: Sequence[Any]) -> dict[Any, Tensor]:
    """Return the directions (n, width), float32, that tokens or vectors mean at each layer.

    Args:
        lens: The lens.
        given: A token or several, whose directions the lens gives; a vector (width,) or several (n, width), which are
            those of every layer; or a mapping with the vectors of each layer.
        layers: The layers.

    Raises:
        ValueError: The vectors have another width, aren't finite, or are missing for a layer.
    """
    if isinstance(given, Mapping):
        missing = next((layer for layer in layers if layer not in given), None)
        if missing is not None:
            raise ValueError(f"there is no vector for layer {missing!r}; the mapping has {list(given)}")
        return {layer: _checked(given[layer], lens.d_model) for layer in layers}
    if isinstance(given, Tensor) and given.dtype.is_floating_point:
        same = _checked(given, lens.d_model)
        return dict.fromkeys(layers, same)
    tokens = [given] if isinstance(given, int | str | np.integer) else list(given)
    rows = rows_of(lens.attached, tokens, False)
    return {layer: _pulled(matrix_of(lens, layer), rows) for layer in layers}


def rows_of(model: AttachedModel, tokens: Iterable[Any], norm_gain: bool) -> Tensor:
    """Return the rows of the output matrix of tokens, (tokens, width), float32 or float64, times the gain if asked.

    Raises:
        ValueError: A token is unknown.
    """
    ids = [model.token(token) for token in tokens]
    if not ids or min(ids) < 0:
        raise ValueError(f"tokens are {ids}; give at least one, and ids from 0")
    try:
        rows = model.head.rows(ids)
    except IndexError as error:
        raise ValueError(f"tokens are {ids}, and the largest is outside the vocabulary") from error
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows * model.head.gain().to(rows.device, rows.dtype) if norm_gain else rows


def token_vectors(
    model: nn.Module,
    tokens: Sequence[Any],
    prompts: Iterable[Any],
    *,
    layers: Any = "all",
    target: Any = None,
    skip_first: int = 16,
    max_tokens: int = 128,
    norm_gain: bool = False,
    estimator: str = "jacobian",
    precision: str | None = None,
    tokenizer: Any = None,
) -> dict[Any, Tensor]:
    """Compute the directions of a few tokens at all layers without any matrix, over some prompts.

    They are what :meth:`JacobianLens.vector` gives for a lens that was fitted on the same prompts. A lens needs as many
    cotangents for a prompt as the residual stream is wide; here there is one for each token, so for one prompt a few
    tokens cost little more than a forward and a backward pass, and take a row in place of a matrix at each layer. Where
    many tokens or many readouts are wanted, a lens is cheaper.

    Args:
        model: As :func:`scalpel.jacobian` takes it; its output matrix must be known.
        tokens: Ids, or texts that are one token each.
        prompts: Strings, or token ids (S,) or (1, S), each long enough for ``skip_first``.
        layers: Numbers of layers, paths of modules, or "all" layers before the target.
        target: The layer where the output matrix is applied, by default the last one.
        skip_first: How many real tokens at the beginning of a prompt don't count; the last one doesn't, either.
        max_tokens: Prompts are cut to so many tokens.
        norm_gain: Whether the last norm's gain is a factor of the output matrix.
        estimator: As :func:`scalpel.jacobian_lens.fit` takes it.
        precision: As :func:`scalpel.jacobian` takes it.
        tokenizer: For a model that has none of its own.

    Returns:
        {layer: (tokens, width)}, float64 for a float64 model and float32 otherwise.

    Raises:
        ValueError: For an unknown token or layer, a prompt that is too short, or no prompt.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> from scalpel.jacobian_lens import token_vectors
        >>> found = token_vectors(model, ["]", ","], ["x = [[1, 2], [3, 4]]"], skip_first=2)
        >>> {layer: tuple(vectors.shape) for layer, vectors in found.items()}
        {0: (2, 128)}
    """
    check_options("after", precision, skip_first, None, estimator)
    attached = AttachedModel(model, tokenizer)
    if isinstance(layers, str) and layers == "all":
        layers = all_layers(model, target)
    hooks, end = ends_of(model, [layers] if isinstance(layers, int | str) else layers, target)
    rows = rows_of(attached, tokens, norm_gain)
    sums: dict[str, Tensor] = {}
    count = 0
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        batch = text_alone(attached.text(prompt).batch)
        batch = batch[:, :max_tokens] if isinstance(batch, Tensor) else batch
        with plain_tensors():
            every = list(dict.fromkeys([*hooks.values(), end]))
            sweep, places = sweeps._sweep(model, batch, every, end, skip_first, precision, estimator == "relevance")
            found = _swept(sweep, rows, places.stop - places.start)
        for hook in hooks.values():
            sums[hook] = sums[hook] + found[hook] if hook in sums else found[hook]
        count += 1
    if not count:
        raise ValueError("prompts is empty: give at least one")
    return {layer: sums[hook] / count for layer, hook in hooks.items()}


def _swept(sweep: Any, rows: Tensor, count: int) -> dict[str, Tensor]:
    """Carry a cotangent for each of ``rows`` back from all valid tokens, and take its mean over them at each hook."""
    rows = rows.to(sweep.device, sweep.dtype)
    found: dict[str, Tensor] = {}

    def see(hook: str, pulled: Tensor, first: int) -> None:
        mean = pulled[:, 0].mean(1)
        found.setdefault(hook, torch.zeros_like(rows))[start + first : start + first + len(mean)] = mean

    for start in range(0, len(rows), sweep.block):
        some = rows[start : start + sweep.block]
        sweep.pull(some[:, None, None].repeat(1, 1, count, 1), see)
    return found


def _pulled(matrix: Tensor | None, rows: Tensor) -> Tensor:
    """J_lᵀ u for each row u, in float32 or in the dtype of ``rows``."""
    return rows if matrix is None else rows @ matrix.to(rows.device, rows.dtype)


def _checked(vectors: Any, width: int) -> Tensor:
    """Vectors (n, width), float32 or float64."""
    if not isinstance(vectors, Tensor) or not vectors.dtype.is_floating_point:
        raise ValueError(f"a vector is {type(vectors).__name__}; it must be a tensor of floating point")
    vectors = vectors.detach()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or vectors.shape[1] != width or not len(vectors):
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; expected ({width},) or (n, {width})")
    if not vectors.isfinite().all():
        raise ValueError("a vector holds NaN or an infinity")
    return vectors if vectors.dtype == torch.float64 else vectors.float()
